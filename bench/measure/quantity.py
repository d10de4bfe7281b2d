"""How a quantity that was not measured is written down: never as 0."""

from __future__ import annotations

from typing import Any


def not_measured(reason: str) -> dict[str, Any]:
    """Return the null of a quantity, with the reason."""
    return {"value": None, "reason": reason}


def is_measured(quantity: Any) -> bool:
    """Say whether ``quantity`` is a reading rather than the null of ``not_measured``."""
    return quantity is not None and not (isinstance(quantity, dict) and set(quantity) == {"value", "reason"})
