"""The search for the largest batch that fits: pure, so that every rule of it can be tried exhaustively.

What a trial does is the caller's business; here is which sizes are tried, and what is answered. The answer
is always a size that ran. A size either fits or does not, and all smaller ones fit where it does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, Literal, get_args

from gnnmoe.config import Refused

Mode = Literal["binsearch", "power"]
Stopped = Literal["limit", "cap", "max_trials", "max_seconds"]
KNEE_SHARE = 0.95  # of the best tokens/s: larger batches than the first to reach it gain next to nothing
FREE_HERE = "are free here"  # why a trial was not run on a host that is short of memory
REMEDY = "lower max_seq_length, embed_dim, num_layers or num_experts, or raise --memory-budget"


@dataclass(frozen=True)
class Trial:
    """What one size did; None where it was not measured."""

    size: int
    failure: str | None = None
    """Why the size does not fit; None: it ran."""
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    tokens_per_second: float | None = None
    micro_steps: int = 0
    """Forward and backward passes that were begun."""
    seconds: float = 0.0

    @property
    def ran(self) -> bool:
        """Whether the size fits."""
        return self.failure is None


@dataclass(frozen=True)
class SearchResult:
    """The largest size that ran, and how it was found."""

    size: int
    knee: int | None
    """The smallest size that ran within 5 % of the best tokens/s; None where no speed was measured."""
    mode: Mode
    cap: int
    stopped: Stopped
    """What ended the search: the limit was found, the cap fits, or trials or time ran out."""
    trials: tuple[Trial, ...]

    @property
    def of_the_moment(self) -> bool:
        """Whether another time might give more: it ended for want of time, or of free memory of the host."""
        short = any(trial.failure is not None and FREE_HERE in trial.failure for trial in self.trials)
        return short or self.stopped == "max_seconds"

    def to_record(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self) | {"trials": [asdict(trial) for trial in self.trials]}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> SearchResult:
        """Return what ``to_record`` wrote down."""
        return cls(**{**record, "trials": tuple(Trial(**trial) for trial in record["trials"])})


class NoFeasibleBatch(RuntimeError):
    """No size that was tried fits; the message has the smallest peak seen and what to lower."""

    def __init__(self, trials: Sequence[Trial], smallest: int) -> None:
        super().__init__(_nothing_fits(trials, smallest))
        self.trials, self.smallest = tuple(trials), smallest

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.trials, self.smallest)


def memory_limit(budget_bytes: int, target: float) -> int:
    """Return the bytes that a trial's peak may reach: the only place where the safety factor enters.

    Raises:
        Refused: the target lies outside (0, 1].
    """
    if not 0.0 < target <= 1.0:
        raise Refused(f"memory_target is {target}; it must lie in (0, 1].")
    return int(budget_bytes * target)


def largest_allowed(maximum: int | None, epoch_samples: int, min_steps: int, world_size: int = 1) -> int:
    """Return the cap of a search: the user's maximum, and ``min_steps`` updates in the smallest epoch.

    Raises:
        Refused: the smallest epoch has too few samples for any batch.
    """
    most = epoch_samples // (world_size * min_steps)
    if most < 1:
        raise Refused(
            f"the smallest epoch serves {epoch_samples} blocks, too few for {min_steps} updates on "
            f"{world_size} rank{'s' * (world_size > 1)}; use more data or lower min_steps_per_epoch."
        )
    return most if maximum is None else min(maximum, most)


def search(
    trial: Callable[[int], Trial],
    *,
    mode: Mode = "binsearch",
    init_val: int = 1,
    max_trials: int = 12,
    cap: int,
    among: Sequence[int] | None = None,
    max_seconds: float | None = None,
) -> SearchResult:
    """Try sizes and return the largest that ran, none above ``cap``.

    ``power`` tries init_val, 2·init_val, … up to the first that fails; ``binsearch`` goes on between the
    last that ran and the first that failed, to exactly the largest that fits. The first trial is
    ``init_val``, or the cap where that is smaller; where it fails, ``power`` halves until one runs.
    ``among``: the only sizes that may be tried, rising (such as the divisors of a batch; default: all).
    A trial that is not expected to end within ``max_seconds`` is not begun. What ``trial`` raises
    comes out again.

    Raises:
        NoFeasibleBatch: no size that was tried ran.
        Refused: an unknown mode, a number below 1, or an ``init_val`` that is not among the sizes.
    """
    plan = _Plan(mode, _sizes(cap, among), init_val, max_trials)
    trials: list[Trial] = []
    start = monotonic()
    while (stopped := plan.stopped(len(trials))) is None:
        ran = [trial for trial in trials if trial.micro_steps or trial.ran]  # others took no time
        if ran and max_seconds is not None:
            expected = ran[-1].seconds * plan.size / ran[-1].size
            if monotonic() - start + expected > max_seconds:
                stopped = "max_seconds"
                break
        trials.append(trial(plan.size))
        plan.learn(trials[-1].ran)
    return concluded(trials, mode, plan.sizes, stopped)


def concluded(trials: Sequence[Trial], mode: Mode, sizes: Sequence[int], stopped: Stopped) -> SearchResult:
    """Return what these trials show.

    Raises:
        NoFeasibleBatch: none of them ran.
    """
    ran = [trial.size for trial in trials if trial.ran]
    if not ran:
        raise NoFeasibleBatch(trials, sizes[0])
    return SearchResult(max(ran), knee(trials), mode, sizes[-1], stopped, tuple(trials))


def knee(trials: Sequence[Trial]) -> int | None:
    """Return the smallest size that ran within 5 % of the best tokens/s; None without a speed."""
    speeds = {t.size: t.tokens_per_second for t in trials if t.ran and t.tokens_per_second is not None}
    if not speeds:
        return None
    return min(size for size, speed in speeds.items() if speed >= KNEE_SHARE * max(speeds.values()))


class _Plan:
    """Which size is next: ``low`` is the place of the largest that ran, ``high`` of the least that failed."""

    def __init__(self, mode: Mode, sizes: Sequence[int], init_val: int, max_trials: int) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; it must be {' or '.join(get_args(Mode))}.")
        if max_trials < 1 or init_val < 1:
            raise Refused(f"max_trials {max_trials} and init_val {init_val} must be 1 or more.")
        self.mode, self.sizes, self.max_trials = mode, sizes, max_trials
        first = min(init_val, sizes[-1])
        self.at = _last_up_to(sizes, first)
        if self.at < 0 or sizes[self.at] != first:
            nearest = min(sizes, key=lambda size: abs(size - first))
            raise Refused(f"init_val is {init_val}, which is not among the sizes; the nearest is {nearest}.")
        self.low, self.high = -1, len(sizes)

    @property
    def size(self) -> int:
        return self.sizes[self.at]

    def learn(self, ran: bool) -> None:
        """Take in whether the size at ``at`` ran, and move on to the next."""
        if ran:
            self.low = self.at
        else:
            self.high = self.at
        if self.low < 0 and self.mode == "power":
            half = _last_up_to(self.sizes, self.size // 2)
            self.at = half if half >= 0 else self.at - 1
        elif self.high == len(self.sizes):
            self.at = max(_last_up_to(self.sizes, self.size * 2), self.at + 1)
        else:
            self.at = (self.low + self.high) // 2

    def stopped(self, done: int) -> Stopped | None:
        """Return why the search ends after so many trials; None where it goes on."""
        if self.low == len(self.sizes) - 1:
            return "cap"
        between = self.mode == "power" and self.low >= 0 and self.high < len(self.sizes)
        if self.high - self.low == 1 or self.high == 0 or between:
            return "limit"
        if self.mode == "power" and self.low >= 0 and 2 * self.sizes[self.low] > self.sizes[-1]:
            return "cap"
        return "max_trials" if done == self.max_trials else None


def _sizes(cap: int, among: Sequence[int] | None) -> Sequence[int]:
    if cap < 1:
        raise ValueError(f"the cap of a search is {cap}; it must be 1 or more.")
    sizes = range(1, cap + 1) if among is None else [size for size in among if size <= cap]
    if not sizes:
        raise Refused(f"none of the sizes that may be tried is {cap} or less.")
    return sizes


def _last_up_to(sizes: Sequence[int], most: int) -> int:
    """Return the place of the largest size that is ``most`` or less, −1 where there is none."""
    return bisect_right(sizes, most) - 1


def _nothing_fits(trials: Sequence[Trial], smallest: int) -> str:
    tried = min(trials, key=lambda trial: trial.size)
    peaks = [
        trial.predicted_peak_bytes if trial.measured_peak_bytes is None else trial.measured_peak_bytes
        for trial in trials
    ]
    known = [peak for peak in peaks if peak is not None]
    seen = f"smallest peak seen: {min(known) / 2**20:,.1f} MiB" if known else "no peak could be read"
    untried = "" if tried.size == smallest else f"; {smallest} was not tried: raise --tune-max-trials"
    return (
        f"no batch fits: of {len(trials)} sizes tried none ran, the smallest was {tried.size} "
        f"({tried.failure}); {seen}; {REMEDY}{untried}."
    )
