"""One run: check, train, evaluate, measure, and write the record.

Read from top to bottom: ``Session`` has the phases and the record, ``TrainingRun`` has the training with
history and checkpoints, ``score`` is the final evaluation.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from bench.check.audit import Scored, audit_evaluation, audit_training
from bench.check.isolation import check_trained_isolation, rows_to_judge
from bench.check.subject import Check, CheckFailed, CheckReport, run_check
from bench.config import in_steps
from bench.data.blocks import EvalWindows
from bench.data.reference_lines import reference_nll
from bench.device import attempt, is_out_of_memory
from bench.files import CANNOT_WRITE, NotWritten, utc_now
from bench.interruption import Interruption
from bench.measure.ledger import Ledger
from bench.measure.speed_pass import SpeedPass, speed_pass_steps
from bench.measure.timing import training_flops_per_token
from bench.record import (
    NOT_REACHED,
    Accounts,
    Data,
    ExecutionUsed,
    Flops,
    LeakCheck,
    Parameters,
    Quality,
    Record,
    Search,
    SplitQuality,
    Time,
    TimePart,
    TrainingBlocks,
    Used,
    is_measured,
    not_measured,
)
from bench.run.prepare import Prepared, settings_in_record
from bench.run.progress import Reporter, Workload
from bench.run.resume import NOTHING, Earlier, is_ours, leak_check_of
from bench.run.trackers import Tracker
from bench.training.checkpoint import remove_left_over, save_checkpoint
from bench.training.environment import describe_environment
from bench.training.evaluation import CommunicationTrace, evaluate, summarize_communication
from bench.training.loop import Diverged, EpochPlan, Shapes, Trained, Trainer, TrainingPlan
from bench.training.ranks import End, agreed_end, why
from bench.training.step import Batch, to_device
from bench.tune.control import OUT_OF_MEMORY, Decision, Recovery, cut, micro_batch_size, steps_of
from bench.tune.find import failed, find, requested, words_of
from bench.tune.search import NoFeasibleBatch, SearchFailed
from gnnmoe.discovery import executed_again
from gnnmoe.model import GNNMoEModel
from gnnmoe.process_state import changed_state, torch_state


class LeakFound(Exception):
    """The coupler failed the leak check, so its perplexity would mean nothing."""


def _end_of(error: BaseException) -> End:
    """Return the status and error for the record of a run that ended with ``error``."""
    if isinstance(error, LeakFound):
        return End("check_failed", str(error))
    if isinstance(error, Diverged):
        return End("diverged", str(error))
    if not isinstance(error, Exception):
        return End("interrupted", "stopped from outside")
    if isinstance(error, NotWritten):
        return End("interrupted", f"{error}. Once it can be written, --resume continues the run.")
    oom = is_out_of_memory(error) or isinstance(error, NoFeasibleBatch)
    log = "".join(traceback.format_exception(error))
    return End("oom" if oom else "crashed", f"{type(error).__name__}: {error}", log)


class Session:
    """Runs a prepared run and keeps its record; the record is written whatever happens.

    ``earlier`` is the state from which an interrupted run continues.
    """

    def __init__(
        self,
        prepared: Prepared,
        command: str,
        reporter: Reporter,
        interruption: Interruption,
        earlier: Earlier = NOTHING,
    ) -> None:
        if earlier.state is not None:  # --keep-stale: the record keeps the first hashes
            prepared = replace(prepared, code=earlier.state["code"])
        self.prepared, self.reporter = prepared, reporter
        self.interruption, self.earlier, self.state = interruption, earlier, earlier.state
        self.trackers = trackers_of(prepared)
        config = prepared.config
        self.seconds = dict(prepared.seconds)
        self.audit: dict[str, Any] | None = None
        prepared.execution.set_products()
        self.settings = torch_state()
        self.started = time.perf_counter()
        self._phase_now: tuple[str, float] | None = None
        """Name and start of the current phase."""
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
            requested=requested(config), diagnostics=not_measured(NOT_REACHED),
        )  # fmt: skip

    def begin(self) -> None:
        """Make the run's folder, with a record of status ``interrupted`` until the run ends.

        A continued run keeps its log; its history stays until training has loaded the checkpoint.

        Raises:
            Refused: the folder cannot be written.
        """
        folder, number = self.prepared.folder, len(self.earlier.parts) + 1
        remove_left_over(self.prepared.checkpoint)
        folder.create(self.record, self.earlier.log)
        if number > 1:
            step = self._part.resumed_at_step
            where = "starts at the beginning" if step is None else f"continues after step {step}"
            folder.log(f"part {number} of the run {where}: {self._part.command}")

    def parts(self, end: str | None) -> list[TimePart]:
        """Return the parts of the run; the current one goes up to now and has this ``end``."""
        now, seconds = time.perf_counter(), dict(self.seconds)
        if self._phase_now is not None:
            name, start = self._phase_now
            seconds[name] = now - start
        seconds["total"] = self.prepared.seconds["prepare"] + now - self.started
        return [*self.earlier.parts, self._part.model_copy(update={"end": end, "seconds": seconds})]

    def run(self) -> Record:
        """Run all phases, set the status and write the record.

        KeyboardInterrupt and SystemExit are raised again after the record is written.
        """
        try:
            self._phases()
        except BaseException as error:
            if not self.prepared.ranks.alone:
                self.interruption.over()  # torchrun sends a signal to all ranks when one ends
            end = agreed_end(self.prepared.ranks, _end_of(error), why(error))
            with self.interruption.ignored():
                self._end(end.status, end.error, end.log)
            if not isinstance(error, Exception):
                raise
        else:
            passed = is_measured(self.record.check) and self.record.check.passed
            status, why_not = ("ok", None) if passed else ("check_failed", "trained by --allow-failed-check")
            with self.interruption.ignored():
                self._end(status, why_not)
        return self.record

    def _end(self, status: str, error: str | None, log: str = "") -> None:
        folder, record = self.prepared.folder, self.record
        record.status, record.error = status, error
        record.time = Time.of(self.parts(utc_now()))
        if is_measured(record.diagnostics):
            record.diagnostics.share_of_run = record.diagnostics.seconds / record.time.seconds["total"]
        if status == "crashed":
            print(log, file=sys.stderr)
        try:
            folder.write_record(record)
        except OSError as failure:  # the record on the disk says interrupted
            record.status, record.error = "interrupted", f"{error or status}; {failure}"
        except ValueError as failure:
            record.status = "crashed"
            record.error = f"{error or status}; the record {CANNOT_WRITE}: {failure}"
        with suppress(OSError):
            folder.log(log + f"status {status}" + (f": {error}" if error else ""))
        for tracker in self.trackers:
            tracker.finish(record)

    def _phases(self) -> None:
        prepared, tuned = self.prepared, None
        config = prepared.config
        if config.memory.fit_shape:  # first: the leak check must see the model that is trained
            with self._phase("fit", "fitting length and micro-batch to the memory"):
                tuned = self._search(prepared)
                prepared = prepared.at_length(tuned["length"])
                assert is_measured(self.record.data)
                self.record.data.training_blocks = _subset(prepared)
        with self._phase("check", "checking the coupler"):
            report = leak_check_of(prepared, self.record.environment)
            self._judge(report)
        if config.memory.tune_batch_size:
            with self._phase("tune", "searching for the largest micro-batch that fits"):
                tuned = self._search(prepared)
        with self._phase("build", "building the model"):
            model = self._build(prepared)
        if config.execution.compile:
            first, rows = next(iter(prepared.loaders["train"])), micro_batch_size(config, tuned)
            with self._phase("compile", "compiling the model"):  # training recovers if memory runs out here
                attempt(lambda: prepared.execution.compile_now(model, first, rows))
        with self._phase("train", "training"):
            learning = self._train(prepared, model, tuned)
        with self._phase("evaluate", "evaluating"):
            ids = rows_to_judge(prepared.loaders["train"], learning.micro_batch_size)
            ids = prepared.ranks.gather(ids)[0]  # all ranks check the same rows
            dtype = prepared.execution.autocast_dtype
            again = check_trained_isolation(model, ids.to(prepared.device), autocast_dtype=dtype)
            report = CheckReport([*report.checks, again])
            self._judge(report)  # before any perplexity is written
            self._evaluate(prepared, model, learning, report)
        if config.measure.speed:
            with self._phase("speed", "measuring speed and memory"):
                self._measure(prepared, model, learning)
        else:
            self.record.speed = self.record.memory = not_measured("left out by --no-speed")
        learning.keep_best()
        prepared.ranks.meet()

    def _measure(self, prepared: Prepared, model: GNNMoEModel, learning: TrainingRun) -> None:
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
        """Check that no setting of the process that can change a number differs from the start."""

        def compare() -> str:
            changes = changed_state(self.settings)
            if changes:
                raise CheckFailed(f"the coupler changed settings of the process: {'; '.join(changes)}")
            return "the process has the settings that it had at the start"

        return run_check("settings", compare)

    def _audit(
        self, prepared: Prepared, model: GNNMoEModel, learning: TrainingRun, scored: list[Scored]
    ) -> list[Check]:
        """Audit the scored losses, and one training batch."""
        rows = learning.micro_batch_size
        config, seed = prepared.config, prepared.config.training.seed

        def fresh() -> GNNMoEModel:
            with executed_again(config.model.coupler_type, config.model.hgnn_conv_type):
                found = prepared.execution.build(prepared.model_config, seed)
            found.load_state_dict(model.state_dict())
            return found

        audited, about = audit_evaluation(
            model, scored, rows=rows, seed=seed, full=config.measure.audit == "full",
            fresh=None if is_ours(prepared.model_config) else fresh, gather=prepared.ranks.gather,
        )  # fmt: skip
        self.audit = about
        batch = learning.as_run(next(iter(prepared.loaders["train"])))
        batch = to_device(prepared.ranks.gather(batch)[0], prepared.device)  # all ranks audit the same batch
        words = prepared.corpus.vocabulary.size
        return [audited, audit_training(model, batch, rows=rows, seed=seed, words=words)]

    def _judge(self, report: CheckReport) -> None:
        self.record.check = LeakCheck.model_validate({**report.to_record(), "audit": self.audit})
        if not report.passed and not self.prepared.config.measure.allow_failed_check:
            raise LeakFound("; ".join(f"{check.name}: {check.detail}" for check in report.failures))

    def _search(self, prepared: Prepared) -> dict[str, Any]:
        """Search for what fits before the model is built; a continued run keeps its first answer.

        Raises:
            SearchFailed: the search failed, and the user asked for no fallback.
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

    def _train(self, prepared: Prepared, model: GNNMoEModel, tuned: dict[str, Any] | None) -> TrainingRun:
        learning = TrainingRun(prepared, model, self.reporter, self.interruption,
                            self.state, self.trackers, tuned, lambda: self.parts(utc_now()))  # fmt: skip
        try:
            learning.run()
        finally:
            learning.write(self.record)
        return learning

    def _evaluate(
        self, prepared: Prepared, model: GNNMoEModel, learning: TrainingRun, report: CheckReport
    ) -> None:
        quality, arrays, scored = score(prepared, model, learning)
        learning.release()
        found = [self._settings(), *self._audit(prepared, model, learning, scored)]
        self._judge(CheckReport([*report.checks, *found]))
        if is_measured(self.record.used):
            self.record.used.ledger = Accounts.model_validate(learning.ledger.to_record())
        self.record.quality = quality
        prepared.folder.write_arrays("nll.npz", arrays)
        communication = summarize_communication(model, prepared.probe())
        self.record.communication = communication
        if learning.experts is None:
            self.record.diagnostics = not_measured("left out by --no-diagnostics")
            return
        self.record.diagnostics, features = learning.experts.conclude(
            model, communication, learning.trace.seconds
        )
        if features:
            prepared.folder.write_arrays("experts.npz", features)


def _subset(prepared: Prepared) -> TrainingBlocks:
    """Return the number of training blocks and, for a subset, the seed that chose it."""
    loader, chosen = prepared.loaders["train"], prepared.config.data.num_train_samples is not None
    curriculum = loader.sampler_obj.curriculum
    return TrainingBlocks(
        count=len(loader.dataset_obj),
        subset_seed=prepared.config.training.seed if chosen else None,
        curriculum=None if curriculum is None else curriculum.to_record(),
    )


def trackers_of(prepared: Prepared) -> list[Tracker]:
    """Return the tracker that ``--track`` names; none without the flag."""
    name = prepared.config.places.track
    return [] if name is None else [importlib.import_module(f"bench.run.trackers.{name}").Tracker(prepared)]


class TrainingRun:
    """Trains the model of a prepared run, and keeps its history and checkpoints: the hooks of the trainer.

    ``state`` is a checkpoint that ``bench.run.resume`` has checked. The run continues from it, bit for bit
    on a CPU with the same number of threads. ``tuned`` is the result of the search for the micro-batch, if
    there was one. ``parts`` returns the parts of the run up to now, for ``Time.of``.
    """

    def __init__(
        self,
        prepared: Prepared,
        model: GNNMoEModel,
        reporter: Reporter,
        interruption: Interruption,
        state: dict[str, Any] | None,
        trackers: Sequence[Tracker],
        tuned: dict[str, Any] | None = None,
        parts: Callable[[], list[TimePart]] = list,
    ) -> None:
        self.prepared, self.model, self.reporter, self.interruption = prepared, model, reporter, interruption
        self.trackers = trackers
        config, loaders, ranks = prepared.config.training, prepared.loaders, prepared.ranks
        self.tuned, self._parts = tuned, parts
        unit = math.gcd(*TrainingPlan(loaders["train"], config).batch_sizes())
        self.steps = steps_of(
            prepared.config, model, unit, tuned, prepared.device, ranks, self.on_recovery, self.on_decision
        )
        self.trainer = Trainer(
            model, loaders["train"], loaders["val"], config, prepared.device, self,
            steps=self.steps, ranks=ranks, progress=reporter.evaluating,
        )  # fmt: skip
        windows = loaders["val"].dataset
        assert isinstance(windows, EvalWindows)
        self._validation_tokens = windows.num_scored
        asked, rows = prepared.config.measure.diagnostics, self.steps.micro_batch_size
        self.experts = prepared.experts(rows) if asked else None
        self.trace = CommunicationTrace(prepared.probe(), self.experts.sample if self.experts else None)
        self.ledger = Ledger(tuned["micro_batch_size"] if tuned else None, ranks)
        every = in_steps(config.eval_every, self.trainer.plan.total_steps)
        self.every = prepared.config.places.checkpoint_every or every
        if state is None:
            self.trace.sample(0, model)
        else:
            self.trainer.load_state_dict(state["trainer"])
            self.trace.load_state_dict(state["trace"])
            self.ledger.load_state_dict(state["ledger"])
        prepared.folder.write_history(state["history"] if state else "")
        for tracker in trackers:
            tracker.begin(model, self.trace, self.trainer.done.steps)

    @property
    def micro_batch_size(self) -> int | None:
        """The rows of the last micro-batch; None: whole batches."""
        last = self.ledger.last_shapes
        return self.steps.micro_batch_size if not last else last[0][0] if len(last) > 1 else None

    def run(self) -> Trained:
        """Train to the end; a signal stops at the end of a step, with a checkpoint.

        Raises:
            KeyboardInterrupt: a signal came.
            Diverged: a loss is no longer finite.
        """
        self.reporter.training_begins(self._workload(), self.trainer.done.steps)
        with self.interruption.deferred():
            return self.trainer.run()

    def _workload(self) -> Workload:
        config, loaders = self.prepared.config, self.prepared.loaders
        steps, final = self.trainer.plan.total_steps, ("val_final", "test")
        return Workload(
            steps=steps,
            eval_every=in_steps(config.training.eval_every, steps),
            eval_batches=len(loaders["val"]),
            final_batches=sum(len(loaders[name]) for name in final if name in loaders),
            speed_steps=speed_pass_steps(config.measure) if config.measure.speed else 0,
        )

    def release(self) -> None:
        """Free what only training needs: gradients, optimizer state and the copy of the best state."""
        self.trainer.release()

    def keep_best(self) -> None:
        """Replace the checkpoint by one with the best weights only: the run is finished."""
        self._save({"model": self.model.state_dict(), "identity": self.prepared.trained_identity})

    def write(self, record: Record) -> None:
        """Write what was used into ``record``, and the communication so far into the folder."""
        for tracker in self.trackers:
            tracker.close()
        plan, done = self.trainer.plan, self.ledger.totals()
        execution, ranks = self.prepared.execution, self.prepared.ranks
        sizes = sorted({account.batch_size for account in self.ledger.epochs})
        last, controller = self.ledger.last_shapes, self.steps.controller
        record.used = Used(
            batch_shapes=self.ledger.batch_shapes, steps=done["updates"]["got"],
            tokens=done["tokens"]["got"], total_steps=plan.total_steps, epochs=round(plan.epochs(), 6),
            execution=ExecutionUsed(**execution.to_record()), precision=execution.precision,
            world_size=ranks.world_size, backend=ranks.backend,
            ledger=Accounts.model_validate(self.ledger.to_record()), batch_sizes=sizes,
            micro_batch_shapes=self.ledger.micro_batch_shapes,
            micro_batch_size=last[0][0] if last else None, accumulation=len(last) or None,
            recoveries=self.steps.to_record(),
            lengths=sorted({int(key.split("x")[1]) for key in self.ledger.micro_batch_shapes}),
            control=controller.to_record() if controller else [],
        )  # fmt: skip
        self.prepared.folder.write_arrays("communication.npz", self.trace.arrays())

    def on_epoch(self, plan: EpochPlan) -> None:
        """Open the account of an epoch."""
        self.ledger.begin_epoch(plan)

    def on_batch(self, batch: Batch) -> int:
        """Count a batch; return its number of real targets."""
        return self.ledger.batch(batch)

    def on_update(self, shapes: Shapes) -> None:
        """Count an optimizer step and its pieces."""
        self.ledger.update(shapes)

    def on_recovery(self, recovery: Recovery) -> None:
        """Log each time memory runs out, and print a note the first time."""
        text = (
            f"step {recovery.step} ran out of memory: this batch and the following batches run in "
            f"micro-batches of {recovery.micro_batch_size} instead of {recovery.failed_micro_batch_size}"
        )
        self.prepared.folder.log(f"{text} ({recovery.error})")
        if len(self.steps.recoveries) == 1:
            self.reporter.line(f"note: {text}; smaller ones where need be")

    def on_decision(self, decision: Decision) -> None:
        """Keep and print a change of the shape of the micro-batches."""
        self.prepared.folder.append_history({"kind": "shape", **asdict(decision)})
        self.prepared.folder.log(str(decision))
        if decision.reason != OUT_OF_MEMORY:  # on_recovery prints this case
            self.reporter.line(f"note: {decision}")

    def as_run(self, batch: Batch) -> Batch:
        """Return a batch cut to the sequence length of the last update."""
        last = self.ledger.last_shapes
        return cut(batch, last[0][1]) if last else batch

    def after_epoch(self) -> None:
        """Close the account of an epoch."""
        self.ledger.end_epoch()

    def on_step(self, row: dict[str, Any]) -> None:
        """Keep and show a step."""
        self.prepared.folder.append_history(row)
        for tracker in self.trackers:
            tracker.row(row)
        self.reporter.step(row)

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """Keep and show an evaluation, and sample the communication."""
        self.ledger.evaluated("validation in training", self._validation_tokens, row["tokens"])
        self.trace.sample(row["step"], self.model)
        self.prepared.folder.append_history(row)
        for tracker in self.trackers:
            tracker.row(row)
            tracker.sample(self.trace)
        self.reporter.evaluated(row)

    def after_step(self) -> None:
        """Save a checkpoint when one is due or a signal came to any rank; after a signal, stop all ranks."""
        steps, requested = self.trainer.done.steps, self.prepared.ranks.any(self.interruption.requested)
        if requested or steps % self.every == 0 or steps == self.trainer.plan.total_steps:
            state = {
                "trainer": self.trainer.state_dict(), "trace": self.trace.state_dict(),
                "ledger": self.ledger.state_dict(), "tuned": self.tuned,
            }  # fmt: skip
            folder = self.prepared.folder
            texts = {"history": folder.read_history(), "log": folder.read_log()}
            for tracker in self.trackers:
                tracker.flush()
            self._save({**state, **texts, "parts": [part.model_dump() for part in self._parts()]})
        if requested:
            raise KeyboardInterrupt

    def _save(self, state: dict[str, Any]) -> None:
        if self.prepared.ranks.first:
            prepared = self.prepared
            known_by = {"run_id": prepared.run_id, "identity": prepared.identity, "code": prepared.code}
            save_checkpoint(self.prepared.checkpoint, {**known_by, **state})


def score(
    prepared: Prepared, model: GNNMoEModel, learning: TrainingRun
) -> tuple[Quality, dict[str, np.ndarray], list[Scored]]:
    """Return the record's ``quality``, the arrays of nll.npz, and the scored splits.

    The arrays hold, for each split, the nll in nats (T,) and the document number (T,) of each target. On
    several ranks each rank scores a stretch of the text, and all return the whole.
    """
    loaders, device = prepared.loaders, prepared.device
    found: dict[str, SplitQuality] = {}
    arrays: dict[str, np.ndarray] = {}
    scored: list[Scored] = []
    for split, loader in (("validation", loaders["val_final"]), ("test", loaders.get("test"))):
        if loader is None:
            continue
        start = time.perf_counter()
        rows, tell = learning.micro_batch_size, learning.reporter.evaluating
        result = evaluate(model, loader, device, rows, prepared.ranks, tell)
        scored.append(Scored(split, loader, result.nll, time.perf_counter() - start))
        windows = loader.dataset
        assert isinstance(windows, EvalWindows)
        learning.ledger.evaluated(f"{split} at the end", windows.num_scored, result.tokens)
        words, text_bytes = windows.split.words_and_bytes(result.tokens)
        lines = reference_nll(prepared.corpus, split, result.tokens)
        found[split] = SplitQuality(
            nll_sum=result.nll_sum, tokens=result.tokens, words=words, bytes=text_bytes,
            unknown_words=windows.split.unknown_words(result.tokens),
            length=windows.length, stride=windows.stride,
            **{f"{line}_nll_sum": nll_sum for line, nll_sum in lines.items()},
        )  # fmt: skip
        arrays |= {f"{split}_nll": result.nll, f"{split}_document": windows.document_ids().astype(np.int32)}
    not_asked = not_measured("not asked for; --evaluate-test scores it")
    quality = Quality(validation=found["validation"], test=found.get("test", not_asked),
                      best_step=learning.trainer.done.best_step)  # fmt: skip
    return quality, arrays, scored
