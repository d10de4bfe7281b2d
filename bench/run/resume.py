"""What a run takes from earlier runs.

An earlier run of the same run_id is shown, continued, or set aside. A checkpoint is compared with a new
model, optimizer and plan, and it is accepted or refused as a whole, before anything is written. In a sweep,
a run can reuse the leak check of another seed of its configuration.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

import gnnmoe
from bench.check.leak_check import CHECKS, run_leak_check
from bench.check.subject import Check, CheckReport
from bench.data.blocks import EvalWindows
from bench.files import kind_of
from bench.measure.ledger import COUNTED, EpochAccount
from bench.record import (
    CODE_WORDS,
    Environment,
    NotMeasured,
    Record,
    RecordedConfig,
    RunFolder,
    TimePart,
    classes_of,
    files_of,
    is_measured,
    refuse_another_file,
    stale_code,
    stale_words,
    study_records,
)
from bench.run.prepare import Prepared, run_id
from bench.run.progress import Reporter
from bench.training.checkpoint import differing_fields, is_sound, load_checkpoint, refuse_unlike
from bench.training.evaluation import CommunicationTrace
from bench.training.loop import Trained, TrainingPlan
from bench.training.step import make_optimizer
from bench.tune.control import Decision, Recovery, shapes_of
from bench.tune.search import Shape
from gnnmoe.config import GNNMoEConfig, Refused, brief, shortened
from gnnmoe.couplers.registry import made_of
from gnnmoe.model import GNNMoEModel

KNOWN_BY = {"run_id": str, "identity": dict, "code": dict.fromkeys(CODE_WORDS, str)}


@dataclass(frozen=True)
class Earlier:
    """The state from which a run continues."""

    state: dict[str, Any] | None = None
    """A checked checkpoint; None: the run starts at the beginning."""
    parts: list[TimePart] = field(default_factory=list)
    """The earlier parts of the run, for ``Time.of``."""
    log: str = ""
    """The log of the earlier parts, from the checkpoint."""


NOTHING = Earlier()


def finished_record(prepared: Prepared, reporter: Reporter) -> Record | None:
    """Return the record of a finished run, and say so; None if the run must run.

    A run that other code made is stale: it runs again, except with --keep-stale.
    """
    record, config = prepared.folder.read_record(), prepared.config
    if not isinstance(record, Record) or config.places.force:
        return None
    allowed = record.status == "check_failed" and config.measure.allow_failed_check
    if not (record.status == "ok" or (allowed and is_measured(record.speed))):
        return None
    say, name = reporter.console.print, prepared.run_id
    differing = stale_code(record.environment, prepared.code)
    if differing and not config.places.keep_stale:
        say(
            f"run {name} is stale: {stale_words(differing)}. It runs again; --keep-stale would keep it.",
            markup=False,
        )
        return None
    say(f"run {name} is finished; --force runs it again. Its record:")
    if differing:
        say(f"note: it is stale, and kept by --keep-stale: {stale_words(differing)}.")
    if differing is None:
        say("note: it has no code hashes, so it may be stale.")
    measured = record.config.measure
    for name in ("marginal", "profile"):
        if getattr(config.measure, name) and not measured.get(name):
            say(f"note: it was made without --{name}; --force runs it again with it")
    if config.measure.audit == "full" and measured.get("audit") != "full":
        say("note: one batch in ten was audited; --force runs it again and audits all")
    return record


def to_resume(prepared: Prepared, reporter: Reporter) -> Earlier:
    """Return the state from which the run continues, or ``NOTHING``; write nothing.

    Raises:
        Refused: the run was interrupted, and neither --resume nor --force was given; there is nothing to
            resume; or the checkpoint is damaged, incomplete or of another config.
    """
    places = prepared.config.places
    record = prepared.folder.read_record()
    status = None if record is None else record.status
    going_on = status == "interrupted" and not places.force
    parts = record.time.parts if isinstance(record, Record) and going_on else []
    if places.resume_checkpoint is not None:
        remedy = "name a sound copy of it, or drop --resume-checkpoint to start at the beginning"
        return _from_checkpoint(places.resume_checkpoint, remedy, prepared, parts)
    if places.resume and status is None:
        raise Refused(_nothing_to_resume(prepared))
    if places.resume and status != "interrupted":
        words = (
            f"run {prepared.run_id} ended as {status}; only interrupted runs are continued. "
            "Without --resume it runs again, and the earlier record is kept."
        )
        if status in ("crashed", "oom", "timeout") and is_sound(prepared.checkpoint):
            words += f" --resume-checkpoint {prepared.checkpoint} goes on from its last checkpoint."
        raise Refused(words)
    if status == "interrupted" and not places.resume and not places.force:
        differing = stale_code(record.environment if isinstance(record, Record) else None, prepared.code)
        resume = "--resume --keep-stale continues it" if differing else "--resume continues it"
        since = f", and {stale_words(differing)}" if differing else ""
        raise Refused(
            f"run {prepared.run_id} was interrupted{since}; {resume}, "
            f"--force starts again and keeps it as {prepared.run_id}.1."
        )
    if not places.resume or places.force:
        return NOTHING
    if kind_of(prepared.checkpoint) is None:
        reporter.line(f"there is no checkpoint {prepared.checkpoint} yet; the run starts at the beginning")
        return Earlier(parts=parts)
    environment = record.environment if isinstance(record, Record) else None
    if is_measured(environment) and environment.threads != torch.get_num_threads():
        reporter.line("note: another number of threads than before; sums may round differently")
    remedy = f"--force starts again and keeps the run as {prepared.run_id}.1"
    if _is_finished(load_checkpoint(prepared.checkpoint, remedy)):
        reporter.line("the run was stopped while its last record was written; it starts at the beginning")
        return Earlier(parts=parts)
    return _from_checkpoint(prepared.checkpoint, remedy, prepared, parts)


def make_room(prepared: Prepared, reporter: Reporter) -> None:
    """Rename the earlier folder of a run that starts again; keep the folder of a run that continues."""
    record, places = prepared.folder.read_record(), prepared.config.places
    going_on = (places.resume or places.resume_checkpoint) and not places.force
    if record is None or (going_on and record.status == "interrupted"):
        return
    kept = prepared.folder.set_aside()
    reporter.line(f"an earlier record ({record.status}) is kept at {kept}")


def _from_checkpoint(path: Path, remedy: str, prepared: Prepared, parts: Sequence[TimePart]) -> Earlier:
    state = load_checkpoint(path, remedy)
    with _refusing(path, remedy):
        refuse_unlike({name: state[name] for name in KNOWN_BY if name in state}, KNOWN_BY)
        refuse_unlike({"data": state["identity"].get("data")}, {"data": dict}, "identity")
        refuse_unlike(state["identity"]["data"].get("sha256"), str, "identity.data.sha256")
    _refuse_another(path, state, prepared)
    with _refusing(path, remedy):
        refuse_unfit(state, prepared)
    return Earlier(state, _merged(parts, [TimePart(**part) for part in state["parts"]]), state["log"])


@contextmanager
def _refusing(path: Path, remedy: str) -> Iterator[None]:
    """Add the checkpoint's path and the ``remedy`` to a refusal of the block."""
    try:
        yield
    except Refused as error:
        words = str(error).rstrip(".")
        raise Refused(f"checkpoint {path} cannot be continued: {words}; {remedy}.") from error


def _is_finished(state: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has the best weights only, which a run keeps at its end."""
    return "trainer" not in state and "model" in state


def _refuse_another(path: Path, state: dict[str, Any], prepared: Prepared) -> None:
    """Refuse the checkpoint of another run, or of a finished one.

    Raises:
        Refused: names the fields that differ.
    """
    there, here = state["identity"]["data"]["sha256"], prepared.identity["data"]["sha256"]
    if there != here:
        raise Refused(
            f"checkpoint {path} is of another text or tokenizer (vocabulary and text {there[:12]} there, "
            f"{here[:12]} here); name the data that it was trained on."
        )
    if _is_finished(state):
        raise Refused(
            f"checkpoint {path} of run {state['run_id']} is of a finished run; nothing is left to do."
        )
    differing = differing_fields(state["identity"], prepared.identity)
    if differing or state["run_id"] != prepared.run_id:
        ids = f"run_id: {shortened(state['run_id'])} there, {prepared.run_id} here"
        raise Refused(f"checkpoint {path} is of another run: {_first(differing or [ids])}.")
    changed = stale_code(state["code"], prepared.code)
    if changed and not prepared.config.places.keep_stale:
        raise Refused(
            f"checkpoint {path} of run {state['run_id']} was made by other code: {stale_words(changed)}. "
            "--force starts again; --keep-stale continues it all the same."
        )


def _merged(first: Sequence[TimePart], second: Sequence[TimePart]) -> list[TimePart]:
    """Merge the parts of a record and of a checkpoint: each part once, with the later end, in order.

    The checkpoint knows more about a killed part. Only the record knows a part that saved no checkpoint.
    """
    rest, found = list(second), []
    for part in first:
        same = next((other for other in rest if _key(other) == _key(part)), None)
        if same is not None:
            rest.remove(same)
        found.append(max((part, same or part), key=lambda one: one.end or ""))
    return sorted([*found, *rest], key=lambda one: one.start)


def _key(part: TimePart) -> tuple[Any, ...]:
    return part.start, part.command, part.resumed_at_step


def refuse_another_class(prepared: Prepared) -> None:
    """Refuse a coupler or layer from a file if the study has a class of the same name from another file.

    Raises:
        Refused: as ``refuse_another_file``.
    """
    classes = files_of(vars(prepared.config.model))
    if classes:
        records = study_records(prepared.folder.path.parent)
        refuse_another_file(classes, prepared.code["coupler_sha256"], map(classes_of, records))


def _nothing_to_resume(prepared: Prepared) -> str:
    """Return the message that no run of this config was interrupted, with the nearest run."""
    message = f"no run with this config was interrupted in study {brief(prepared.config.places.study)}"
    ours = _comparable(prepared.record_config)
    others = [
        (differing_fields(_comparable(record.config), ours) + _ranks(record, prepared), record.run_id)
        for record in study_records(prepared.folder.path.parent)
        if record.status == "interrupted"
    ]
    if not others:
        return f"{message}, nor with another; drop --resume to start."
    differing, run_id = min(others, key=lambda other: len(other[0]))
    return f"{message}; the nearest, {run_id}, differs: {_first(differing) or 'in its data or device'}."


def _first(differing: Sequence[str]) -> str:
    """Return the first differences, and how many more there are."""
    more = [f"and {len(differing) - 3} more"] if len(differing) > 3 else []
    return "; ".join([*differing[:3], *more])


def _ranks(record: Record, prepared: Prepared) -> list[str]:
    there = record.environment.world_size if is_measured(record.environment) else 1
    here = prepared.ranks.world_size
    return [f"{there} rank{'s' * (there > 1)} there, {here} here"] if there != here else []


def _comparable(config: RecordedConfig) -> dict[str, Any]:
    """Return the config without ``places``."""
    return config.model_dump(exclude={"places"})


# --- what a checkpoint must hold ------------------------------------------------------------------

NUMBER, MAYBE_INT = int | float, int | None
PARTS = [{"command": str, "start": str, "end": str | None, "seconds": {str: NUMBER},
          "resumed_at_step": MAYBE_INT}]  # fmt: skip
COUNTS = dict.fromkeys((*COUNTED, "updates"), int)
STATE = {
    "tuned": dict | None, "log": str, "history": str, "parts": PARTS,
    "trainer": {
        "model": dict, "best_model": dict, "optimizer": {"state": dict, "param_groups": [dict]},
        "done": get_type_hints(Trained),
        "recovering": {"micro_batch_size": MAYBE_INT, "recoveries": [get_type_hints(Recovery)]},
        "control": dict | None, "random": [Tensor], "random_cuda": [Tensor | None],
    },
    "trace": {"steps": [int], "samples": {str: [Tensor]}, "seconds": float},
    "ledger": {
        "tuned_micro_batch_size": MAYBE_INT,
        "epochs": [get_type_hints(EpochAccount) | {"asked": COUNTS, "got": COUNTS}],
        "evaluations": {str: {"evaluations": int, "asked": int, "got": int}},
        "batch_shapes": {str: int}, "micro_batch_shapes": {str: int}, "last_shapes": [[int]],
    },
}  # fmt: skip
CONTROL = {"rows": int, "length": int, "ceiling": int, "room": int, "pending": MAYBE_INT,
           "decisions": [get_type_hints(Decision)]}  # fmt: skip
FOUND = {"status": str, "micro_batch_size": int, "length": int, "batch_size": int, "from_cache": bool,
         "trials": list, "cap": int, "limit_bytes": int, "target": NUMBER}  # fmt: skip
NOT_FOUND = {"status": str, "micro_batch_size": type(None), "length": int, "error": str, "trials": list}


def refuse_unfit(state: dict[str, Any], prepared: Prepared) -> None:
    """Refuse the state of a checkpoint of this run if the run cannot continue from it.

    Raises:
        Refused: names the first part that is missing or does not fit.
    """
    refuse_unlike({name: state[name] for name in STATE if name in state}, STATE)
    if not state["parts"]:
        raise Refused("it names no part of the run")
    prepared = _as_found(state["tuned"], prepared)
    plan = TrainingPlan(prepared.loaders["train"], prepared.config.training)
    done = Trained(**state["trainer"]["done"])
    if not (1 <= done.steps <= plan.total_steps and 0 <= done.best_step <= done.steps):
        raise Refused(
            f"trainer.done is {done.steps} steps, the best {done.best_step}; the run has {plan.total_steps}"
        )
    seed = prepared.config.training.seed
    model = prepared.execution.build(prepared.model_config, seed)  # a coupler may need the device
    model.set_output_bias(torch.from_numpy(prepared.corpus.vocabulary.log_unigram()))
    _refuse_weights(state["trainer"], done, model)
    _refuse_optimizer(state["trainer"], model, prepared)
    _refuse_pieces(state["trainer"], math.gcd(*plan.batch_sizes()), state["tuned"], prepared)
    _refuse_random(state["trainer"], prepared)
    _refuse_trace(state["trace"], done.steps, model, prepared)
    if state["ledger"]["tuned_micro_batch_size"] != (state["tuned"] or {}).get("micro_batch_size"):
        raise Refused("ledger.tuned_micro_batch_size is not that of tuned")
    _refuse_ledger(state["ledger"], done.steps, plan)
    _refuse_counts(state["ledger"], done.steps, len(state["trace"]["steps"]) - 1, prepared)
    _refuse_history(state["history"], done.steps, state["trace"]["steps"])


def _as_found(tuned: dict[str, Any] | None, prepared: Prepared) -> Prepared:
    """Return the run with the length of its search result.

    Raises:
        Refused: a search result is missing, or the run asks for no search.
    """
    memory = prepared.config.memory
    if (tuned is not None) != (memory.fit_shape or memory.tune_batch_size):
        raise Refused("tuned is the answer of a search" if tuned else "it lacks the answer of the search")
    if tuned is None:
        return prepared
    form = NOT_FOUND if tuned.get("status") == "failed" else FOUND
    refuse_unlike({name: tuned[name] for name in form if name in tuned}, form, "tuned")
    length = tuned["length"]
    if length == prepared.model_config.max_seq_length:
        return prepared
    if not memory.fit_shape or length < 1:
        raise Refused(f"tuned.length is {length}, which the run cannot have")
    return prepared.at_length(length)


def _refuse_weights(trainer: dict[str, Any], done: Trained, model: GNNMoEModel) -> None:
    form = {name: value if isinstance(value, Tensor) else type(value)
            for name, value in model.state_dict().items()}  # fmt: skip
    refuse_unlike(trainer["model"], form, "trainer.model")
    refuse_unlike(trainer["best_model"], form if done.best_step else {}, "trainer.best_model")


def _refuse_optimizer(trainer: dict[str, Any], model: GNNMoEModel, prepared: Prepared) -> None:
    """Refuse moments that are missing or have other shapes, and groups with other parameters or settings.

    A parameter that never had a gradient has no moments, and then it still has its first value in ``model``.
    The learning rate is not compared, because each step sets it.
    """
    here, there = make_optimizer(model, prepared.config.training), trainer["optimizer"]
    parameters = [parameter for group in here.param_groups for parameter in group["params"]]
    step = torch.zeros(())
    form = {number: {"step": step, "exp_avg": like, "exp_avg_sq": like}
            for number, like in enumerate(parameters)}  # fmt: skip
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, like in enumerate(parameters):
        if number not in there["state"] and torch.equal(like.cpu(), trainer["model"][name_of[id(like)]]):
            del form[number]
    refuse_unlike(there["state"], form, "trainer.optimizer.state")
    groups = here.state_dict()["param_groups"]
    if len(there["param_groups"]) != len(groups):
        raise Refused(f"trainer.optimizer has {len(there['param_groups'])} groups, not {len(groups)}")
    for number, (group, own) in enumerate(zip(there["param_groups"], groups, strict=True)):
        name = f"trainer.optimizer.param_groups.{number}"
        refuse_unlike(group, {key: type(value) for key, value in own.items()}, name)
        for key in own:
            if key != "lr" and group[key] != own[key]:
                raise Refused(f"{name}.{key} is {group[key]}; it must be {own[key]}")


def _refuse_pieces(
    trainer: dict[str, Any], unit: int, tuned: dict[str, Any] | None, prepared: Prepared
) -> None:
    """Refuse a micro-batch size that does not divide the batches, and an unknown shape of the control."""
    rows = trainer["recovering"]["micro_batch_size"]
    if rows is not None and (rows < 1 or unit % rows):
        raise Refused(f"trainer.recovering.micro_batch_size is {rows}, and batches are of {unit} rows")
    shapes, control = shapes_of(prepared.config, unit, tuned), trainer["control"]
    if shapes is None:
        refuse_unlike(control, type(None), "trainer.control")
        return
    refuse_unlike(control, CONTROL, "trainer.control")
    if Shape(control["rows"], control["length"]) not in shapes:
        raise Refused(
            f"trainer.control is at {control['rows']} × {control['length']}, which is no shape of the run"
        )
    pending = control["pending"] or 0
    if not (0 <= control["ceiling"] <= len(shapes) and 0 <= pending < len(shapes) and control["room"] >= 0):
        raise Refused(f"trainer.control is beyond the {len(shapes)} shapes of the run")


def _refuse_random(trainer: dict[str, Any], prepared: Prepared) -> None:
    """Refuse random states that torch does not accept, or a number of states other than the ranks."""
    ranks, device = prepared.ranks.world_size, prepared.device
    for name, kind in (("random", "cpu"), ("random_cuda", "cuda")):
        states = trainer[name]
        if len(states) != ranks:
            raise Refused(f"trainer.{name} has {len(states)} states for {ranks} ranks")
        for rank, state in enumerate(states):
            if kind not in ("cpu", device.type):
                refuse_unlike(state, type(None), f"trainer.{name}.{rank}")
                continue
            try:
                torch.Generator(device if kind == "cuda" else "cpu").set_state(state)
            except (RuntimeError, TypeError) as error:
                raise Refused(f"trainer.{name}.{rank} is no random state of torch") from error


def _refuse_trace(there: dict[str, Any], steps: int, model: GNNMoEModel, prepared: Prepared) -> None:
    """Refuse samples of another coupler, and a number of samples other than the steps."""
    trace = CommunicationTrace(prepared.probe())
    trace.sample(0, model)
    always = trace.state_dict()["samples"]
    perhaps = prepared.experts(None).sample(model)  # both parts of the run may have --no-diagnostics
    known = {name: [value.float().cpu()] for name, value in perhaps.items()} | always
    expected = {name: values for name, values in known.items() if name in always or name in there["samples"]}
    refuse_unlike(there["samples"], expected, "trace.samples")
    at = there["steps"]
    if at[:1] != [0] or at[-1] > steps or any(before >= after for before, after in pairwise(at)):
        raise Refused(f"trace.steps do not rise from 0 to at most {steps}")
    for name, values in there["samples"].items():
        if len(values) != len(at) and (name in always or len(values) > len(at)):
            raise Refused(f"trace.samples.{name} has {len(values)} samples of {len(at)} steps")


def _refuse_ledger(ledger: dict[str, Any], steps: int, plan: TrainingPlan) -> None:
    """Refuse counts that differ from the plan after ``steps`` steps."""
    epochs, last = ledger["epochs"], plan.place(steps - 1)[0]
    if len(epochs) != last + 1:
        raise Refused(f"ledger.epochs are {len(epochs)}; step {steps} is in epoch {last}, from 0")
    left = steps
    for number, there in enumerate(epochs):
        planned = EpochAccount.of(plan.epoch(number))
        here = min(left, planned.asked["updates"])
        whole = here == planned.asked["updates"]
        got, left = there["got"], left - here
        counted = got == planned.asked if whole else got["batches"] == got["updates"] == here
        if EpochAccount(**{**there, "got": planned.got}) != planned or not counted:
            raise Refused(f"ledger.epochs.{number} is not as the run's plan has it after {steps} steps")


def _refuse_counts(ledger: dict[str, Any], steps: int, evaluations: int, prepared: Prepared) -> None:
    """Refuse counts of shapes or evaluations that do not add up."""
    batches, pieces = ledger["batch_shapes"], ledger["micro_batch_shapes"]
    whole = sum(batches.values()) == steps
    whole = whole and _tokens(batches) == _tokens(pieces) * prepared.ranks.world_size
    if not (whole and ledger["last_shapes"]):
        raise Refused(f"ledger.batch_shapes, micro_batch_shapes or last_shapes are not of {steps} steps")
    windows = prepared.loaders["val"].dataset_obj
    assert isinstance(windows, EvalWindows)
    targets = evaluations * windows.num_scored
    counts = {"evaluations": evaluations, "asked": targets, "got": targets}
    if ledger["evaluations"] != ({"validation in training": counts} if evaluations else {}):
        raise Refused(f"ledger.evaluations are not of {evaluations} evaluations with {targets:,} targets")


def _tokens(counts: dict[str, int]) -> float:
    """Return the tokens of batches counted by shape, such as "4x16"; NaN if a key is no shape."""
    try:
        return sum(math.prod(map(int, shape.split("x"))) * count for shape, count in counts.items())
    except ValueError:
        return math.nan


def _refuse_history(text: str, steps: int, sampled: list[int]) -> None:
    """Refuse a history without exactly one row per step and one row per evaluation."""
    try:
        rows = [(row["kind"], row["step"]) for row in map(json.loads, text.splitlines())]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused("history is not one row of JSON per line, with kind and step") from error
    if [step for kind, step in rows if kind == "train"] != list(range(1, steps + 1)):
        raise Refused(f"history has not one row for each of {steps} steps")
    if [step for kind, step in rows if kind == "validation"] != sampled[1:]:
        raise Refused("history has not one row for each evaluation in trace.steps")


# --- the leak check of another seed ---------------------------------------------------------------

SEEDS_LOOKED_AT = 100  # seeds 0 to 99; runs with other seeds are always checked
OF_COMMITS = ("git_commit", "git_changes_sha256", "git_remark")  # the code hashes already say which code ran


def leak_check_of(prepared: Prepared, environment: Environment | NotMeasured) -> CheckReport:
    """Return the leak check of a run's configuration, before training.

    With ``reuse_check``, a passing check is reused from a run of the same study. Its identity may differ only
    in the seed, and its ``environment`` (device, threads, versions, code hashes) must be equal. That run must
    have made the check itself; the record names it. A coupler from outside the package is always checked,
    because the hash need not cover all its files. Two runs that start at the same time both check.
    """
    config = prepared.config
    own = config.memory.fit_shape or not prepared.ranks.alone
    own = own or not is_ours(prepared.model_config)
    if config.places.reuse_check and not own:
        for record in _other_seeds(prepared):
            if _same(record.environment, environment):
                report = _passed(record)
                if report is not None:
                    prepared.folder.log(f"its checks are those of run {report.checks[0].reused_from}")
                    return report
    device = torch.device("cpu") if prepared.device.type == "mps" else prepared.device  # mps has no float64
    return run_leak_check(prepared.model_config, seed=config.training.seed, device=device)


def is_ours(model: GNNMoEConfig) -> bool:
    """Say whether a coupler, its layer and its strategy are in this package, whose files the hashes cover."""
    parts = [base for part in made_of(model) for base in (part, *getattr(part, "__mro__", ()))]
    names = [part.__module__.partition(".")[0] for part in parts]
    return set(names) <= {gnnmoe.__name__, "torch", "builtins", "abc", "typing"}


def _other_seeds(prepared: Prepared) -> Iterator[Record]:
    """Yield the records of the other seeds of this configuration in the study."""
    places, identity = prepared.config.places, prepared.identity
    for seed in range(SEEDS_LOOKED_AT):
        name = run_id({**identity, "training": {**identity["training"], "seed": seed}})
        record = None if name == prepared.run_id else RunFolder(
            places.results_dir, places.study, name).read_record()  # fmt: skip
        if isinstance(record, Record):
            yield record


def _same(there: Environment | NotMeasured, here: Environment | NotMeasured) -> bool:
    """Say whether two environments are equal, apart from the commit."""
    both = [one.model_copy(update=dict.fromkeys(OF_COMMITS)) for one in (there, here)]
    return is_measured(there) and both[0] == both[1]


def _passed(record: Record) -> CheckReport | None:
    """Return the checks of a record as reused checks; None if one is missing, failed or itself reused."""
    found = record.check.checks if is_measured(record.check) else {}
    if not all(name in found and found[name].passed and found[name].reused_from is None for name in CHECKS):
        return None
    return CheckReport([Check(name, True, found[name].detail, 0.0, record.run_id) for name in CHECKS])
