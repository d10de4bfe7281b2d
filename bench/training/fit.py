"""The fit of length and micro-batch to a memory limit before training: predict, run, correct."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bench.training.batch_size import NoFeasibleBatch, Trial
from bench.training.shape import Shape

Predict = Callable[[Shape], int | None]
Run = Callable[[Shape], Trial]
Ended = Literal["limit", "largest", "max_trials", "max_seconds"]


@dataclass(frozen=True)
class Tried:
    """One shape: what was expected of it, corrected by what was measured before, and what it did."""

    shape: Shape
    expected_bytes: int | None
    trial: Trial

    def to_record(self) -> dict[str, Any]:
        """Return it ready for JSON, flat."""
        trial = asdict(self.trial)
        return {"length": self.shape.length, "expected_peak_bytes": self.expected_bytes, **trial}


@dataclass(frozen=True)
class Fit:
    """The largest shape on the ladder that ran within the limit."""

    shape: Shape
    limit_bytes: int
    stopped: Ended
    """limit: the next shape was tried and is too large; largest: there is no next one."""
    tries: tuple[Tried, ...]

    @property
    def found(self) -> Tried:
        """The try of the shape that was found."""
        return next(tried for tried in self.tries if tried.shape == self.shape)

    def to_record(self) -> dict[str, Any]:
        """Return what was found and how, ready for JSON."""
        found = self.found
        return {
            "length": self.shape.length, "micro_batch_size": self.shape.rows,
            "predicted_peak_bytes": found.trial.predicted_peak_bytes,
            "expected_peak_bytes": found.expected_bytes,
            "measured_peak_bytes": found.trial.measured_peak_bytes,
            "limit_bytes": self.limit_bytes, "stopped": self.stopped,
            "trials": [tried.to_record() for tried in self.tries],
        }  # fmt: skip


def fit(
    predict: Predict,
    run: Run,
    shapes: Sequence[Shape],
    *,
    limit_bytes: int,
    max_trials: int = 12,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Fit:
    """Return the last of ``shapes`` (rising, see ``ladder``) whose measured peak is within the limit.

    Each time the largest shape that is predicted to fit is run, and the prediction scaled by measured
    over predicted, until the shape after the last that fits is known to be too large. So the peak of
    the answer lies in (limit − one step, limit], unless the largest shape fits or trials or time end.

    Raises:
        NoFeasibleBatch: none that was tried fits.
    """
    low, high, correction, blind = -1, len(shapes), 1.0, False
    tries: list[Tried] = []
    start, stopped = clock(), None
    while high - low > 1:
        out_of_time = max_seconds is not None and tries and clock() - start >= max_seconds
        if out_of_time or len(tries) == max_trials:
            stopped = "max_seconds" if out_of_time else "max_trials"
            break
        at = _choose(predict, shapes, low, high, limit_bytes / correction, blind)
        predicted = predict(shapes[at])
        expected = None if predicted is None else round(predicted * correction)
        trial = run(shapes[at])
        tries.append(Tried(shapes[at], expected, trial))
        low, high = (at, high) if trial.ran else (low, at)
        blind = trial.measured_peak_bytes is None  # memory ran out: nothing to correct by
        if trial.measured_peak_bytes is not None and predicted is not None:
            correction = trial.measured_peak_bytes / predicted
    if low < 0:
        raise NoFeasibleBatch([tried.trial for tried in tries], shapes[0].rows)
    ended: Ended = stopped or ("largest" if low == len(shapes) - 1 else "limit")
    return Fit(shapes[low], limit_bytes, ended, tuple(tries))


def _choose(predict: Predict, shapes: Sequence[Shape], low: int, high: int, limit: float, blind: bool) -> int:
    """Return the largest of the shapes between ``low`` and ``high`` that is predicted to fit.

    The one after ``low`` where none is; the middle one where nothing can be predicted.
    """
    if blind or predict(shapes[low + 1]) is None:
        return (low + high) // 2
    between = range(low + 1, high)
    fitting = bisect_right(between, limit, key=lambda at: predict(shapes[at]) or 0)
    return max(low + fitting, low + 1)
