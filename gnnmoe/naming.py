"""Messages about names: what is allowed, and which one was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return one sentence that refuses ``name``, lists what is allowed and names the nearest."""
    names = sorted(allowed)
    by_lower = {candidate.lower(): candidate for candidate in names}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    hint = f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}; allowed: {', '.join(names) or 'none'}.{hint}"
