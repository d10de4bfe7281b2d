"""Numbers as people read them; an empty text where nothing was measured."""

from __future__ import annotations

from bench.record import MINUS as MINUS
from bench.record import Time, exp_or_infinity, number

Interval = tuple[float, float]


def signed(value: float | None, digits: int = 4) -> str:
    """Return a number with its sign: +0.0123."""
    return number(value, digits, sign="+")


def percent(ratio: float | None, digits: int = 1) -> str:
    """Return how much a ratio is above or below 1: +12.3 %."""
    return "" if ratio is None else f"{signed(100 * (ratio - 1), digits)} %"


def share(value: float | None) -> str:
    """Return a share of 1 in percent: 31.4 %."""
    return "" if value is None else f"{100 * value:.1f} %"


def span(interval: Interval | None, digits: int = 1, sign: bool = False) -> str:
    """Return an interval: [1.0, 2.0]."""
    show = signed if sign else number
    return "" if interval is None else f"[{', '.join(show(end, digits) for end in interval)}]"


def perplexities(interval: Interval | None) -> Interval | None:
    """Return exp of an interval of losses in nats."""
    return None if interval is None else (exp_or_infinity(interval[0]), exp_or_infinity(interval[1]))


def mebibytes(value: float | None, sign: bool = False) -> str:
    """Return bytes in MiB: 160.5 MiB."""
    return "" if value is None else f"{(signed if sign else number)(value / 2**20, 1)} MiB"


def millions(value: float | None) -> str:
    """Return a count in millions: 15.58 M."""
    return "" if value is None else f"{number(value / 1e6, 2)} M"


def p_value(value: float | None) -> str:
    """Return a p value with three digits behind the point, as < 0.001 where it is smaller."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 run, 2 runs."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def in_parts(time: Time) -> str:
    """Return `` in 2 parts`` of a record's ``time``, where the run was stopped and resumed; else nothing."""
    parts = len(time.parts)
    return f" in {parts} parts" if parts > 1 else ""
