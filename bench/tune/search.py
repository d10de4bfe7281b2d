"""The search for the largest shape that fits: one ladder of shapes, and three rules for the next trial.

A micro-batch has a shape: rows × length. A shape either fits or does not; where a shape fits, all smaller
shapes fit too. The answer is always a shape that ran. The module is pure: the caller runs the trials, so that
tests can try every rule exhaustively.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Literal

Mode = Literal["binsearch", "power", "shape"]
Stopped = Literal["limit", "cap", "largest", "max_trials", "max_seconds"]
KNEE_SHARE = 0.95  # of the best tokens/s: larger batches than the first to reach it gain next to nothing
FREE_HERE = "are free here"  # part of the failure of a trial on a host that is short of memory
REMEDY = "lower max_seq_length, embed_dim, num_layers or num_experts, or raise --memory-budget"


@dataclass(frozen=True)
class Shape:
    """The shape of a micro-batch, which the model is given at once."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows} × {self.length}"


def ladder(lengths: Sequence[int], rows: Sequence[int]) -> list[Shape]:
    """Return the shapes from the smallest to the largest; the tokens rise with every step.

    Upwards, first the length grows with the fewest rows, then the rows grow at full length. Downwards, first
    the rows shrink, then the length.
    """
    lengths, rows = sorted(set(lengths)), sorted(set(rows))
    longer = [Shape(rows[0], length) for length in lengths]
    return longer + [Shape(more, lengths[-1]) for more in rows[1:]]


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, rising."""
    return [size for size in range(1, number + 1) if number % size == 0]


@dataclass(frozen=True)
class Trial:
    """The result of trying one shape; None for what was not measured."""

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
    """The prediction, corrected by earlier measurements."""

    @property
    def ran(self) -> bool:
        """Whether the shape fits."""
        return self.failure is None


@dataclass(frozen=True)
class Found:
    """The largest shape that ran, and how the search found it."""

    shape: Shape
    stopped: Stopped
    """What ended the search. limit: the next shape is too large. cap or largest: no larger shape may be
    tried. max_trials or max_seconds: the trials or the time ran out."""
    trials: tuple[Trial, ...]

    @property
    def trial(self) -> Trial:
        """The trial of the shape that was found."""
        return next(trial for trial in self.trials if trial.shape == self.shape)

    @property
    def knee(self) -> int | None:
        """The fewest rows that ran within 5% of the best tokens/s; None where no speed was measured."""
        speeds = {
            trial.shape.rows: trial.tokens_per_second
            for trial in self.trials
            if trial.ran and trial.tokens_per_second is not None
        }
        best = max(speeds.values(), default=0.0)
        return min((rows for rows, speed in speeds.items() if speed >= KNEE_SHARE * best), default=None)

    @property
    def of_the_moment(self) -> bool:
        """Whether a later search might find more: time, or free memory of the host, was short."""
        short = any(trial.failure is not None and FREE_HERE in trial.failure for trial in self.trials)
        return short or self.stopped == "max_seconds"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Found:
        """Return the answer that ``dataclasses.asdict`` made a dict of."""
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


def search(
    trial: Callable[[Shape], Trial],
    shapes: Sequence[Shape],
    mode: Mode = "binsearch",
    *,
    start: int = 1,
    predict: Callable[[Shape], int | None] = lambda _: None,
    limit_bytes: int = 0,
    max_trials: int = 12,
    max_seconds: float = float("inf"),
    on_trial: Callable[[Trial], object] = lambda _: None,
) -> Found:
    """Try shapes of a ladder (see ``ladder``) and return the largest shape that ran.

    A trial that is not expected to end within ``max_seconds`` is not begun.

    Args:
        trial: Runs a shape. Its exceptions come out of the search.
        shapes: The ladder.
        mode: ``power`` tries ``start`` rows, then twice as many, up to the first shape that fails; where the
            first shape fails, it halves until a shape runs. ``binsearch`` goes on between the last shape that
            ran and the first that failed, to exactly the largest that fits. ``shape`` tries the largest shape
            whose predicted peak is within ``limit_bytes``. It scales the prediction by each measurement,
            until the next shape is known not to fit.
        start: Rows of the first trial, for ``power`` and ``binsearch``.
        predict: Returns the predicted peak of a shape in bytes, None where none can be predicted.
        limit_bytes: The largest peak that fits, for ``shape``.
        max_trials: The most trials, those that failed included.
        max_seconds: The most seconds.
        on_trial: Receives each trial.

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
        if monotonic() - began + _seconds(trials, shapes[at]) > max_seconds:
            stopped = "max_seconds"
            break
        trials.append(replace(trial(shapes[at]), expected_peak_bytes=policy.expected(at)))
        policy.learn(at, trials[-1])
        on_trial(trials[-1])
    return concluded(trials, shapes, stopped)


def concluded(trials: Sequence[Trial], shapes: Sequence[Shape], stopped: Stopped) -> Found:
    """Return the answer that follows from these trials.

    Raises:
        NoFeasibleBatch: no trial ran.
    """
    ran = [trial.shape for trial in trials if trial.ran]
    if not ran:
        raise NoFeasibleBatch(trials, shapes[0])
    return Found(max(ran, key=lambda shape: shape.tokens), stopped, tuple(trials))


def _seconds(trials: Sequence[Trial], shape: Shape) -> float:
    """Return how long a trial of ``shape`` should take, by the tokens of the last trial that took steps.

    Minus infinity for the first trial, which is always begun.
    """
    begun = [trial for trial in trials if trial.micro_steps or trial.ran]  # other trials took no time
    return begun[-1].seconds * shape.tokens / begun[-1].shape.tokens if begun else float("-inf")


class _BinarySearch:
    """Tries ``start`` rows and twice as many while they run, then halves the shapes in between.

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
        """Return the expected peak of the shape at this place in bytes; None: nothing is predicted."""
        del at
        return None

    def learn(self, at: int, trial: Trial) -> None:
        """Take in the trial of the shape at this place."""
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
    """Tries ``start`` rows and twice as many while they run; where the first shape fails, half as many."""

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
    """Tries the largest shape that is predicted to fit, and corrects the prediction by each measurement.

    If the largest shape fits, it is the answer. Otherwise the peak of the answer lies in (limit − one step,
    limit].
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
        self._blind = measured is None  # memory ran out: there is no measurement to correct by
        if measured is not None and predicted is not None:
            self._correction = measured / predicted

    def next(self) -> int:
        """Return the largest place that is predicted to fit.

        Where no place is, return the place after ``low``; where nothing can be predicted, the middle place.
        A prediction takes a second, so only places along the bisection are predicted.
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
