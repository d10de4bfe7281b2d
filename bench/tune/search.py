"""The search for the largest shape that fits: pure, so that every rule of it can be tried exhaustively.

What a trial does is the caller's business. Here stands which shapes of a ladder are tried, and what is
answered: always a shape that ran. A shape either fits or does not; where it fits, all smaller shapes fit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any, Literal

from bench.tune.shape import Shape

Mode = Literal["binsearch", "power", "shape"]
Stopped = Literal["limit", "cap", "largest", "max_trials", "max_seconds"]
KNEE_SHARE = 0.95  # of the best tokens/s: larger batches than the first to reach it gain next to nothing
FREE_HERE = "are free here"  # why a trial was not run on a host that is short of memory
REMEDY = "lower max_seq_length, embed_dim, num_layers or num_experts, or raise --memory-budget"


@dataclass(frozen=True)
class Trial:
    """What one shape did; None where it was not measured."""

    shape: Shape
    failure: str | None = None
    """Why the shape does not fit; None: it ran."""
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    tokens_per_second: float | None = None
    micro_steps: int = 0
    """Forward and backward passes that were begun."""
    seconds: float = 0.0
    expected_peak_bytes: int | None = None
    """The prediction, corrected by what was measured before."""

    @property
    def ran(self) -> bool:
        """Whether the shape fits."""
        return self.failure is None


@dataclass(frozen=True)
class Found:
    """The largest shape that ran, and how it was found."""

    shape: Shape
    stopped: Stopped
    """What ended the search: limit, the next shape is too large; cap or largest, there is no next shape that
    may be tried; or trials or time ran out."""
    trials: tuple[Trial, ...]

    @property
    def trial(self) -> Trial:
        """The trial of the shape that was found."""
        return next(trial for trial in self.trials if trial.shape == self.shape)

    @property
    def knee(self) -> int | None:
        """The fewest rows that ran within 5 % of the best tokens/s; None where no speed was measured."""
        speeds = {trial.shape.rows: trial.tokens_per_second for trial in self.trials
                  if trial.ran and trial.tokens_per_second is not None}  # fmt: skip
        best = max(speeds.values(), default=0.0)
        return min((rows for rows, speed in speeds.items() if speed >= KNEE_SHARE * best), default=None)

    @property
    def of_the_moment(self) -> bool:
        """Whether another time might give more: it ended for want of time, or of free memory of the host."""
        short = any(trial.failure is not None and FREE_HERE in trial.failure for trial in self.trials)
        return short or self.stopped == "max_seconds"

    def to_json(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Found:
        """Return what ``to_json`` wrote down."""
        trials = (Trial(**trial | {"shape": Shape(**trial["shape"])}) for trial in found["trials"])
        return cls(Shape(**found["shape"]), found["stopped"], tuple(trials))


class SearchFailed(RuntimeError):
    """A search ended without an answer."""

    trials: tuple[Trial, ...] = ()


class NoFeasibleBatch(SearchFailed):
    """No shape that was tried fits; the message has the smallest peak seen and what to lower."""

    def __init__(self, trials: Sequence[Trial], smallest: Shape) -> None:
        super().__init__(_nothing_fits(trials, smallest.rows))
        self.trials, self.smallest = tuple(trials), smallest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.trials, self.smallest)


def search(
    trial: Callable[[Shape], Trial],
    shapes: Sequence[Shape],
    mode: Mode = "binsearch",
    *,
    start: int = 1,
    predict: Callable[[Shape], int | None] = lambda _: None,
    limit_bytes: int = 0,
    max_trials: int = 12,
    max_seconds: float | None = None,
    on_trial: Callable[[Trial], object] = lambda _: None,
) -> Found:
    """Try shapes of a ladder (rising, see ``ladder``) and return the largest that ran.

    ``power`` tries ``start`` rows, then twice as many, … up to the first that fail; where the first fail,
    it halves until some run. ``binsearch`` goes on between the last that ran and the first that failed,
    to exactly the largest that fits. ``shape`` tries the largest shape that ``predict`` says to stay within
    ``limit_bytes``, and scales the prediction by what was measured, until the next shape is known not to
    fit. A trial that is not expected to end within ``max_seconds`` is not begun. ``on_trial`` is told of
    each. What ``trial`` raises comes out again.

    Raises:
        NoFeasibleBatch: no shape that was tried ran.
    """
    if mode == "shape":
        policy = _Prediction(shapes, predict, limit_bytes)
    else:
        policy = (_Power if mode == "power" else _BinarySearch)(shapes, start)
    trials: list[Trial] = []
    began = monotonic()
    while (stopped := policy.stopped()) is None:
        if len(trials) == max_trials:
            stopped = "max_trials"
            break
        at = policy.next()
        if max_seconds is not None and monotonic() - began + _seconds(trials, shapes[at]) > max_seconds:
            stopped = "max_seconds"
            break
        trials.append(replace(trial(shapes[at]), expected_peak_bytes=policy.expected(at)))
        policy.learn(at, trials[-1])
        on_trial(trials[-1])
    return concluded(trials, shapes, stopped)


def concluded(trials: Sequence[Trial], shapes: Sequence[Shape], stopped: Stopped) -> Found:
    """Return what these trials show.

    Raises:
        NoFeasibleBatch: none of them ran.
    """
    ran = [trial.shape for trial in trials if trial.ran]
    if not ran:
        raise NoFeasibleBatch(trials, shapes[0])
    return Found(max(ran, key=lambda shape: shape.tokens), stopped, tuple(trials))


class _BinarySearch:
    """Tries ``start`` rows and twice as many while they run, then halves what lies between.

    ``low`` is the place of the largest shape that ran, ``high`` of the smallest that failed.
    """

    top: Stopped = "cap"
    """Why a search ends whose largest shape ran."""

    def __init__(self, shapes: Sequence[Shape], start: int = 1) -> None:
        self.shapes, self.low, self.high = shapes, -1, len(shapes)
        self._first = max(0, self._last_up_to(start * shapes[0].length))

    def next(self) -> int:
        """Return the place of the shape to try."""
        if self.high < len(self.shapes):
            return (self.low + self.high) // 2
        if self.low < 0:
            return self._first
        return max(self._last_up_to(2 * self.shapes[self.low].tokens), self.low + 1)

    def expected(self, at: int) -> int | None:
        """Return the peak in bytes that is expected of the shape at this place; None: nothing is."""
        del at
        return None

    def learn(self, at: int, trial: Trial) -> None:
        """Take in what the shape at this place did."""
        self.low, self.high = (at, self.high) if trial.ran else (self.low, at)

    def stopped(self) -> Stopped | None:
        """Return why the search ends here; None where it goes on."""
        if self.high - self.low > 1:
            return None
        return self.top if self.low == len(self.shapes) - 1 else "limit"

    def _last_up_to(self, tokens: int) -> int:
        """Return the place of the largest shape of at most so many tokens, −1 where there is none."""
        return bisect_right(self.shapes, tokens, key=lambda shape: shape.tokens) - 1


class _Power(_BinarySearch):
    """Tries ``start`` rows and twice as many while they run; where the first fail, half as many."""

    def next(self) -> int:
        if self.low < 0 and self.high < len(self.shapes):
            half = self._last_up_to(self.shapes[self.high].tokens // 2)
            return half if half >= 0 else self.high - 1
        return super().next()

    def stopped(self) -> Stopped | None:
        if self.low >= 0 and self.high < len(self.shapes):
            return "limit"
        if self.low >= 0 and 2 * self.shapes[self.low].tokens > self.shapes[-1].tokens:
            return "cap"
        return super().stopped()


class _Prediction(_BinarySearch):
    """Tries the largest shape that is predicted to fit, and corrects the prediction by what was measured.

    So the peak of the answer lies in (limit − one step, limit], unless the largest shape fits.
    """

    top: Stopped = "largest"

    def __init__(
        self, shapes: Sequence[Shape], predict: Callable[[Shape], int | None], limit_bytes: int
    ) -> None:
        super().__init__(shapes)
        self._predict, self._limit = predict, limit_bytes
        self._correction, self._blind = 1.0, False

    def expected(self, at: int) -> int | None:
        predicted = self._predict(self.shapes[at])
        return None if predicted is None else round(predicted * self._correction)

    def learn(self, at: int, trial: Trial) -> None:
        super().learn(at, trial)
        measured, predicted = trial.measured_peak_bytes, self._predict(trial.shape)
        self._blind = measured is None  # memory ran out: nothing to correct by
        if measured is not None and predicted is not None:
            self._correction = measured / predicted

    def next(self) -> int:
        """Return the largest place that is predicted to fit.

        The one after ``low`` where none is; the middle one where nothing can be predicted. A prediction
        takes a second, so none is asked for but along the bisection.
        """
        limit, between = self._limit / self._correction, range(self.low + 1, self.high)
        if self.low >= 0 and not self._blind and self._bytes(between[0]) > limit:
            return between[0]  # as a rule: the bisection before this one ended here
        middle = between[len(between) // 2]
        if self._blind or self._predict(self.shapes[middle]) is None:
            return middle
        return max(self.low + bisect_right(between, limit, key=self._bytes), between[0])

    def _bytes(self, at: int) -> int:
        return self._predict(self.shapes[at]) or 0


def _seconds(trials: Sequence[Trial], shape: Shape) -> float:
    """Return how long a trial of ``shape`` is expected to take, by the tokens of the last that was run.

    The first is always begun: minus infinity.
    """
    begun = [trial for trial in trials if trial.micro_steps or trial.ran]  # others took no time
    return begun[-1].seconds * shape.tokens / begun[-1].shape.tokens if begun else float("-inf")


def _nothing_fits(trials: Sequence[Trial], smallest: int) -> str:
    tried = min(trials, key=lambda trial: trial.shape.tokens)
    peaks = [
        trial.predicted_peak_bytes if trial.measured_peak_bytes is None else trial.measured_peak_bytes
        for trial in trials
    ]
    known = [peak for peak in peaks if peak is not None]
    seen = f"smallest peak seen: {min(known) / 2**20:,.1f} MiB" if known else "no peak could be read"
    rows = tried.shape.rows
    untried = "" if rows == smallest else f"; {smallest} was not tried: raise --tune-max-trials"
    return (
        f"no batch fits: of {len(trials)} sizes tried none ran, the smallest was {rows} "
        f"({tried.failure}); {seen}; {REMEDY}{untried}."
    )
