"""Presets and TOML files as flags, put before the command line's own: there is one parser for all three."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from bench.config import RunConfig
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
            return value == "None"
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

    def _members(self) -> list[FlagType]:
        union = get_origin(self.hint) in (Union, types.UnionType)
        return [FlagType(self.field, hint) for hint in get_args(self.hint)] if union else []

    def _accepts_items(self, items: list[Any]) -> bool:
        hints = get_args(self.hint)
        if hints[-1] is ...:
            hints = hints[:1] * len(items)
        return len(items) == len(hints) and all(
            FlagType(self.field, hint).accepts(item) for hint, item in zip(hints, items, strict=True)
        )


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


def with_layers(config_type: type, arguments: Sequence[str]) -> list[str]:
    """Return the flags of the preset, of each ``--config`` file, and of the command line, in this order.

    The preset is the command line's, else the last file's, else quick. Where a layer says how long
    to train (``epochs`` or ``max_steps``), what the layers before it say about that is dropped. What a
    layer says of a run and ``config_type`` has no flag for is left out.

    Raises:
        ValueError: there is no such preset or file, or a file says what no flag could.
    """
    own, presets, files = _split(arguments)
    own_flags = flag_types(config_type)
    known = {**flag_types(RunConfig), **own_flags}  # a run's files serve every command that shares flags
    tables = [read_table(Path(name), known) for name in files]
    presets = [table.pop("preset") for table in tables if "preset" in table] + presets
    name = presets[-1] if presets else "quick"
    if name not in preset_names():
        raise ValueError(unknown_name("preset", name, preset_names()))
    tables.insert(0, read_table(PRESETS / f"{name}.toml", known))
    given = {flag.partition("=")[0][2:].replace("-", "_") for flag in own if flag.startswith("--")}
    flags = own
    for table in reversed(tables):
        dropped = LENGTHS if given & LENGTHS else set()
        said = {key: value for key, value in table.items() if key in own_flags and key not in dropped}
        flags = as_flags(said) + flags
        given |= set(table)
    return flags


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the arguments without ``--preset`` and ``--config``, and the values of these two."""
    own: list[str] = []
    values: dict[str, list[str]] = {"--preset": [], "--config": []}
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag in values:
            values[flag].append(value if equals else next(remaining, ""))
        else:
            own.append(argument)
    return own, values["--preset"], values["--config"]


def read_table(path: Path, known: dict[str, FlagType]) -> Table:
    """Return what a flat TOML file says, by flag name with underscores; ``preset`` may be among them.

    Raises:
        ValueError: naming the file and, where it is to blame, the key: the file cannot be read, it is
            not TOML, a key is no flag or stands there under two names, a value has the wrong type.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
        return _checked(entries, {"preset": FlagType("preset", str), **known})
    except OSError as error:
        reason = error.strerror if str(path) != "." else "name a TOML file"
        raise ValueError(f"--config {path} cannot be read: {reason}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {path} is not TOML: {error}.") from error
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error


def _checked(entries: Table, known: dict[str, FlagType]) -> Table:
    table: Table = {}
    seen: dict[str, str] = {}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ValueError(unknown_name("key", key, known))
        if not known[name].accepts(value):
            shown = "a table" if isinstance(value, dict) else repr(value)
            raise ValueError(f"{key} is {shown}; it must be {known[name]}.")
        other = seen.setdefault(known[name].field, key)
        if other != key:
            raise ValueError(f"{key} and {other} are the same flag; keep one of them.")
        table[name] = value
    if "preset" in table and table["preset"] not in preset_names():
        raise ValueError(unknown_name("preset", table["preset"], preset_names()))
    return table


def as_flags(table: Table) -> list[str]:
    """Return the flags that say what ``table`` says; a list of words repeats its flag."""
    flags = []
    for name, value in table.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list) and not any(isinstance(item, str) for item in value):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return flags
