"""How a quantity is written down: never as 0 where it was not measured, and so that it can be read."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

MINUS = "−"
READABLE = 1e9
"""A number as large as this, unless it is a count, is shown in scientific notation."""


def not_measured(reason: str) -> dict[str, Any]:
    """Return the null of a quantity, with the reason."""
    return {"value": None, "reason": reason}


def is_measured(quantity: Any) -> bool:
    """Say whether ``quantity`` is a reading rather than the null of ``not_measured``."""
    return quantity is not None and not (isinstance(quantity, dict) and set(quantity) == {"value", "reason"})


def exp_or_infinity(nats: float) -> float:
    """Return exp(nats), such as the perplexity of a loss; infinity where no float is so large."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def number(value: float | None, digits: int = 1, sign: str = "") -> str:
    """Return a number as people read it: 1,234.5, from 1e9 on 1.2e+09, and inf; empty where there is none.

    A count (of type int) has all its digits. ``sign`` "+" also shows the sign of a positive number.
    """
    if value is None:
        return ""
    large = not isinstance(value, Integral) and READABLE <= abs(value) < math.inf
    return format(value, f"{sign}.1e" if large else f"{sign},.{digits}f").replace("-", MINUS)
