"""Is it right before it is fast: results held against the naive form in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bench.speeding.forms import Form, Inputs, Runner
from bench.speeding.machine import Machine, products_in
from bench.speeding.rows import Row
from bench.speeding.targets import PARITY
from bench.speeding.turns import failure_text


def largest_difference(found: Tensor, expected: Tensor, *, elementwise: bool = False) -> float:
    """Return the largest absolute difference over the largest value, or each over its own (``elementwise``).

    Raises:
        ValueError: it is no finite number.
    """
    scale = expected.abs() if elementwise else expected.abs().max()
    difference = float(((found.detach() - expected).abs() / scale.clamp(min=1e-30)).max())
    if not math.isfinite(difference):
        raise ValueError(f"the largest difference from what is expected is {difference}")
    return difference


class Parity:
    """Holds forms against ``reference()`` in float32 on the same numbers."""

    def __init__(self) -> None:
        self._expected: dict[str, tuple[Tensor, Tensor]] = {}
        self.differences: dict[str, float] = {}

    def look(self, runner: Runner, found: tuple[Tensor, Tensor]) -> None:
        """Keep the largest difference of ``found``, the output and the gradient of the first inputs."""
        subject = runner.form.subject
        if subject not in self._expected:
            self._expected[subject] = runner.reference_in_float32()
        self.differences[runner.form.key] = max(
            largest_difference(one.float(), other)
            for one, other in zip(found, self._expected[subject], strict=True)
        )


def parity_rows(forms: Sequence[Form], batch: int, machine: Machine, precisions: Sequence[str]) -> list[Row]:
    """Run each form once in each precision; nothing is timed."""
    rows = []
    for precision in precisions:
        for form in forms:
            config, parity = form.config, Parity()
            row = Row(
                case=PARITY, subject=form.subject, form=form.name, device=machine.device.type,
                precision=precision, batch=batch, length=config.max_seq_length, experts=config.num_experts,
                width=config.embed_dim, layers=config.gnn_layers,
            )  # fmt: skip
            try:
                runner = Runner(form, Inputs(config, batch, precision, machine.device), precision)
                with products_in(precision):
                    found = runner.step(0)
                parity.look(runner, found)
                row.largest_difference = parity.differences[form.key]
            except Exception as error:
                row.error = failure_text(error)
            rows.append(row)
    return rows
