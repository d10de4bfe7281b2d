"""The data of the page's interactive charts: loss over training, and quality against cost.

An arm is one configuration. Its x in tokens, seconds or FLOPs follows from the steps of its loss curves.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np

from bench.report import quantities
from bench.report.comparison import Comparison, ComparisonRow
from bench.report.plots.frame import Curve, Frame
from bench.report.plots.style import LIGHT
from bench.report.quantities import (
    PARAMETERS,
    PEAK_MEMORY,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    TRAINING_FLOPS,
    Quantity,
)
from bench.study.runs import Run

MOST_ARMS = 40
"""The most arms of a chart: the baseline and the best others."""
MOST_POINTS = 500
COSTS = (STEP_SECONDS, TOKENS_PER_SECOND, PEAK_MEMORY, PARAMETERS, TRAINING_FLOPS)
Arm = dict[str, Any]


def charts(study: str, comparison: Comparison) -> dict[str, Any] | None:
    """Return the data of both charts, ready for JSON; None where no run counts.

    ``costs`` are the x axes of quality against cost, as name and label. Each of the ``arms`` has its name,
    colour, dash, final loss in nats with its interval, costs by name, bits per byte and nat, and its
    ``curves`` by split: step, loss, and the tokens, seconds and FLOPs until then (None: not measured).
    """
    frame = Frame(study, comparison)
    rows = [row for row in frame.measured if row.configuration is not comparison.reference]
    rows = [row for row in comparison.rows[:1] if row.loss.n] + rows[: MOST_ARMS - 1]
    if not rows:
        return None
    arms = [_arm(frame, row) for row in rows]
    known = [[found.name, found.axis] for found in COSTS if any(arm["costs"][found.name] for arm in arms)]
    return {"arms": arms, "costs": known, "left_out": len(frame.measured) - len(rows)}


def _arm(frame: Frame, row: ComparisonRow) -> Arm:
    label, look = row.configuration.label, frame.looks.get(row.configuration.label)
    runs = list(row.configuration.counted.values())
    losses = {"training": frame.training_losses, "validation": frame.validation_losses}
    found = {split: by_label.get(label) for split, by_label in losses.items()}
    return {
        "name": frame.names[label],
        "colour": look.colour if look else LIGHT,
        "dash": {"--": [8, 4], ":": [2, 3], "-.": [8, 3, 2, 3]}.get(look.line if look else "-", []),
        "loss": row.loss.mean,
        "interval": list(row.loss.interval) if row.loss.interval else None,
        "costs": {cost.name: _cost(row, cost) for cost in COSTS},
        "bits": _mean([_bits(run) for run in runs]),
        "curves": {split: _curve(curve, runs) for split, curve in found.items() if curve is not None},
    }


def _cost(row: ComparisonRow, cost: Quantity) -> float | None:
    value = row.model[cost] if cost.of_model else row.means[cost].mean
    return None if value is None else value * cost.scale


def _bits(run: Run) -> float | None:
    """Return the bits per byte of the validation text for a loss of one nat per token."""
    bits, loss = quantities.bits_per_byte(run.record), run.loss()
    return bits / loss if bits is not None and loss else None


def _curve(curve: Curve, runs: list[Run]) -> dict[str, Any]:
    """Return a mean curve, thinned, and its x in tokens, seconds and FLOPs."""
    curve = thinned(curve)
    steps_T, loss_T = curve.steps_T, curve.mean_T
    tokens_T = np.mean([_tokens(run, steps_T) for run in runs], axis=0)
    seconds = _mean([quantities.median_step_seconds(run.record) for run in runs])
    flops = _mean([quantities.training_flops_per_token(run.record) for run in runs])
    return {
        "step": steps_T.tolist(),
        "loss": [round(loss, 5) if math.isfinite(loss) else None for loss in loss_T.tolist()],
        "tokens": tokens_T.round().astype(int).tolist() if tokens_T.any() else None,
        "step_seconds": seconds,
        "flops_per_token": flops,
    }


def thinned(curve: Curve) -> Curve:
    """Return ``MOST_POINTS`` steps of a longer curve, evenly chosen, with the first and the last."""
    steps = len(curve.steps_T)
    chosen = np.linspace(0, steps - 1, min(MOST_POINTS, steps)).round().astype(int)
    return Curve(curve.seeds, curve.steps_T[chosen], curve.values_ST[:, chosen])


def _tokens(run: Run, steps_T: np.ndarray) -> np.ndarray:
    """Return the tokens that a run has trained on until each step; 0 where no step is recorded."""
    rows = run.data.train
    if not rows:
        return np.zeros(len(steps_T))
    known = np.array([0, *(row["step"] for row in rows)])
    total = np.cumsum([0, *(row["tokens"] for row in rows)])
    return total[np.searchsorted(known, steps_T, side="right") - 1]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
