"""The blocks of a sweep file, read and checked: [base], [grid], [zip], where, [random] and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from bench.config import PRESET, Flag, FlagTable, allowed, flag_named, run_flags
from bench.files import refusals_name
from bench.sweeps.condition import Condition, parse_condition
from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name

PART_KEYS = ("base", "grid", "zip", "where", "random")
TOP_KEYS = (*PART_KEYS, "union", "seeds", "study", "match", "hypotheses")
OWNED = {
    **dict.fromkeys(
        ("results_dir", "resume", "force", "keep_stale", "run_name", "quiet", "reuse_check"),
        "the sweep sets it itself",
    ),
    **dict.fromkeys(("resume_checkpoint", "checkpoint_dir"), "every run of a sweep has its own checkpoint"),
    "seed": "the seeds of all runs stand at the top of the file, as in seeds = 10",
    "study": 'the study of all runs stands at the top of the file, as in study = "name"',
}  # flags that no sweep may set, and why
SEEDS = "a number of seeds (10 means 0 to 9) or a list of different whole numbers from 0 on"
MOST_SEEDS = 10_000


@dataclass
class Part:
    """What the blocks of the top of a file, or of one union part, say."""

    base: FlagTable = field(default_factory=dict)
    axes: list[list[FlagTable]] = field(default_factory=list)
    """One for each key of [grid] and one for [zip]: the flags of each of its points."""
    places: dict[str, str] = field(default_factory=dict)
    """The key and the block that say a flag, by field."""
    where: Condition | None = None
    draw: tuple[int, int] | None = None
    """How many configurations, and the seed of the draw."""


@cache
def sweep_flags() -> dict[str, Flag]:
    """Return every flag that a sweep may set, by each of its names with underscores."""
    known = {name: flag for name, flag in run_flags().items() if flag.field not in OWNED}
    return {"preset": PRESET, **known}


def flag_of_a_sweep(key: str) -> Flag:
    """Return a flag that a sweep may set, by any of its names, with hyphens or underscores.

    Raises:
        Refused: there is no such flag, or no sweep may set it.
    """
    name = key.replace("-", "_")
    if key in ("seeds", "where"):
        raise Refused(f"{key} is no flag and cannot stand here; put it above the first [block].")
    if name in OWNED:
        raise Refused(f"{key} cannot be set here: {OWNED[name]}.")
    return flag_named(key, sweep_flags())


def read_part(entries: FlagTable, under: str = "") -> Part:
    """Return what the blocks of the top, or with ``under="union."`` of a union part, say.

    Raises:
        Refused: naming the block, the key, what is wrong and what is allowed.
    """
    part = Part()
    for key, value in entries.items():
        block = f"[{under}{key}]"
        if key == "where":
            part.where = _condition(value)
        elif key not in PART_KEYS:
            hint = " It stands at the top of the file, for all parts." if key in TOP_KEYS else _flag_hint(key)
            raise Refused(unknown_name("key", key, PART_KEYS) + hint)
        elif not isinstance(value, dict):
            raise Refused(f"{key} is {value!r}; it must be a block, {block}.")
        elif key == "random":
            part.draw = _draw(block, value)
        else:
            _read_flags(part, key, block, value)
    return part


def check_top_keys(entries: FlagTable) -> None:
    """Refuse a key that no sweep file has.

    Raises:
        Refused: naming the key and the nearest one.
    """
    for key in entries:
        if key not in TOP_KEYS:
            raise Refused(unknown_name("key", key, TOP_KEYS) + _flag_hint(key))


def read_seeds(value: Any) -> Sequence[int]:
    """Return the seeds that ``seeds`` says: the first so many, or those listed.

    Raises:
        Refused: saying what is wrong with them and what is allowed.
    """
    numbers = value if isinstance(value, list) else [value]
    if any(type(number) is not int for number in numbers):
        raise Refused(f"seeds is {value!r}; it must be {SEEDS}.")
    if not numbers or value == 0:
        raise Refused(f"seeds is {value!r}: a sweep of zero runs; it must be {SEEDS}.")
    if len(numbers) > MOST_SEEDS or (not isinstance(value, list) and value > MOST_SEEDS):
        raise Refused(f"seeds gives more than {MOST_SEEDS} seeds; a sweep has at most so many.")
    negative = [number for number in numbers if number < 0]
    if negative:
        raise Refused(f"seeds is {value!r}: {negative[0]} is negative; it must be {SEEDS}.")
    double = [number for place, number in enumerate(numbers) if number in numbers[:place]]
    if double:
        raise Refused(f"seeds is {value!r}: {double[0]} stands there twice; it must be {SEEDS}.")
    return numbers if isinstance(value, list) else range(value)


def _flag_hint(key: str) -> str:
    return " It is a flag: put it into [base]." if key.replace("-", "_") in sweep_flags() else ""


def _condition(value: Any) -> Condition:
    if not isinstance(value, str):
        raise Refused(f"where is {value!r}; it must be text: a condition on flags.")
    with refusals_name("where"):
        return parse_condition(value, {name: flag.field for name, flag in sweep_flags().items()}, OWNED)


def _draw(block: str, entries: FlagTable) -> tuple[int, int]:
    for key in entries:
        if key not in ("n", "seed"):
            raise Refused(f"{block}: {unknown_name('key', key, ('n', 'seed'))}")
    if "n" not in entries:
        raise Refused(f"{block} has no n; say how many configurations to draw, as in n = 20.")
    for key, value, least in (("n", entries["n"], 1), ("seed", entries.get("seed", 0), 0)):
        if type(value) is not int or value < least:
            raise Refused(f"{block}: {key} is {value!r}; it must be a whole number of at least {least}.")
    return entries["n"], entries.get("seed", 0)


def _read_flags(part: Part, kind: str, block: str, entries: FlagTable) -> None:
    """Add the flags of [base], [grid] or [zip] to ``part``."""
    if not entries and kind != "base":
        raise Refused(f"{block} is empty; give it flags with lists of values, or leave it out.")
    columns: FlagTable = {}
    for key, value in entries.items():
        with refusals_name(block):
            flag = flag_of_a_sweep(key)
            columns[flag.field] = flag.plain(value, key) if kind == "base" else _values(flag, key, value)
        place = f"{key} in {block}"
        other = part.places.setdefault(flag.field, place)
        if other != place:
            raise Refused(f"{place} and {other} are the same flag; keep one of them.")
    if kind == "base":
        part.base = columns
    elif kind == "grid":
        part.axes += [[{name: value} for value in values] for name, values in columns.items()]
    else:
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            said = ", ".join(f"{key} has {len(value)}" for key, value in entries.items())
            raise Refused(f"{block}: the lists must be equally long; {said}.")
        rows = zip(*columns.values(), strict=True)
        part.axes.append([dict(zip(columns, row, strict=True)) for row in rows])


def _values(flag: Flag, key: str, values: Any) -> list[Any]:
    if not isinstance(values, list):
        shown = "a table" if isinstance(values, dict) else repr(values)
        raise Refused(
            f"{key} is {shown}; it must be a list of values, each {allowed(flag.hint)}; "
            "what all runs share is for [base]."
        )
    if not values:
        raise Refused(f"{key} is an empty list; give it at least one value, {allowed(flag.hint)}.")
    return [flag.plain(value, f"item {place} of {key}") for place, value in enumerate(values, 1)]
