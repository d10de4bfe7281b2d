"""One measurement with its units, and what follows from the others beside it. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bench.measure.rates import paired_ratios, tokens_per_second, utilisation
from gnnmoe.config import Refused

TOLERANCE = {"fp32": 1e-5, "tf32": 3e-2, "bf16": 3e-2}
"""How far, of its largest value, a result may be from another form's or from float32's."""
LOOPS = ("loop", "reference()")
"""The forms that go one by one; where there are both, the first is what ratios are taken to."""
PYG = "pyg"


@dataclass(kw_only=True)
class SpeedRow:
    """One form at one size. What was not measured is None, and ``remark`` or ``error`` says why."""

    case: str
    """What is compared: the rows of a case were timed in turn in one process."""
    subject: str
    """The coupler, or what else is timed."""
    form: str
    device: str
    precision: str
    batch: int
    length: int
    experts: int
    width: int
    layers: int
    """Of the coupler where it is timed alone, else of the model."""
    forward_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Forward + backward of a coupler, or a whole step: every timed one."""
    first_seconds: float | None = None
    """The first call by itself, with what is compiled in it."""
    peak_bytes: int | None = None
    """Peak of tensors alive: of a coupler beyond its inputs and parameters, of a step all."""
    saved_bytes: int | None = None
    """What the forward keeps for the backward, beyond inputs, parameters and the output."""
    flops: int | None = None
    """Of forward + backward of this form, by formula."""
    matrix_flops_per_second: float | None = None
    """The best of large matrix products on this device in this process."""
    copy_bytes_per_second: float | None = None
    """Of a large copy, read and written, likewise."""
    floor_bytes: int | None = None
    """What any form must move; ``floor_seconds`` is for these and the fewest FLOPs of the forms timed."""
    floor_seconds: float | None = None
    roofline_seconds: float | None = None
    largest_difference: float | None = None
    """Of output and gradients, over their largest value, from the form that is to be equalled."""
    remark: str = ""
    error: str | None = None

    @property
    def tokens(self) -> int:
        """B·L."""
        return self.batch * self.length

    @property
    def median(self) -> float | None:
        """The median of ``seconds``, None where there are none."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def bytes_floor_seconds(self) -> float | None:
        """The floor by bytes alone, the same for all couplers of a size."""
        return _over(self.floor_bytes, self.copy_bytes_per_second)

    @property
    def wrong(self) -> bool:
        """Whether it computes something else: then its time means nothing."""
        found = self.largest_difference
        return found is not None and not found <= TOLERANCE[self.precision]

    @property
    def size(self) -> str:
        """The sizes in words."""
        return f"E {self.experts}, D {self.width}, B {self.batch}, L {self.length}"


Rows = Sequence[SpeedRow]


def ratio(over: SpeedRow, under: SpeedRow) -> float | None:
    """Return how much longer ``over`` takes: the median over rounds, or the medians' where rounds differ."""
    if over.median is None or under.median is None or over.wrong or under.wrong:
        return None
    if len(over.seconds) == len(under.seconds):
        return statistics.median(paired_ratios(over.seconds, under.seconds))
    return over.median / under.median


def spread(over: SpeedRow, under: SpeedRow) -> str:
    """Return the 10th and 90th percentile of the ratio over rounds, in words; empty for a round or two."""
    if len(over.seconds) != len(under.seconds) or len(over.seconds) < 3:
        return ""
    ratios = paired_ratios(over.seconds, under.seconds)
    low, high = np.percentile(ratios, [10, 90])
    return f"{low:.3g} to {high:.3g}"


def beside(row: SpeedRow, rows: Rows, forms: Sequence[str]) -> SpeedRow | None:
    """Return the first of these forms that was timed beside ``row``: same case, subject and size."""
    same = {other.form: other for other in rows
            if (other.case, other.subject, other.size) == (row.case, row.subject, row.size)}  # fmt: skip
    return next((same[form] for form in forms if form in same), None)


def derived(row: SpeedRow, rows: Rows) -> dict[str, float | None]:
    """Return what follows from a row and those beside it, by column."""
    median, loop, pyg = row.median, beside(row, rows, LOOPS), beside(row, rows, (PYG,))
    forward = statistics.median(row.forward_seconds) if row.forward_seconds else None
    return {
        "forward_ms": _times(1e3, forward),
        "median_ms": _times(1e3, median),
        "floor_ms": _times(1e3, row.floor_seconds),
        "roofline_ms": _times(1e3, row.roofline_seconds),
        "over_floor": _over(median, row.floor_seconds),
        "over_roofline": _over(median, row.roofline_seconds),
        "loop_over_this": ratio(loop, row) if loop else None,
        "pyg_over_this": ratio(pyg, row) if pyg else None,
        "tokens_per_second": (
            tokens_per_second([row.tokens] * len(row.seconds), row.seconds) if row.seconds else None
        ),
        "mfu": mfu(row),
    }


def mfu(row: SpeedRow) -> float | None:
    """Return the share of the matrix rate that a median step reaches, None where it is not known."""
    if row.error or row.median is None or row.flops is None or row.matrix_flops_per_second is None:
        return None
    return utilisation(row.flops / row.median, row.matrix_flops_per_second)


def cells(row: SpeedRow, rows: Rows) -> dict[str, Any]:
    """Return a row and what follows from it, flat; lists of times as their number."""
    found = asdict(row)
    found["rounds"] = len(found.pop("seconds"))
    found.pop("forward_seconds")
    return {**found, **derived(row, rows)}


def row_from(found: dict[str, Any]) -> SpeedRow:
    """Return the row that a record holds.

    Raises:
        Refused: it is of another version.
    """
    try:
        return SpeedRow(**found)
    except TypeError as error:
        raise Refused(f"a row is of another version ({error})") from error


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _over(value: float | None, under: float | None) -> float | None:
    return None if value is None or not under else value / under
