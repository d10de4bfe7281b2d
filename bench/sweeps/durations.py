"""Durations as people write them."""

from __future__ import annotations

import re

from gnnmoe.config import Refused

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(name: str, text: str | None) -> float | None:
    """Return a duration in seconds.

    Raises:
        Refused: it is not a number with s, m or h, or not greater than 0.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?)([smh]?)", text.strip())
    seconds = float(found[1]) * UNITS[found[2] or "s"] if found else 0.0
    if seconds <= 0:
        raise Refused(f"{name} is {text!r}; write a duration such as 90s, 9m or 1.5h.")
    return seconds
