"""What a sweep is: from a TOML file to its runs, each a table of flags and a seed.

Each key of ``[grid]`` is an axis with its values as points; ``[zip]`` is one axis, with a point for each
place of its lists. The configurations are the product of the axes in the order of the file, the first
axis slowest. A ``[[union]]`` part shares what stands at the top: its own flags win over ``[base]``, the
top's axes come before its own, and both conditions count. ``where`` comes first, then ``[random]``.
Configurations that make the same run are kept once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config import FlagTable, PlacesConfig, as_flags, complete, defaults, layered, resolved
from bench.files import read_toml, refusals_name
from bench.sweeps.blocks import PART_KEYS, TOP_KEYS, Part, check_top_keys, read_part, read_seeds
from bench.sweeps.condition import Condition
from gnnmoe.config import Refused

MOST = 200_000  # configurations that are looked at, and runs
UNSET = object()


@dataclass(frozen=True)
class RunRequest:
    """One run: its flags by field, and its seed.

    The values are plain: None, numbers, text (also paths), lists. ``preset`` may be among them. The runs
    of one configuration share one table, so nobody may change it.
    """

    flags: FlagTable
    seed: int

    def arguments(self) -> list[str]:
        """Return the flags of ``python -m bench.run`` that make this run."""
        return as_flags({**self.flags, "seed": self.seed})


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep: seeds outermost, so that an interrupted one leaves complete comparisons."""

    study: str
    seeds: list[int]
    runs: list[RunRequest]
    match: Any = None
    """As the file says it, not checked."""
    hypotheses: Any = None
    """As the file says them, not checked."""


def load_sweep(path: Path, seeds: int | None = None) -> Sweep:
    """Return the sweep of a TOML file, with ``seeds`` in place of its own where given.

    Its study is the file's name where it gives none.

    Raises:
        Refused: naming the file, the key, what is wrong and what is allowed.
    """
    entries = read_toml("sweep", path)
    with refusals_name(f"sweep {path}"):
        if not entries:
            raise Refused(f"it is empty; allowed: {', '.join(TOP_KEYS)}.")
        return sweep_of(entries if seeds is None else {**entries, "seeds": seeds}, study=path.stem)


def sweep_of(entries: FlagTable, study: str) -> Sweep:
    """Return the sweep that a file's entries describe; ``study`` is its name where they give none.

    Raises:
        Refused: naming the key, what is wrong and what is allowed.
    """
    check_top_keys(entries)
    name = entries.get("study", study)
    if not isinstance(name, str):
        raise Refused(f"study is {name!r}; it must be text.")
    PlacesConfig(study=name)  # refuses what is no folder name
    seeds = read_seeds(entries.get("seeds", 1))
    top = read_part({key: value for key, value in entries.items() if key in PART_KEYS})
    configurations = _put_together(top, _union(entries.get("union")))
    if len(configurations) * len(seeds) > MOST:
        raise Refused(
            f"{len(configurations)} configurations × {len(seeds)} seeds; a sweep has at most {MOST} runs."
        )
    runs = [RunRequest(flags, seed) for seed in seeds for flags in configurations]
    return Sweep(name, list(seeds), runs, entries.get("match"), entries.get("hypotheses"))


def _union(tables: Any) -> list[Part]:
    """Return the parts of ``[[union]]``; none where there is no union."""
    if tables is None:
        return []
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise Refused("union must be a list of parts, each with the heading [[union]].")
    if not tables:
        raise Refused("union has no parts: a sweep of zero runs; give it some, or leave it out.")
    parts = []
    for number, table in enumerate(tables, 1):
        with refusals_name(f"[[union]] part {number}"):
            parts.append(read_part(table, "union."))
    return parts


def _put_together(top: Part, parts: list[Part]) -> list[FlagTable]:
    """Return the configurations of all parts, each once, as ``[random]`` at the top draws them.

    Raises:
        Refused: there is none; two conditions or axes contradict each other; there are too many.
    """
    found: list[FlagTable] = []
    for number, part in enumerate(parts or [Part()], 1):
        with refusals_name(f"[[union]] part {number}") if parts else nullcontext():
            found += _configurations(top, part)
    if not found:
        assert top.where is not None
        looked = sum(_size(top, part) for part in parts or [Part()])
        raise Refused(_none_left(top.where, looked))
    return _drawn(_distinct(found), top.draw, top.base)


def _configurations(top: Part, part: Part) -> list[FlagTable]:
    swept = {name for axis in top.axes for name in axis[0]}
    for name in sorted(swept & part.places.keys()):
        raise Refused(f"{part.places[name]} and {top.places[name]} are the same flag; keep one of them.")
    if _size(top, part) > MOST:
        raise Refused(f"{_size(top, part)} configurations; a sweep looks at no more than {MOST}.")
    pairs = itertools.product(_product(top.base, top.axes), _product(part.base, part.axes))
    found = [layered(shared, own) for shared, own in pairs]
    if top.where:
        found = _kept(found, top.where)
    if part.where and found:
        looked, found = len(found), _kept(found, part.where)
        if not found:
            raise Refused(_none_left(part.where, looked))
    return _drawn(_distinct(found), part.draw, top.base) if part.draw and found else found


def _size(*parts: Part) -> int:
    return math.prod(len(axis) for part in parts for axis in part.axes)


def _product(base: FlagTable, axes: list[list[FlagTable]]) -> list[FlagTable]:
    points = [base]
    for axis in axes:
        points = [{**point, **flags} for point in points for flags in axis]
    return points


def _kept(found: Iterable[FlagTable], where: Condition) -> list[FlagTable]:
    with refusals_name("where"):
        return [flags for flags in found if where.holds(complete(flags))]


def _none_left(where: Condition, looked: int) -> str:
    return f"a sweep of zero runs: where = {where.text!r} removes all {looked} configurations."


def _distinct(found: Iterable[FlagTable]) -> list[FlagTable]:
    """Return the configurations that make different runs, the first of each."""
    kept: dict[Hashable, FlagTable] = {}
    usual = defaults()
    for flags in found:
        values = resolved(flags)
        kept.setdefault(
            frozenset(
                (name, tuple(value) if isinstance(value, list) else value)
                for name, value in values.items()
                if value != usual[name]
            ),
            flags,
        )
    return list(kept.values())


def _drawn(found: list[FlagTable], draw: tuple[int, int] | None, base: FlagTable) -> list[FlagTable]:
    """Return n configurations drawn at random, in their order.

    The hash of its flags and the seed decides about each: a larger n keeps what a smaller one drew, and
    so does another value in ``base``, the flags that all share.

    Raises:
        Refused: there are fewer.
    """
    if draw is None:
        return found
    count, seed = draw
    if count > len(found):
        raise Refused(
            f"[random]: n is {count}; it must be at most {len(found)}, all configurations there are."
        )

    def rank(flags: FlagTable) -> bytes:
        own = {name: value for name, value in flags.items() if base.get(name, UNSET) != value}
        return hashlib.sha256(f"{seed} {json.dumps(own, sort_keys=True)}".encode()).digest()

    chosen = {id(flags) for flags in sorted(found, key=rank)[:count]}
    return [flags for flags in found if id(flags) in chosen]
