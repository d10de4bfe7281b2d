"""What a sweep is: its flags, and from a TOML file or a line of shell to its runs.

A sweep file has blocks. Each key of ``[grid]`` is an axis with its values as points. ``[zip]`` is one axis,
with a point for each place of its lists. The configurations are the product of the axes in the order of the
file; the first axis changes slowest. A ``[[union]]`` part shares the blocks at the top of the file: its own
flags win over ``[base]``, its axes come after the axes of the top, and both conditions count. ``where``
comes first, then ``[random]``. Of configurations that make the same run, the first stays.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import math
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro
from simpleeval import DEFAULT_OPERATORS, EvalWithCompoundTypes, InvalidExpression

from bench.config import (
    PRESET,
    Count,
    Flag,
    FlagTable,
    Place,
    PlacesConfig,
    Texts,
    allowed,
    complete,
    defaults,
    flag_named,
    flags,
    layered,
    resolved,
    run_flags,
    seconds_of,
)
from bench.files import read_toml, refusals_name
from gnnmoe.config import Refused, brief, nearest_name, unknown_name

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
MOST = 200_000  # configurations that are looked at, and runs
UNSET = object()
EXAMPLE = "coupler=GNN,HGNN num_experts=2,4,8"


@flags
class SweepConfig:
    """Run every configuration of a sweep file, or of --sweep, with every seed. The same command continues a
    stopped sweep: it skips finished runs and resumes interrupted runs. Exit status: 0 all ok, 1 a run failed,
    2 wrong input, 130 stopped."""

    file: Annotated[Place | None, tyro.conf.Positional] = None
    """The sweep file (TOML)."""
    sweep: Annotated[Texts, tyro.conf.arg(metavar="FLAG=VALUE,VALUE …")] = ()
    """In place of a file: flags and their values, such as coupler=GNN,HGNN num_experts=2,4,8."""
    seeds: Count | None = None
    """Number of seeds, from seed 0 (default: the seeds of the file, or 1)."""
    match: str | None = None
    """Choose the width of the experts so that all models have equal cost: "params HGNN" means as many
    parameters as with HGNN. Also flops, memory (predicted, per training step) and time (measured here)."""
    dry_run: bool = False
    """Print the plan and run nothing."""
    plan: bool = False
    """Print the plan with the expected peak memory and time of each configuration. This takes a few seconds
    per configuration."""
    retry: Literal["failed", "oom", "all"] | None = None
    """Run again the failed runs (crashed, diverged, timeout, check_failed), the runs that ran out of memory,
    or both."""
    force: bool = False
    """Run everything again. Earlier records are kept as run_id.1."""
    keep_stale: bool = False
    """Keep or continue runs of an earlier version of the code. Without this flag, they run again."""
    fail_fast: bool = False
    """Stop at the first run that fails."""
    wait: bool = False
    """Wait until another sweep of the same study has ended. Without this flag, the sweep is refused."""
    time_budget: str | None = None
    """Start no run that is expected to end later than this: 90s, 9m, 1.5h."""
    run_timeout: str | None = None
    """Stop a run that takes longer than this: 90s, 9m, 1.5h."""
    slots: Count | None = None
    """Runs at the same time (default: one per GPU; on a CPU one per core, each with one thread; on a Ray
    cluster as many as fit; on Slurm 64 in the queue)."""
    executor: str = "local"
    """local (this machine), ray or slurm. All machines of a cluster must have this folder, Python and the
    results at the same paths."""
    devices_per_run: Count = 1
    """Devices per run, by torchrun: GPUs with cuda, else processes on the CPU."""
    cpus_per_run: Count | None = None
    """On a cluster: cores per run, shared by its devices as threads (default: 1 per CPU process, 4 per
    GPU)."""
    results_dir: Place = Path("results")
    """Folder of all results."""
    study: str | None = None
    """Name of the study (default: the name of the file)."""
    data_dir: Place | None = None
    """Folder of the text (default: the environment variable GNNMOE_DATA_DIR)."""
    data_source: Literal["auto", "folder", "hub", "embedded"] = "auto"
    """As for bench.run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """As for bench.run. On a cluster: cuda, or cpu (auto)."""

    def __post_init__(self) -> None:
        seconds_of("time_budget", self.time_budget)
        seconds_of("run_timeout", self.run_timeout)


@dataclass(frozen=True)
class RunRequest:
    """One run: its flags by field, and its seed.

    The values are plain: None, numbers, text (also paths), lists. ``preset`` may be among them. The runs
    of one configuration share one table, so nobody may change it.
    """

    flags: FlagTable
    seed: int


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep: seeds outermost, so that an interrupted sweep leaves complete comparisons."""

    study: str
    seeds: list[int]
    runs: list[RunRequest]
    match: Any = None
    """As the file says it, not checked."""
    hypotheses: Any = None
    """As the file says them, not checked."""


# --- a line of shell ------------------------------------------------------------------------------


def parse_shorthand(words: Sequence[str], *, seeds: int | Sequence[int] = 1, study: str = "default") -> Sweep:
    """Return the sweep of a line such as ``coupler=GNN,HGNN num_experts=2,4,8``, with these seeds.

    Each word is a flag and its values. The sweep is their product; the first flag changes slowest. The
    first ``=`` ends the name of the flag. Commas separate the values. A value that contains commas stands
    in double quotes, which the shell must leave in place (``'strategy="random:k=3,m=4",ring'``). Or
    semicolons separate the values: with a semicolon outside quotes, commas separate nothing, and a last
    semicolon counts for nothing (``'strategy=random:k=3,m=4;ring'``). Spaces separate the items of a list,
    such as ``adam_betas``. ``true``, ``false`` and ``None`` have their usual meaning.

    Raises:
        Refused: naming the word, what is wrong and what is allowed.
    """
    with refusals_name("--sweep"):
        if not words:
            raise Refused(f"it names no flag; write {EXAMPLE}.")
        grid = {}
        for word in words:
            key, values = _read_word(word)
            if key in grid:
                raise Refused(f"{key} stands there twice; give all of its values at once.")
            grid[key] = values
        return sweep_of({"grid": grid, "seeds": seeds if isinstance(seeds, int) else list(seeds)}, study)


def _read_word(word: str) -> tuple[str, list[Any]]:
    """Return the flag of a word and its values, plain."""
    key, equals, text = word.partition("=")
    key = key.removeprefix("--")
    if not equals or not key:
        raise Refused(f"{brief(word)} is not FLAG=VALUE,VALUE; write {EXAMPLE}.")
    flag = flag_of_a_sweep(key)
    words = [value.split() if flag.is_list else value for value in split_values(text)]
    return key, [flag.plain(flag.read(each), key) for each in words]


def split_values(text: str) -> list[str]:
    """Return the values that commas or semicolons separate, without the double quotes.

    Raises:
        Refused: a quote is not closed, or a value is empty.
    """
    pieces = text.split('"')
    if len(pieces) % 2 == 0:
        raise Refused(f"a double quote is not closed in {brief(text)}.")
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
        raise Refused(f"a value is missing in {brief(text)}; write {EXAMPLE}.")
    return values


# --- a file ---------------------------------------------------------------------------------------


def load_sweep(path: Path, seeds: int | None = None) -> Sweep:
    """Return the sweep of a TOML file; ``seeds`` replaces the seeds of the file.

    The study has the name of the file where the file names no study.

    Raises:
        Refused: naming the file, the key, what is wrong and what is allowed.
    """
    entries = read_toml("sweep", path)
    with refusals_name(f"sweep {path}"):
        if not entries:
            raise Refused(f"it is empty; allowed: {', '.join(TOP_KEYS)}.")
        return sweep_of(entries if seeds is None else {**entries, "seeds": seeds}, study=path.stem)


def sweep_of(entries: FlagTable, study: str) -> Sweep:
    """Return the sweep that the entries of a file describe; ``study`` is its name where they give none.

    Raises:
        Refused: naming the key, what is wrong and what is allowed.
    """
    for key in entries:
        if key not in TOP_KEYS:
            raise Refused(unknown_name("key", key, TOP_KEYS) + _flag_hint(key))
    name = entries.get("study", study)
    if not isinstance(name, str):
        raise Refused(f"study is {brief(name)}; it must be text.")
    PlacesConfig(study=name)  # refuses what is no folder name
    seeds = read_seeds(entries.get("seeds", 1))
    top = read_blocks({key: value for key, value in entries.items() if key in PART_KEYS})
    configurations = _put_together(top, _union(entries.get("union")))
    if len(configurations) * len(seeds) > MOST:
        raise Refused(
            f"{len(configurations)} configurations × {len(seeds)} seeds; a sweep has at most {MOST} runs."
        )
    runs = [RunRequest(flags, seed) for seed in seeds for flags in configurations]
    return Sweep(name, list(seeds), runs, entries.get("match"), entries.get("hypotheses"))


def read_seeds(value: Any) -> Sequence[int]:
    """Return the seeds that ``seeds`` gives: the first so many, or the listed ones.

    Raises:
        Refused: saying what is wrong with them and what is allowed.
    """
    numbers = value if isinstance(value, list) else [value]
    if any(type(number) is not int for number in numbers):
        raise Refused(f"seeds is {brief(value)}; it must be {SEEDS}.")
    if not numbers or value == 0:
        raise Refused(f"seeds is {brief(value)}: a sweep of zero runs; it must be {SEEDS}.")
    if len(numbers) > MOST_SEEDS or (not isinstance(value, list) and value > MOST_SEEDS):
        raise Refused(f"seeds gives more than {MOST_SEEDS} seeds; a sweep has at most so many.")
    negative = [number for number in numbers if number < 0]
    if negative:
        raise Refused(f"seeds is {brief(value)}: {brief(negative[0])} is negative; it must be {SEEDS}.")
    double = [number for place, number in enumerate(numbers) if number in numbers[:place]]
    if double:
        raise Refused(f"seeds is {brief(value)}: {brief(double[0])} stands there twice; it must be {SEEDS}.")
    return numbers if isinstance(value, list) else range(value)


# --- its blocks -----------------------------------------------------------------------------------


@dataclass
class Blocks:
    """The blocks at the top of a file, or of one union part."""

    base: FlagTable = field(default_factory=dict)
    axes: list[list[FlagTable]] = field(default_factory=list)
    """One axis for each key of [grid] and one for [zip]: the flags of each of its points."""
    places: dict[str, str] = field(default_factory=dict)
    """The key and the block that set a flag, by field of the flag."""
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


def _flag_hint(key: str) -> str:
    return " It is a flag: put it into [base]." if key.replace("-", "_") in sweep_flags() else ""


def _union(tables: Any) -> list[Blocks]:
    """Return the blocks of each ``[[union]]`` part; an empty list where there is no union."""
    if tables is None:
        return []
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise Refused("union must be a list of parts, each with the heading [[union]].")
    if not tables:
        raise Refused("union has no parts: a sweep of zero runs; give it some, or leave it out.")
    parts = []
    for number, table in enumerate(tables, 1):
        with refusals_name(f"[[union]] part {number}"):
            parts.append(read_blocks(table, "union."))
    return parts


def read_blocks(entries: FlagTable, under: str = "") -> Blocks:
    """Return the blocks at the top of a file, or with ``under="union."`` of a union part.

    Raises:
        Refused: naming the block, the key, what is wrong and what is allowed.
    """
    blocks = Blocks()
    for key, value in entries.items():
        block = f"[{under}{key}]"
        if key == "where":
            if not isinstance(value, str):
                raise Refused(f"where is {brief(value)}; it must be text: a condition on flags.")
            blocks.where = Condition(value)
        elif key not in PART_KEYS:
            hint = " It stands at the top of the file, for all parts." if key in TOP_KEYS else _flag_hint(key)
            raise Refused(unknown_name("key", key, PART_KEYS) + hint)
        elif not isinstance(value, dict):
            raise Refused(f"{key} is {brief(value)}; it must be a block, {block}.")
        elif key == "random":
            blocks.draw = _draw(block, value)
        else:
            _read_flags(blocks, key, block, value)
    return blocks


def _draw(block: str, entries: FlagTable) -> tuple[int, int]:
    for key in entries:
        if key not in ("n", "seed"):
            raise Refused(f"{block}: {unknown_name('key', key, ('n', 'seed'))}")
    if "n" not in entries:
        raise Refused(f"{block} has no n; say how many configurations to draw, as in n = 20.")
    for key, value, least in (("n", entries["n"], 1), ("seed", entries.get("seed", 0), 0)):
        if type(value) is not int or value < least:
            raise Refused(f"{block}: {key} is {brief(value)}; it must be a whole number of at least {least}.")
    return entries["n"], entries.get("seed", 0)


def _read_flags(blocks: Blocks, kind: str, block: str, entries: FlagTable) -> None:
    """Add the flags of [base], [grid] or [zip] to ``blocks``."""
    if not entries and kind != "base":
        raise Refused(f"{block} is empty; give it flags with lists of values, or leave it out.")
    columns: FlagTable = {}
    for key, value in entries.items():
        with refusals_name(block):
            flag = flag_of_a_sweep(key)
            columns[flag.field] = flag.plain(value, key) if kind == "base" else _values(flag, key, value)
        place = f"{key} in {block}"
        other = blocks.places.setdefault(flag.field, place)
        if other != place:
            raise Refused(f"{place} and {other} are the same flag; keep one of them.")
    if kind == "base":
        blocks.base = columns
    elif kind == "grid":
        blocks.axes += [[{name: value} for value in values] for name, values in columns.items()]
    else:
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            said = ", ".join(f"{key} has {len(value)}" for key, value in entries.items())
            raise Refused(f"{block}: the lists must be equally long; {said}.")
        rows = zip(*columns.values(), strict=True)
        blocks.axes.append([dict(zip(columns, row, strict=True)) for row in rows])


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


# --- where ----------------------------------------------------------------------------------------

KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
ALLOWED = (
    "It may hold flags, numbers, text in quotes, true, false, None, lists [..], == != < <= > >=, in, not in, "
    "and, or, not, + - * / % and parentheses."
)


class Condition:
    """A condition on the flags of a run, such as ``num_experts >= 3 or coupler != "HGNN"``.

    simpleeval evaluates it. Only flags and values may stand in it; nothing is called.

    Raises:
        Refused: the text is no condition; three lines say what is wrong, in which condition, what is allowed.
    """

    def __init__(self, text: str) -> None:
        self.text = " ".join(text.split())
        if not self.text:
            self._refuse("it is empty")
        try:
            self._tree = ast.parse(f"(\n{text}\n)", mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            self._refuse(f"it cannot be read ({getattr(error, 'msg', None) or 'it is too long or too deep'})")
        self._fields: dict[str, str] = {}
        """The field of each flag that stands in the condition, by the flag's name there."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.expr):
                self._check(node)
        self._evaluator = EvalWithCompoundTypes(OPERATORS, functions={})

    def holds(self, flags: FlagTable) -> bool:
        """Return whether the condition is true of a run with these flags, all of them by field.

        Raises:
            Refused: the values cannot be compared or calculated with, or the result is not true or false.
        """
        values = {name: flags[field] for name, field in self._fields.items()}
        self._evaluator.names = {"true": True, "false": False, **values}
        try:
            found = self._evaluator.eval(self.text, self._tree)
        except (TypeError, ArithmeticError, InvalidExpression, RecursionError) as error:
            self._refuse(str(error))
        if not isinstance(found, bool):
            self._refuse(f"its result is {_shown(found)}, and must be true or false; compare it with a value")
        return found

    def _check(self, node: ast.expr) -> None:
        """Refuse whatever may not stand in a condition, and note which flags do."""
        parts = [node, *(part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.expr))]
        odd_value = isinstance(node, ast.Constant) and type(node.value) not in (*KINDS, type(None))
        if odd_value or not all(isinstance(part, CAN_STAND) for part in parts):
            self._refuse(f"{brief(ast.unparse(node))} cannot stand there")
        if isinstance(node, ast.Name) and node.id not in ("true", "false"):
            if node.id in OWNED:
                self._refuse(f"{node.id} cannot stand there: {OWNED[node.id]}")
            if node.id not in sweep_flags():
                self._refuse(f"{brief(node.id)} is no flag of a run.{nearest_name(node.id, sweep_flags())}")
            self._fields[node.id] = sweep_flags()[node.id].field

    def _refuse(self, reason: str) -> NoReturn:
        end = "" if reason.endswith((".", "?")) else "."
        shown = textwrap.shorten(self.text, 200, placeholder=" …")
        raise Refused(f"where: {reason}{end}\nThe condition is: {shown}\n{ALLOWED}") from None


def _of_numbers(calculate: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the operator, which refuses everything but two numbers."""

    def checked(left: Any, right: Any) -> Any:
        for value in (left, right):
            if KINDS.get(type(value)) != "a number":
                hint = "; ask for != None first" if value is None else ""
                raise TypeError(f"{_shown(value)} stands where a number must stand{hint}")
        return calculate(left, right)

    return checked


def _equal(left: Any, right: Any) -> bool:
    """Return whether two values of one kind are equal; the text "None" is None, as in the blocks."""
    left, right = (None if value == "None" else value for value in (left, right))
    if None not in (left, right) and KINDS[type(left)] != KINDS[type(right)]:
        raise TypeError(f"{_shown(left)} and {_shown(right)} cannot be compared")
    return left == right


def _not(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{_shown(value)} stands after not, where true or false must stand")
    return not value


def _contains(item: Any, values: Any) -> bool:
    if not isinstance(values, list):
        raise TypeError(f"{_shown(values)} stands after in, where a list must stand")
    return any(_equal(item, value) for value in values)


def _shown(value: Any) -> str:
    return "None" if value is None else f"{brief(value)} ({KINDS[type(value)]})"


OF_NUMBERS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Mod, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
OPERATORS: dict[type, Callable[..., Any]] = {
    **{kind: _of_numbers(DEFAULT_OPERATORS[kind]) for kind in OF_NUMBERS},
    **{kind: DEFAULT_OPERATORS[kind] for kind in (ast.USub, ast.UAdd)},
    ast.Not: _not,
    ast.Eq: _equal,
    ast.NotEq: lambda left, right: not _equal(left, right),
    ast.In: _contains,
    ast.NotIn: lambda item, values: not _contains(item, values),
}
NODES = (ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Constant, ast.Name, ast.List)
CAN_STAND = (*NODES, *OPERATORS, ast.boolop, ast.Load)


# --- from the blocks to the configurations --------------------------------------------------------


def _put_together(top: Blocks, parts: list[Blocks]) -> list[FlagTable]:
    """Return the configurations of all parts, each once, as ``[random]`` at the top draws them.

    Raises:
        Refused: there is none; two conditions or axes contradict each other; there are too many.
    """
    found: list[FlagTable] = []
    for number, part in enumerate(parts or [Blocks()], 1):
        with refusals_name(f"[[union]] part {number}") if parts else nullcontext():
            found += _configurations(top, part)
    if not found:
        assert top.where is not None
        looked = sum(_size(top, part) for part in parts or [Blocks()])
        raise Refused(_none_left(top.where, looked))
    return _drawn(_distinct(found), top.draw, top.base)


def _configurations(top: Blocks, part: Blocks) -> list[FlagTable]:
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


def _size(*parts: Blocks) -> int:
    return math.prod(len(axis) for part in parts for axis in part.axes)


def _product(base: FlagTable, axes: list[list[FlagTable]]) -> list[FlagTable]:
    points = [base]
    for axis in axes:
        points = [{**point, **flags} for point in points for flags in axis]
    return points


def _kept(found: Iterable[FlagTable], where: Condition) -> list[FlagTable]:
    return [flags for flags in found if where.holds(complete(flags))]


def _none_left(where: Condition, looked: int) -> str:
    return f"a sweep of zero runs: where = {brief(where.text)} removes all {looked} configurations."


def _distinct(found: Iterable[FlagTable]) -> list[FlagTable]:
    """Return the configurations that make different runs, the first of each."""
    kept: dict[Hashable, FlagTable] = {}
    usual = defaults()
    for table in found:
        unusual = frozenset(
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in resolved(table).items()
            if value != usual[name]
        )
        kept.setdefault(unusual, table)
    return list(kept.values())


def _drawn(found: list[FlagTable], draw: tuple[int, int] | None, base: FlagTable) -> list[FlagTable]:
    """Return n configurations drawn at random, in their order.

    A hash of the flags and of the seed decides about each configuration. So a larger n keeps the
    configurations of a smaller n, and another value in ``base``, the flags that all share, keeps all.

    Raises:
        Refused: there are fewer than n.
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
