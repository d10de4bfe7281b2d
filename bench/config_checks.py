"""What several groups of flags check of their values."""

from __future__ import annotations

import math

from gnnmoe.config import Refused


def check_positive(config: object, *names: str) -> None:
    """Refuse a field that is 0 or negative; None passes.

    Raises:
        Refused: naming the field and its value.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise Refused(f"{name} is {value}; it must be greater than 0, and finite.")
