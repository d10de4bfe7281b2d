"""Jobs one after the other: a failing one becomes a row, a late one is left out by name."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from bench.device import recover
from bench.speeding.machine import Machine
from bench.speeding.record import SpeedRecord
from bench.speeding.rows import SpeedRow
from bench.speeding.turns import failure_text


@dataclass(frozen=True)
class Job:
    """Rows that belong together. ``seconds``: what they take about, on the machine they are meant for."""

    name: str
    rows: Callable[[Machine], list[SpeedRow]]
    seconds: float = 0.0


def run_jobs(
    jobs: Sequence[Job],
    machine: Machine,
    record: SpeedRecord,
    *,
    budget: float | None,
    on_job: Callable[[str], None],
    on_row: Callable[[SpeedRow], None],
) -> None:
    """Run jobs in order into the record, which is whole after each.

    A job that would likely end after ``budget`` seconds is left out, by name; a smaller one may follow.
    """
    start = perf_counter()
    for job in jobs:
        spent = perf_counter() - start
        if budget is not None and (spent >= budget or spent + job.seconds > budget):
            record.leave_out(job.name + (f" (about {job.seconds:.0f} s)" if job.seconds else ""))
            continue
        on_job(job.name)
        rows = _rows(job, machine)
        record.add(rows, machine.to_record())
        for row in rows:
            on_row(row)
        _forget()


def _rows(job: Job, machine: Machine) -> list[SpeedRow]:
    try:
        return job.rows(machine)
    except Exception as error:
        failure = failure_text(error)
    recover()
    return [SpeedRow(case=job.name, subject=job.name, form="", device=machine.device.type, precision="fp32",
                batch=0, length=0, experts=0, width=0, layers=0, error=failure)]  # fmt: skip


def _forget() -> None:
    """Let nothing of one job weigh on the next: memory, and what was compiled for other sizes."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else a second size of a batch would be compiled for all sizes
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
