"""The jobs of the command's own flags: couplers × sizes, every form of each."""

from __future__ import annotations

from functools import partial

from bench.gate import refuse_wrong_hypergraph, refuse_wrong_names
from bench.speeding.coupler_rows import Timing, coupler_rows
from bench.speeding.forms import Form, forms_of
from bench.speeding.jobs import Job
from bench.speeding.machine import Machine
from bench.speeding.rows import Row
from bench.speeding.sizes import Size, sizes, subjects
from gnnmoe.config import GNNMoEConfig


def form_jobs(
    config: GNNMoEConfig, couplers: str | None, sizes_text: str | None, batch: int, precision: str,
    rounds: int, compile_mode: str | None,
) -> list[Job]:  # fmt: skip
    """Return one job for each coupler and size.

    Raises:
        ValueError: an unknown coupler, option, strategy or size.
    """
    refuse_wrong_hypergraph(config)
    modes = () if compile_mode is None else (compile_mode,)
    jobs = []
    for name, subject in subjects(couplers, config):
        for size in sizes(sizes_text, subject, batch):
            refuse_wrong_names(size.config)
            forms = forms_of(name, size.config, modes)
            jobs.append(Job(f"{name}, {size}", partial(_rows, name, forms, size, precision, rounds)))
    return jobs


def _rows(
    name: str, forms: list[Form], size: Size, precision: str, rounds: int, machine: Machine
) -> list[Row]:
    return coupler_rows(name, forms, size.batch, machine, precision, Timing(rounds=rounds))
