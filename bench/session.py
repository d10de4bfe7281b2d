"""One run from its config to its record: check, train, evaluate, measure, write."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bench.device import attempt, is_out_of_memory
from bench.existing import NOTHING, Earlier
from bench.files import utc_now
from bench.gate import (
    Check,
    GateReport,
    Scored,
    audit_evaluation,
    audit_training,
    check_trained_isolation,
)
from bench.gate.report import CheckFailed, run_check
from bench.gate.trained import rows_to_judge
from bench.gating import gate_of, is_ours
from bench.identity import settings_in_record
from bench.learning import Learning, probed
from bench.measure.environment import describe_environment
from bench.measure.flops import training_flops_per_token
from bench.measure.speed_pass import SpeedPass
from bench.prepare import Prepared
from bench.progress import Reporter
from bench.record import (
    Accounts,
    Data,
    Flops,
    LeakCheck,
    Parameters,
    Record,
    Search,
    Time,
    TimePart,
    TrainingBlocks,
    is_measured,
    not_measured,
)
from bench.scoring import score
from bench.track import Tracker
from bench.training.checkpoint import remove_left_over
from bench.training.communication import summarize_communication
from bench.training.ending import End, agreed_end, why
from bench.training.interruption import Interruption
from bench.training.loop import Diverged
from bench.training.step import to_device
from bench.tune.budget import requested
from bench.tune.control import micro_batch_size
from bench.tune.find import failed, find, words_of
from bench.tune.search import NoFeasibleBatch, SearchFailed
from gnnmoe.couplers import executed_again
from gnnmoe.model import GNNMoEModel
from gnnmoe.process_state import changed_state, torch_state


class LeakFound(Exception):
    """The coupler failed the leak check: its perplexity would not count."""


def _end_of(error: BaseException) -> End:
    """Return what an error means for the record of a run that it ended."""
    if isinstance(error, LeakFound):
        return End("check_failed", str(error))
    if isinstance(error, Diverged):
        return End("diverged", str(error))
    if not isinstance(error, Exception):
        return End("interrupted", "stopped from outside")
    oom = is_out_of_memory(error) or isinstance(error, NoFeasibleBatch)
    log = "".join(traceback.format_exception(error))
    return End("oom" if oom else "crashed", f"{type(error).__name__}: {error}", log)


class Session:
    """Runs what was prepared and keeps its record; whatever happens, the record is written.

    ``earlier`` is what an interrupted run goes on from.
    """

    def __init__(
        self,
        prepared: Prepared,
        command: str,
        reporter: Reporter,
        interruption: Interruption,
        earlier: Earlier = NOTHING,
    ) -> None:
        if earlier.state is not None:  # continued by --keep-stale: the record says which code began the run
            prepared = replace(prepared, code=earlier.state["code"])
        self.prepared, self.reporter = prepared, reporter
        self.interruption, self.earlier, self.state = interruption, earlier, earlier.state
        self.tracker = Tracker(prepared)
        config = prepared.config
        self.seconds = dict(prepared.seconds)
        self.audit: dict[str, Any] | None = None
        prepared.execution.set_products()
        self.settings = torch_state()
        self.started = time.perf_counter()
        self._phase_now: tuple[str, float] | None = None
        """Name and start of the phase that is going on."""
        self._part = TimePart(
            command=command, start=utc_now(), end=None, seconds={},
            resumed_at_step=self.state["trainer"]["done"]["steps"] if self.state else None,
        )  # fmt: skip
        ranks = prepared.ranks
        self.record = Record(
            run_id=prepared.run_id, configuration=prepared.configuration,
            study=config.places.study, run_name=config.places.run_name,
            status="interrupted", command=(earlier.parts or [self._part])[0].command,
            config=settings_in_record(config), seed=config.training.seed,
            environment=describe_environment(
                prepared.device, prepared.code, ranks.world_size, ranks.backend
            ),
            data=Data(**prepared.corpus.to_record(), training_blocks=_subset(prepared)),
            time=Time.of(self.parts(end=None)),
            tuned=not_measured("no batch-size search was asked for"),
            requested=requested(config),
        )  # fmt: skip

    def begin(self) -> None:
        """Make the run's folder, with a record that says ``interrupted`` until something else is known.

        A run that goes on keeps its log; its history stays until training has taken over the state.

        Raises:
            Refused: the folder cannot be written.
        """
        folder, number = self.prepared.folder, len(self.earlier.parts) + 1
        remove_left_over(self.prepared.checkpoint)
        folder.create(self.record, self.earlier.log)
        if number > 1:
            step = self._part.resumed_at_step
            where = "starts at the beginning" if step is None else f"goes on after step {step}"
            folder.log(f"part {number} of the run {where}: {self._part.command}")

    def parts(self, end: str | None) -> list[TimePart]:
        """Return the parts of the run, this one up to now and with this ``end``; see ``Time.of``."""
        now, seconds = time.perf_counter(), dict(self.seconds)
        if self._phase_now is not None:
            name, start = self._phase_now
            seconds[name] = now - start
        seconds["total"] = self.prepared.seconds["prepare"] + now - self.started
        return [*self.earlier.parts, self._part.model_copy(update={"end": end, "seconds": seconds})]

    def run(self) -> Record:
        """Run all phases; end with the record written and its status set.

        What is no ``Exception`` (KeyboardInterrupt, SystemExit) comes out again, after the record.
        """
        try:
            self._phases()
        except BaseException as error:
            if not self.prepared.ranks.alone:
                self.interruption.over()  # torchrun sends a signal to all ranks when one has ended
            end = agreed_end(self.prepared.ranks, _end_of(error), why(error))
            self._end(end.status, end.error, end.log)
            if not isinstance(error, Exception):
                raise
        else:
            passed = is_measured(self.record.check) and self.record.check.passed
            status, why_not = ("ok", None) if passed else ("check_failed", "trained by --allow-failed-check")
            self._end(status, why_not)
        return self.record

    def _end(self, status: str, error: str | None, log: str = "") -> None:
        folder, record = self.prepared.folder, self.record
        record.status, record.error = status, error
        record.time = Time.of(self.parts(utc_now()))
        if status == "crashed":
            print(log, file=sys.stderr)
        try:
            folder.write_record(record)
            folder.log(log + f"status {status}" + (f": {error}" if error else ""))
        except (OSError, ValueError) as failure:
            record.status = "crashed"
            record.error = f"{error or status}; the record cannot be written: {failure}"
        self.tracker.finish(record)

    def _phases(self) -> None:
        prepared, tuned = self.prepared, None
        config = prepared.config
        if config.memory.fit_shape:  # first, since what is judged is the model that is trained
            with self._phase("fit", "fitting length and micro-batch to the memory"):
                tuned = self._search(prepared)
                prepared = prepared.at_length(tuned["length"])
                assert is_measured(self.record.data)
                self.record.data.training_blocks = _subset(prepared)
        with self._phase("check", "checking the coupler"):
            report = gate_of(prepared, self.record.environment)
            self._judge(report)
        if config.memory.tune_batch_size:
            with self._phase("tune", "searching for the largest micro-batch that fits"):
                tuned = self._search(prepared)
        with self._phase("build", "building the model"):
            model = self._build(prepared)
        if config.execution.compile:
            first, rows = next(iter(prepared.loaders["train"])), micro_batch_size(config, tuned)
            with self._phase("compile", "compiling the model"):  # out of memory here, training recovers
                attempt(lambda: prepared.execution.compile_now(model, first, rows))
        with self._phase("train", "training"):
            learning = self._train(prepared, model, tuned)
        with self._phase("evaluate", "evaluating"):
            ids = rows_to_judge(prepared.loaders["train"], learning.micro_batch_size)
            ids = prepared.ranks.gather(ids)[0]  # the same rows on all ranks, so the same verdict
            dtype = prepared.execution.autocast_dtype
            again = check_trained_isolation(model, ids.to(prepared.device), autocast_dtype=dtype)
            report = GateReport([*report.checks, again])
            self._judge(report)  # before any perplexity is written
            self._evaluate(prepared, model, learning, report)
        with self._phase("speed", "measuring speed and memory"):
            self._measure(prepared, model, learning)
        learning.keep_best()
        prepared.ranks.meet()

    def _measure(self, prepared: Prepared, model: GNNMoEModel, learning: Learning) -> None:
        folder, ranks, say = prepared.folder.path, prepared.ranks, self.reporter.line
        speed_pass = SpeedPass(prepared.config, prepared.device, folder, say, ranks)
        self.record.speed, self.record.memory = speed_pass.run(
            model, prepared.loaders["train"], learning.as_run, learning.micro_batch_size
        )

    @contextmanager
    def _phase(self, name: str, description: str) -> Iterator[None]:
        start = time.perf_counter()
        self._phase_now = name, start
        self.prepared.folder.log(description)
        with self.reporter.phase(description):
            try:
                yield
            finally:
                self.seconds[name], self._phase_now = time.perf_counter() - start, None

    def _settings(self) -> Check:
        """Check that the process has the settings that it had at the start: those that change numbers."""

        def compare() -> str:
            changes = changed_state(self.settings)
            if changes:
                raise CheckFailed(f"the coupler changed settings of the process: {'; '.join(changes)}")
            return "the process has the settings that it had at the start"

        return run_check("settings", compare)

    def _audit(
        self, prepared: Prepared, model: GNNMoEModel, learning: Learning, scored: list[Scored]
    ) -> list[Check]:
        """Audit the losses that were scored, and one batch as it was trained on."""
        rows = learning.micro_batch_size
        config, seed = prepared.config, prepared.config.training.seed
        coupler = config.model.coupler_type

        def fresh() -> GNNMoEModel:
            with executed_again(coupler):
                found = prepared.execution.build(prepared.model_config, seed)
            found.load_state_dict(model.state_dict())
            return found

        audited, about = audit_evaluation(
            model, scored, rows=rows, seed=seed, full=config.measure.audit == "full",
            fresh=None if is_ours(coupler) else fresh, gather=prepared.ranks.gather,
        )  # fmt: skip
        self.audit = about
        batch = learning.as_run(next(iter(prepared.loaders["train"])))
        batch = to_device(prepared.ranks.gather(batch)[0], prepared.device)  # one verdict on all ranks
        words = prepared.corpus.vocabulary.size
        return [audited, audit_training(model, batch, rows=rows, seed=seed, words=words)]

    def _judge(self, report: GateReport) -> None:
        self.record.check = LeakCheck.model_validate({**report.to_record(), "audit": self.audit})
        if not report.passed and not self.prepared.config.measure.allow_failed_check:
            raise LeakFound("; ".join(f"{check.name}: {check.detail}" for check in report.failures))

    def _search(self, prepared: Prepared) -> dict[str, Any]:
        """Search before there is a model; a run that goes on keeps what was found when it began.

        Raises:
            SearchFailed: the search failed, and no fallback was asked for.
        """
        say, found = self.reporter.line, self.state["tuned"] if self.state else None
        if found is None:
            request = prepared.search(say)
            try:
                found = find(request, prepared.ranks, say)
            except SearchFailed as error:
                found = failed(request, error)
                if not prepared.config.memory.tune_fallback:
                    self.record.tuned = Search.model_validate(found)
                    raise
        self.record.tuned = Search.model_validate(found)
        say(words_of(found))
        return found

    def _build(self, prepared: Prepared) -> GNNMoEModel:
        model = prepared.execution.build(prepared.model_config, prepared.config.training.seed)
        model.set_output_bias(torch.from_numpy(prepared.corpus.vocabulary.log_unigram()))
        self.record.parameters = Parameters(**model.parameter_counts())
        self.record.flops = Flops(training_flops_per_token=training_flops_per_token(model))
        return model

    def _train(self, prepared: Prepared, model: GNNMoEModel, tuned: dict[str, Any] | None) -> Learning:
        learning = Learning(prepared, model, self.reporter, self.interruption,
                            self.state, self.tracker, tuned, lambda: self.parts(utc_now()))  # fmt: skip
        try:
            learning.run()
        finally:
            learning.write(self.record)
        return learning

    def _evaluate(
        self, prepared: Prepared, model: GNNMoEModel, learning: Learning, report: GateReport
    ) -> None:
        quality, arrays, scored = score(prepared, model, learning)
        learning.release()
        found = [self._settings(), *self._audit(prepared, model, learning, scored)]
        self._judge(GateReport([*report.checks, *found]))
        if is_measured(self.record.used):
            self.record.used.ledger = Accounts.model_validate(learning.ledger.to_record())
        self.record.quality = quality
        prepared.folder.write_arrays("nll.npz", arrays)
        self.record.communication = summarize_communication(model, probed(prepared))


def _subset(prepared: Prepared) -> TrainingBlocks:
    """Return which blocks are trained on: how many, and the seed that chose them where not all."""
    loader, chosen = prepared.loaders["train"], prepared.config.data.num_train_samples is not None
    curriculum = loader.sampler_obj.curriculum
    return TrainingBlocks(
        count=len(loader.dataset_obj),
        subset_seed=prepared.config.training.seed if chosen else None,
        curriculum=None if curriculum is None else curriculum.to_record(),
    )
