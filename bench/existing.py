"""What to do where a run has been asked for before: show it, go on with it, or keep it and start again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.checkpoint_checks import refuse_unfit
from bench.prepare import Prepared
from bench.progress import Reporter
from bench.record import (
    CODE_WORDS,
    Record,
    Settings,
    TimePart,
    coupler_of,
    is_measured,
    refuse_another_file,
    stale_code,
    stale_words,
    study_records,
)
from bench.training.checkpoint import differing_fields, load_checkpoint, refuse_unlike
from gnnmoe.config import Refused
from gnnmoe.couplers import is_file

KNOWN_BY = {"run_id": str, "identity": dict, "code": dict.fromkeys(CODE_WORDS, str)}


@dataclass(frozen=True)
class Earlier:
    """What a run goes on from."""

    state: dict[str, Any] | None = None
    """Of a checkpoint, checked as a whole; None: the run starts at the beginning."""
    parts: list[TimePart] = field(default_factory=list)
    """The run's earlier parts, as ``Time.of`` takes them."""
    log: str = ""
    """The log of the earlier parts, as the checkpoint has it."""


NOTHING = Earlier()


def finished_record(prepared: Prepared, reporter: Reporter) -> Record | None:
    """Return the record of a run that is finished, and say so; None where there is something to do.

    A run that other code made is stale: it is run again, unless --keep-stale says otherwise.
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
        say("note: it does not say which code made it, so it may be stale.")
    measured = record.config.measure
    for name in ("marginal", "profile"):
        if getattr(config.measure, name) and not measured.get(name):
            say(f"note: it was made without --{name}; --force runs it again with it")
    if config.measure.audit == "full" and measured.get("audit") != "full":
        say("note: one batch in ten was audited; --force runs it again and audits all")
    return record


def to_resume(prepared: Prepared, reporter: Reporter) -> Earlier:
    """Return what the run goes on from; ``NOTHING`` to start at the beginning. Nothing is written.

    Raises:
        Refused: the run was interrupted and neither --resume nor --force says what to do; there
            is nothing to resume; or the checkpoint is damaged, lacks something or is of another config.
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
        if status in ("crashed", "oom", "timeout") and prepared.checkpoint.exists():
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
    if not prepared.checkpoint.exists():
        reporter.line(f"there is no checkpoint {prepared.checkpoint} yet; the run starts at the beginning")
        return Earlier(parts=parts)
    environment = record.environment if isinstance(record, Record) else None
    if is_measured(environment) and environment.threads != torch.get_num_threads():
        reporter.line("note: another number of threads than before; sums may round differently")
    remedy = f"--force starts again and keeps the run as {prepared.run_id}.1"
    return _from_checkpoint(prepared.checkpoint, remedy, prepared, parts)


def make_room(prepared: Prepared, reporter: Reporter) -> None:
    """Set an earlier folder of the run aside, unless the run goes on in it."""
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
    """Say of which checkpoint the block refuses something, and the ``remedy``."""
    try:
        yield
    except Refused as error:
        words = str(error).rstrip(".")
        raise Refused(f"checkpoint {path} cannot be continued: {words}; {remedy}.") from error


def _refuse_another(path: Path, state: dict[str, Any], prepared: Prepared) -> None:
    """Refuse the checkpoint of another run, or of a finished one.

    Raises:
        Refused: says in which fields the runs differ.
    """
    there, here = state["identity"]["data"]["sha256"], prepared.identity["data"]["sha256"]
    if there != here:
        raise Refused(
            f"checkpoint {path} is of another text or tokenizer (vocabulary and text {there[:12]} there, "
            f"{here[:12]} here); name the data that it was trained on."
        )
    if "trainer" not in state and "model" in state:
        raise Refused(
            f"checkpoint {path} of run {state['run_id']} is of a finished run; nothing is left to do."
        )
    differing = differing_fields(state["identity"], prepared.identity)
    if differing or state["run_id"] != prepared.run_id:
        ids = f"run_id: {state['run_id']} there, {prepared.run_id} here"
        raise Refused(f"checkpoint {path} is of another run: {'; '.join(differing or [ids])}.")
    changed = stale_code(state["code"], prepared.code)
    if changed and not prepared.config.places.keep_stale:
        raise Refused(
            f"checkpoint {path} of run {state['run_id']} was made by other code: {stale_words(changed)}. "
            "--force starts again; --keep-stale continues it all the same."
        )


def _merged(first: Sequence[TimePart], second: Sequence[TimePart]) -> list[TimePart]:
    """Return the parts of a record and of a checkpoint in order, each once, as the later of the two has it.

    Of a part that was killed the checkpoint knows more; one that saved no checkpoint only the record knows.
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
    """Refuse a coupler whose class has the name of one from another file of the study.

    Raises:
        Refused: as ``refuse_another_file``.
    """
    coupler = prepared.config.model.coupler_type
    if is_file(coupler):
        records = study_records(prepared.folder.path.parent)
        refuse_another_file(coupler, prepared.code["coupler_sha256"], map(coupler_of, records))


def _nothing_to_resume(prepared: Prepared) -> str:
    """Say that no run of this config was interrupted, and how the nearest one differs."""
    message = f"no run with this config was interrupted in study {prepared.config.places.study!r}"
    ours = _comparable(prepared.record_config)
    others = [
        (differing_fields(_comparable(record.config), ours) + _ranks(record, prepared), record.run_id)
        for record in study_records(prepared.folder.path.parent)
        if record.status == "interrupted"
    ]
    if not others:
        return f"{message}, nor with another; drop --resume to start."
    differing, run_id = min(others, key=lambda other: len(other[0]))
    return f"{message}; the nearest, {run_id}, differs: {'; '.join(differing) or 'in its data or device'}."


def _ranks(record: Record, prepared: Prepared) -> list[str]:
    there = record.environment.world_size if is_measured(record.environment) else 1
    here = prepared.ranks.world_size
    return [f"{there} rank{'s' * (there > 1)} there, {here} here"] if there != here else []


def _comparable(config: Settings) -> dict[str, Any]:
    """Return the fields that count."""
    return config.model_dump(exclude={"places"})
