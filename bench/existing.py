"""What to do where a run has been asked for before: show it, go on with it, or keep it and start again."""

from __future__ import annotations

from typing import Any

import torch

from bench.measure.environment import code_sha256
from bench.measure.quantity import is_measured
from bench.prepare import Prepared
from bench.progress import Reporter
from bench.records.foreign import visible
from bench.records.schema import Record
from bench.records.store import interrupted_records
from bench.training.checkpoint import differing_fields, load_checkpoint


def finished_record(prepared: Prepared, reporter: Reporter) -> Record | None:
    """Return the record of a run that is finished, and say so; None where there is something to do."""
    record, config = prepared.folder.read_record(), prepared.config
    if record is None or config.places.force:
        return None
    allowed = record["status"] == "gate_failed" and config.measure.allow_failed_gate
    if not (record["status"] == "ok" or (allowed and is_measured(record["speed"]))):
        return None
    reporter.console.print(f"run {prepared.run_id} is finished; --force runs it again. Its record:")
    if record["environment"]["code_sha256"] != code_sha256(config.model.coupler_type):
        reporter.console.print("note: it was made with another state of the code", markup=False)
    measured = record["config"]["measure"]
    for name in ("marginal", "profile"):
        if getattr(config.measure, name) and not measured.get(name):
            reporter.console.print(f"note: it was made without --{name}; --force runs it again with it")
    return record


def state_to_resume(prepared: Prepared, reporter: Reporter) -> dict[str, Any] | None:
    """Return the checkpoint to go on from, or None to start at the beginning.

    Raises:
        ValueError: the run was interrupted and neither --resume nor --force says what to do; there
            is nothing to resume; or the checkpoint is damaged or of another config.
    """
    places = prepared.config.places
    if places.resume_checkpoint is not None:
        return _checked(load_checkpoint(places.resume_checkpoint), prepared)
    record = prepared.folder.read_record()
    status = None if record is None else record["status"]
    if places.resume and status is None:
        raise ValueError(_nothing_to_resume(prepared))
    if places.resume and status != "interrupted":
        raise ValueError(
            f"run {prepared.run_id} ended as {status}; only interrupted runs are continued. "
            "Without --resume it runs again, and the earlier record is kept."
        )
    if status == "interrupted" and not places.resume and not places.force:
        raise ValueError(
            f"run {prepared.run_id} was interrupted; --resume continues it, "
            f"--force starts again and keeps it as {prepared.run_id}.1."
        )
    if not places.resume or places.force:
        return None
    if not prepared.checkpoint.exists():
        reporter.line("it was interrupted before its first checkpoint; it starts at the beginning")
        return None
    if record and record["environment"]["threads"] != torch.get_num_threads():
        reporter.line("note: another number of threads than before; sums may round differently")
    return _checked(load_checkpoint(prepared.checkpoint), prepared)


def make_room(prepared: Prepared, reporter: Reporter) -> None:
    """Set an earlier folder of the run aside, unless the run goes on in it."""
    record, places = prepared.folder.read_record(), prepared.config.places
    going_on = (places.resume or places.resume_checkpoint) and not places.force
    if record is None or (going_on and record["status"] == "interrupted"):
        return
    kept = prepared.folder.set_aside()
    reporter.line(f"an earlier record ({visible(record['status'])}) is kept at {kept}")


def _checked(state: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
    there, here = state["identity"]["data"]["sha256"], prepared.identity["data"]["sha256"]
    if there != here:
        raise ValueError(
            f"the checkpoint is of another text or tokenizer (vocabulary and text {there[:12]} there, "
            f"{here[:12]} here); name the data that it was trained on."
        )
    if "trainer" not in state:
        raise ValueError(
            f"the checkpoint of run {state['run_id']} is of a finished run; nothing is left to do."
        )
    differing = differing_fields(state["identity"], prepared.identity)
    if differing:
        raise ValueError(f"the checkpoint is of another run: {'; '.join(differing)}.")
    return state


def _nothing_to_resume(prepared: Prepared) -> str:
    """Say that no run of this config was interrupted, and how the nearest one differs."""
    message = f"no run with this config was interrupted in study {prepared.config.places.study!r}"
    ours = _comparable(prepared.record_config)
    others = [
        (differing_fields(_comparable(record["config"]), ours) + _ranks(record, prepared), record["run_id"])
        for record in interrupted_records(prepared.folder.path.parent)
    ]
    if not others:
        return f"{message}, nor with another; drop --resume to start."
    differing, run_id = min(others, key=lambda other: len(other[0]))
    return f"{message}; the nearest, {run_id}, differs: {'; '.join(differing) or 'in its data or device'}."


def _ranks(record: Record, prepared: Prepared) -> list[str]:
    there, here = record["environment"].get("world_size", 1), prepared.ranks.world_size
    return [f"{there} rank{'s' * (there > 1)} there, {here} here"] if there != here else []


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    return {group: fields for group, fields in config.items() if group != "places"}
