"""The fit of length and micro-batch to a memory limit before training: predict, run, correct."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, Literal

from bench.training.batch_size import NoFeasibleBatch, Trial
from bench.training.shape import Shape

Predict = Callable[[Shape], int | None]
Run = Callable[[Shape], Trial]
OnTry = Callable[["Tried"], object]
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
    on_try: OnTry = lambda _: None,
) -> Fit:
    """Return the last of ``shapes`` (rising, see ``ladder``) whose measured peak is within the limit.

    Each time the largest shape that is predicted to fit is run, and the prediction scaled by measured
    over predicted, until the shape after the last that fits is known to be too large. So the peak of
    the answer lies in (limit − one step, limit], unless the largest shape fits or trials or time end.
    A trial that is not expected to end within ``max_seconds`` is not begun. ``on_try`` is told of each.

    Raises:
        NoFeasibleBatch: none that was tried fits.
    """
    low, high, correction, blind = -1, len(shapes), 1.0, False
    tries: list[Tried] = []
    start, stopped = monotonic(), None
    while high - low > 1:
        at = _choose(predict, shapes, low, high, limit_bytes / correction, blind)
        expected_end = monotonic() - start + _seconds(tries, shapes[at])
        out_of_time = max_seconds is not None and tries and expected_end > max_seconds
        if out_of_time or len(tries) == max_trials:
            stopped = "max_seconds" if out_of_time else "max_trials"
            break
        predicted = predict(shapes[at])
        expected = None if predicted is None else round(predicted * correction)
        trial = run(shapes[at])
        tries.append(Tried(shapes[at], expected, trial))
        on_try(tries[-1])
        low, high = (at, high) if trial.ran else (low, at)
        blind = trial.measured_peak_bytes is None  # memory ran out: nothing to correct by
        if trial.measured_peak_bytes is not None and predicted is not None:
            correction = trial.measured_peak_bytes / predicted
    ended: Ended = stopped or ("largest" if low == len(shapes) - 1 else "limit")
    return concluded(tries, shapes, limit_bytes, ended)


def concluded(tries: Sequence[Tried], shapes: Sequence[Shape], limit_bytes: int, stopped: Ended) -> Fit:
    """Return what these tries show.

    Raises:
        NoFeasibleBatch: none of them ran.
    """
    ran = [tried.shape for tried in tries if tried.trial.ran]
    if not ran:
        raise NoFeasibleBatch([tried.trial for tried in tries], shapes[0].rows)
    return Fit(max(ran, key=lambda shape: shape.tokens), limit_bytes, stopped, tuple(tries))


def _seconds(tries: Sequence[Tried], shape: Shape) -> float:
    """Return how long a trial of ``shape`` is expected to take, by the tokens of the last that was run."""
    begun = [tried for tried in tries if tried.trial.micro_steps or tried.trial.ran]  # others took no time
    return begun[-1].trial.seconds * shape.tokens / begun[-1].shape.tokens if begun else 0.0


def _choose(predict: Predict, shapes: Sequence[Shape], low: int, high: int, limit: float, blind: bool) -> int:
    """Return the largest of the shapes between ``low`` and ``high`` that is predicted to fit.

    The one after ``low`` where none is; the middle one where nothing can be predicted. A prediction
    takes a second, so none is asked for but along the bisection.
    """
    if low >= 0 and not blind and (predict(shapes[low + 1]) or 0) > limit:
        return low + 1  # as a rule: the bisection before this one ended here
    between = range(low + 1, high)
    middle = between[len(between) // 2]
    if blind or predict(shapes[middle]) is None:
        return middle
    fitting = bisect_right(between, limit, key=lambda at: predict(shapes[at]) or 0)
    return max(low + fitting, low + 1)
