"""The types of all flags, and tables of flags: what a TOML file, a preset or a sweep says of a run."""

from __future__ import annotations

import types
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from bench.config import DEFAULT_MAX_STEPS, RunConfig
from bench.files import read_toml
from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name

PRESETS = Path(__file__).parent / "presets"
LENGTHS = {"epochs", "max_steps"}  # whoever gives one of them decides alone how long the training is
Table = dict[str, Any]


def preset_names() -> list[str]:
    """Return the presets there are: the TOML files in bench/presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


@dataclass(frozen=True)
class FlagType:
    """The type of a flag, as TOML can say it: a path is text, None the text "None"."""

    field: str
    hint: Any

    def accepts(self, value: Any) -> bool:
        """Return whether a value read from TOML has this type."""
        if get_origin(self.hint) is Literal:
            return value in get_args(self.hint)
        if get_origin(self.hint) is tuple:
            return isinstance(value, list) and self._accepts_items(value)
        if self._members():
            return any(member.accepts(value) for member in self._members())
        if self.hint is types.NoneType:
            return value is None or value == "None"
        return type(value) in {float: (float, int), Path: (str,)}.get(self.hint, (self.hint,))

    def __str__(self) -> str:
        """Say what is allowed."""
        if get_origin(self.hint) is Literal:
            return ", ".join(map(repr, get_args(self.hint)))
        if get_origin(self.hint) is tuple:
            kinds = [str(FlagType(self.field, hint)) for hint in get_args(self.hint) if hint is not ...]
            return "a list of " + " and ".join(kinds)
        if self._members():
            return " or ".join(map(str, self._members()))
        kinds = {int: "a whole number", float: "a number", bool: "true or false", types.NoneType: '"None"'}
        return kinds.get(self.hint, "text")

    @property
    def adds_up(self) -> bool:
        """Whether the flag may be given several times: its values on several layers are put together."""
        return get_origin(self.hint) is tuple and ... in get_args(self.hint)

    def plain(self, value: Any) -> Any:
        """Return an accepted value in its one plain form: ``"None"`` as None, 1 as 1.0, a path as text."""
        if isinstance(value, list | tuple):
            return [kind.plain(item) for kind, item in zip(self._items(len(value)), value, strict=True)]
        members = self._members()
        if value == "None" and any(member.hint is types.NoneType for member in members):
            return None
        if members:
            return next((m for m in members if m.accepts(value)), self).plain(value)
        return float(value) if self.hint is float else str(value) if isinstance(value, Path) else value

    def typed(self, value: Any) -> Any:
        """Return a plain value as the config has it: a list as a tuple, the text of a path as a path."""
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if isinstance(value, str) and Path in (self.hint, *get_args(self.hint)) else value

    def read(self, text: str) -> Any:
        """Return the plain value that ``text`` writes; the items of a list are separated by spaces.

        Raises:
            Refused: the flag has no such value.
        """
        if get_origin(self.hint) is tuple:
            words = text.split()
            return [kind.read(word) for kind, word in zip(self._items(len(words)), words, strict=True)]
        for member in sorted(self._members(), key=lambda member: member.hint is not types.NoneType):
            try:
                return member.read(text)
            except ValueError:
                continue
        for value in _values(self.hint):
            if text == str(value) or (isinstance(value, bool) and text == str(value).lower()):
                return value
        if self.hint in (int, float):
            return self.hint(text)
        if self.hint in (str, Path):
            return text
        raise Refused(f"{text!r} is not {self}.")

    def _members(self) -> list[FlagType]:
        union = get_origin(self.hint) in (Union, types.UnionType)
        return [FlagType(self.field, hint) for hint in get_args(self.hint)] if union else []

    def _accepts_items(self, items: list[Any]) -> bool:
        kinds = self._items(len(items))
        return len(items) == len(kinds) and all(
            kind.accepts(item) for kind, item in zip(kinds, items, strict=True)
        )

    def _items(self, count: int) -> list[FlagType]:
        hints = get_args(self.hint)
        return [FlagType(self.field, hint) for hint in (hints[:1] * count if self.adds_up else hints)]


def _values(hint: Any) -> tuple[Any, ...]:
    """Return the values of a type that has few."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return {bool: (True, False), types.NoneType: (None,)}.get(hint, ())


def flag_types(config_type: type) -> dict[str, FlagType]:
    """Return the type of every flag of a nested dataclass, by each of its names with underscores."""
    found: dict[str, FlagType] = {}
    for field, hint in get_type_hints(config_type, include_extras=True).items():
        if is_dataclass(hint):
            found |= flag_types(hint)  # pyright: ignore[reportArgumentType]
            continue
        plain, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        names = [field]
        for mark in marks:
            names += [getattr(mark, "name", None) or field, *(getattr(mark, "aliases", None) or ())]
        if get_origin(plain) is not dict:  # no flag says a table
            found |= {name.removeprefix("--").replace("-", "_"): FlagType(field, plain) for name in names}
    return found


def checked(entries: Table, known: dict[str, FlagType]) -> Table:
    """Return the flags of a TOML table by their names with underscores; ``preset`` may be among them.

    Raises:
        Refused: naming the key: it is no flag, stands there under two names, or has the wrong type.
    """
    known = {"preset": FlagType("preset", str), **known}
    table: Table = {}
    seen: dict[str, str] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in known:
            raise Refused(unknown_name("key", key, known))
        if not known[name].accepts(value):
            shown = "a table" if isinstance(value, dict) else repr(value)
            raise Refused(f"{key} is {shown}; it must be {known[name]}.")
        other = seen.setdefault(known[name].field, key)
        if other != key:
            raise Refused(f"{key} and {other} are the same flag; keep one of them.")
        table[name] = value
    if "preset" in table and table["preset"] not in preset_names():
        raise Refused(unknown_name("preset", table["preset"], preset_names()))
    return table


def as_flags(table: Table) -> list[str]:
    """Return the flags that say what ``table`` says: one for each word of a list of words."""
    flags = []
    for name, value in table.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value and isinstance(value, list) and not any(isinstance(item, str) for item in value):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return flags


@cache
def run_flags() -> dict[str, FlagType]:
    """Return the type of every flag of a run, by each of its names with underscores."""
    return flag_types(RunConfig)


@cache
def defaults() -> Table:
    """Return the value of every flag of a run that nobody sets, by its field, plain."""
    known, config = run_flags(), RunConfig()
    groups = [getattr(config, group.name) for group in fields(config)]
    return {f.name: known[f.name].plain(getattr(group, f.name))
            for group in groups for f in fields(group) if f.name in known}  # fmt: skip


@cache
def _preset(name: str) -> Table:
    table = read_toml("preset", PRESETS / f"{name}.toml")
    return {key: run_flags()[key].plain(value) for key, value in table.items()}


def layered(under: Table, over: Table) -> Table:
    """Return the flags of two layers, by field: ``over`` wins, as the command line does over a preset.

    Where it says how long to train, what ``under`` says about that is dropped; a flag that may be given
    several times adds up.
    """
    if not over.keys().isdisjoint(LENGTHS):
        under = {key: value for key, value in under.items() if key not in LENGTHS}
    merged = {**under, **over}
    for key in under.keys() & over.keys():
        if isinstance(over[key], list) and run_flags()[key].adds_up:
            merged[key] = under[key] + over[key]
    return merged


def resolved(flags: Table) -> Table:
    """Return the plain flags (by field, with or without ``preset``) and what their preset adds."""
    found = layered(_preset(flags.get("preset", "quick")), flags)
    found.pop("preset", None)
    if found.get("epochs") is None and found.get("max_steps") is None:
        found["max_steps"] = DEFAULT_MAX_STEPS
    return found


def complete(flags: Table) -> Table:
    """Return the value of every flag of the run that these plain flags make, by field; and its preset."""
    return {**defaults(), **resolved(flags), "preset": flags.get("preset", "quick")}


def config_of(flags: Table) -> RunConfig:
    """Return the config of the run that these plain flags make: the parser's, a hundred times as fast.

    Raises:
        Refused: no run can have one of the values.
    """
    known, config = run_flags(), RunConfig()
    values = layered(_preset(flags.get("preset", "quick")), flags)
    groups = {}
    for group in fields(config):
        kind = type(getattr(config, group.name))
        names = [f.name for f in fields(kind) if f.name in values]
        groups[group.name] = kind(**{name: known[name].typed(values[name]) for name in names})
    return RunConfig(**groups)
