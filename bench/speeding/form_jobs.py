"""The jobs of the command's own flags: couplers × sizes, every form of each, or whole steps with each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from bench.check.leak_check import refuse_wrong_hypergraph, refuse_wrong_names
from bench.speeding.coupler_rows import Timing, coupler_rows
from bench.speeding.forms import compiled_name, forms_of
from bench.speeding.jobs import Job
from bench.speeding.machine import Machine
from bench.speeding.rows import SpeedRow
from bench.speeding.sizes import Size, sizes, subjects
from bench.speeding.step_rows import Variant, executed, step_rows
from bench.speeding.targets import STEPS
from gnnmoe.config import GNNMoEConfig


def form_jobs(
    config: GNNMoEConfig, couplers: str | None, sizes_text: str | None, batch: int, precision: str,
    rounds: int, compile_mode: str | None, *, whole_steps: bool = False,
) -> list[Job]:  # fmt: skip
    """Return one job for each coupler and size; for whole steps one for each size, the couplers in turn.

    Raises:
        Refused: an unknown coupler, option, strategy or size.
    """
    refuse_wrong_hypergraph(config)
    modes = () if compile_mode is None else (compile_mode,)
    by_coupler = [[(name, size) for size in sizes(sizes_text, subject, batch)]
                  for name, subject in subjects(couplers, config)]  # fmt: skip
    for _, size in chain(*by_coupler):
        refuse_wrong_names(size.config)
    if whole_steps:
        return [
            _of_steps(of_one_size, precision, rounds, modes) for of_one_size in zip(*by_coupler, strict=True)
        ]
    return [_of_forms(name, size, precision, rounds, modes) for name, size in chain(*by_coupler)]


def _of_forms(name: str, size: Size, precision: str, rounds: int, modes: Sequence[str]) -> Job:
    forms = forms_of(name, size.config, modes)

    def rows(machine: Machine) -> list[SpeedRow]:
        return coupler_rows(name, forms, size.batch, machine, precision, Timing(rounds=rounds))

    return Job(f"{name}, {size}", rows)


def _of_steps(models: Sequence[tuple[str, Size]], precision: str, rounds: int, modes: Sequence[str]) -> Job:
    size = models[0][1]
    kinds = [("", None), *((f", {compiled_name(mode)}", mode) for mode in modes)]
    variants = [Variant(f"{name}{how}", executed("auto", precision, mode), config=one.config)
                for how, mode in kinds for name, one in models]  # fmt: skip

    def rows(machine: Machine) -> list[SpeedRow]:
        return step_rows(STEPS, variants, size.config, size.batch, machine, rounds=rounds)

    return Job(f"steps, {size}", rows)
