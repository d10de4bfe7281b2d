"""A sweep in one line of shell: ``coupler=GNN,HGNN num_experts=2,4,8``.

Each word is a flag and its values, and the sweep is their product, the first flag slowest. The first
``=`` ends the flag's name. Commas separate the values; a value with commas of its own stands in double
quotes, which the shell must leave in place (``'strategy="random:k=3,m=4",ring'``), or the values are
separated by semicolons: where a word has one outside quotes, commas separate nothing, and one at the end
counts for nothing (``'strategy=random:k=3,m=4;ring'``). Spaces separate the items of a list, such as
``adam_betas``; ``true``, ``false`` and ``None`` are what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.files import refusals_name
from bench.sweeps.blocks import flag_of_a_sweep
from bench.sweeps.spec import Sweep, sweep_of
from gnnmoe.config import Refused

EXAMPLE = "coupler=GNN,HGNN num_experts=2,4,8"


def parse_shorthand(words: Sequence[str], *, seeds: int | Sequence[int] = 1, study: str = "default") -> Sweep:
    """Return the sweep that the words describe, with these seeds (10: from 0 to 9).

    Raises:
        Refused: naming the word, what is wrong and what is allowed.
    """
    with refusals_name("--sweep"):
        if not words:
            raise Refused(f"it names no flag; write {EXAMPLE}.")
        grid = {}
        for word in words:
            key, values = _read(word)
            if key in grid:
                raise Refused(f"{key} stands there twice; give all of its values at once.")
            grid[key] = values
        return sweep_of({"grid": grid, "seeds": seeds if isinstance(seeds, int) else list(seeds)}, study)


def split_values(text: str) -> list[str]:
    """Return the values that commas, or else semicolons, separate, less the double quotes.

    Raises:
        Refused: a quote is not closed, or a value is empty.
    """
    pieces = text.split('"')
    if len(pieces) % 2 == 0:
        raise Refused(f"a double quote is not closed in {text!r}.")
    separator = ";" if any(";" in piece for piece in pieces[::2]) else ","
    values, quoted = [""], [False]
    for place, piece in enumerate(pieces):
        if place % 2:
            values[-1], quoted[-1] = values[-1] + piece, True
            continue
        first, *rest = piece.split(separator)
        values[-1] += first
        values += rest
        quoted += [False] * len(rest)
    if separator == ";" and not values[-1] and not quoted[-1]:
        del values[-1]
    if not all(value or mark for value, mark in zip(values, quoted, strict=False)):
        raise Refused(f"a value is missing in {text!r}; write {EXAMPLE}.")
    return values


def _read(word: str) -> tuple[str, list[Any]]:
    """Return the flag of a word and its values, plain."""
    key, equals, text = word.partition("=")
    key = key.removeprefix("--")
    if not equals or not key:
        raise Refused(f"{word!r} is not FLAG=VALUE,VALUE; write {EXAMPLE}.")
    flag = flag_of_a_sweep(key)
    words = [value.split() if flag.is_list else value for value in split_values(text)]
    return key, [flag.plain(flag.read(each), key) for each in words]
