"""Is it right before it is fast: results held against the naive form in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.speeding.forms import Form, FormInputs, Result, Runner
from bench.speeding.machine import Machine, products_in
from bench.speeding.rows import SpeedRow
from bench.speeding.targets import PARITY
from bench.speeding.turns import failure_text

SLACK = 4.0
INPUTS = 2  # gradients that come before those of the parameters: of expert outputs and layer input


def largest_difference(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Return the largest absolute difference over ``scale``, by default the largest value expected.

    Raises:
        ValueError: it is no finite number.
    """
    scale = expected.abs().max() if scale is None else scale
    difference = float(((found.detach() - expected).abs() / scale.clamp(min=1e-30)).max())
    if not math.isfinite(difference):
        raise ValueError(f"the largest difference from what is expected is {difference}")
    return difference


class Parity:
    """Holds forms against ``reference()`` in float32 on the same numbers."""

    def __init__(self) -> None:
        self._expected: dict[str, Result] = {}
        self.differences: dict[str, float] = {}

    def look(self, runner: Runner, found: Result) -> None:
        """Keep the largest difference of ``found``: of the output and of every gradient.

        Gradients of parameters may be off by ``SLACK`` times more, and are taken over the largest of them
        all: a sum over tokens that all but cancels has few digits in any form.
        """
        subject = runner.form.subject
        if subject not in self._expected:
            self._expected[subject] = runner.reference_in_float32()
        output, gradients = self._expected[subject]
        parameters = [_values(one, output) for one in gradients[INPUTS:]]
        largest = SLACK * torch.stack([one.abs().max() for one in parameters]).max() if parameters else None
        scales = [None] * (1 + INPUTS) + [largest] * len(parameters)
        self.differences[runner.form.key] = max(
            largest_difference(_values(one, output), _values(other, output), scale)
            for one, other, scale in zip((found[0], *found[1]), (output, *gradients), scales, strict=True)
        )


def _values(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return a tensor in float32; a gradient that is not there is 0."""
    return like.new_zeros(()) if tensor is None else tensor.detach().float()


def parity_rows(
    forms: Sequence[Form], batch: int, machine: Machine, precisions: Sequence[str]
) -> list[SpeedRow]:
    """Run each form once in each precision; nothing is timed."""
    rows = []
    for precision in precisions:
        for form in forms:
            config, parity = form.config, Parity()
            row = SpeedRow(
                case=PARITY, subject=form.subject, form=form.name, device=machine.device.type,
                precision=precision, batch=batch, length=config.max_seq_length, experts=config.num_experts,
                width=config.embed_dim, layers=config.gnn_layers,
            )  # fmt: skip
            try:
                runner = Runner(form, FormInputs(config, batch, precision, machine.device), precision)
                with products_in(precision):
                    found = runner.step(0)
                parity.look(runner, found)
                row.largest_difference = parity.differences[form.key]
            except Exception as error:
                row.error = failure_text(error)
            rows.append(row)
    return rows
