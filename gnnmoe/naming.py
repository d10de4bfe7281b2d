"""Messages about names: what is allowed, and which one was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return one sentence that refuses ``name``, lists what is allowed and names the nearest."""
    names = sorted(allowed)
    return f"unknown {kind} {name!r}; allowed: {', '.join(names) or 'none'}.{nearest_name(name, names)}"


def nearest_name(name: object, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the name that is nearest, or nothing where none is near."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(allowed)}
    nearest = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
