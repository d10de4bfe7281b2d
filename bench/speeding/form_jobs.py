"""The jobs of the command's own flags: couplers × sizes, every form of each, or whole steps with each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bench.gate import refuse_wrong_hypergraph, refuse_wrong_names
from bench.speeding.coupler_rows import Timing, coupler_rows
from bench.speeding.forms import Form, compiled_name, forms_of
from bench.speeding.jobs import Job
from bench.speeding.machine import Machine
from bench.speeding.rows import Row
from bench.speeding.sizes import LETTERS, Size, sizes, subjects
from bench.speeding.step_rows import Variant, executed, step_rows
from bench.speeding.targets import STEPS
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


def step_jobs(
    config: GNNMoEConfig, couplers: str | None, sizes_text: str | None, batch: int, precision: str,
    rounds: int, compile_mode: str | None,
) -> list[Job]:  # fmt: skip
    """Return one job for each size: whole steps of the model with each coupler, in turn.

    Raises:
        ValueError: an unknown coupler, option, strategy or size.
    """
    refuse_wrong_hypergraph(config)
    executions = {"": executed("auto", precision)}
    if compile_mode is not None:
        executions[f", {compiled_name(compile_mode)}"] = executed("auto", precision, compile_mode)
    models = subjects(couplers, config)
    jobs = []
    for size in sizes(sizes_text, config, batch):
        variants = [
            Variant(f"{name}{how}", execution, config=_at(size, model))
            for how, execution in executions.items()
            for name, model in models
        ]
        jobs.append(Job(f"steps, {size}", partial(_steps, variants, size, rounds)))
    return jobs


def _at(size: Size, model: GNNMoEConfig) -> GNNMoEConfig:
    """Return a model's config at a size; refuses what does not go together."""
    values = {field: getattr(size.config, field) for field in LETTERS.values() if hasattr(model, field)}
    found = replace(model, **values)
    refuse_wrong_names(found)
    return found


def _steps(variants: list[Variant], size: Size, rounds: int, machine: Machine) -> list[Row]:
    return step_rows(STEPS, variants, size.config, size.batch, machine, rounds=rounds)


def _rows(
    name: str, forms: list[Form], size: Size, precision: str, rounds: int, machine: Machine
) -> list[Row]:
    return coupler_rows(name, forms, size.batch, machine, precision, Timing(rounds=rounds))
