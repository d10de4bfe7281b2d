"""The text of ``--help`` and ``--help-all``: flags with type, help and default, 80 columns wide.

``--help`` shows the flags that most people need, and ``--help-all`` shows all flags, the most used first.
Only the text is shorter: a command always accepts all of its flags. A field's docstring is the help of its
flag.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tyro

from bench.config import PRESET, Flag, Several, flags_of, preset_names

WIDTH, INDENT = 80, 26
NO_BREAK = "\N{NO-BREAK SPACE}"
WORDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Help:
    """What a command's ``--help`` shows beside the descriptions of its flags."""

    usual: Sequence[str] = ()
    """The fields that ``--help`` shows, in this order; none: all fields."""
    examples: Sequence[str] = ()
    """Arguments of the command, with which it works."""


ALL_FLAGS = Help()


@dataclass(frozen=True)
class Entry:
    """One flag as the help shows it."""

    flag: Flag
    about: str
    default: Any = None
    title: str = "More flags"
    """The section of the flag."""

    def lines(self) -> list[str]:
        """Return the flag and its description, wrapped."""
        head, text = f"  {_shown(self.flag, self.default)}", self.about
        default = _default(self.default)
        if default and "default" not in text:
            text = f"{text} [default:{NO_BREAK}{default.replace(' ', NO_BREAK)}]"
        body = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False)
        body = [line.replace(NO_BREAK, " ") for line in body]
        if len(head) > INDENT - 2:
            return [head, *(" " * INDENT + line for line in body)]
        first, *rest = body or [""]
        return [f"{head:{INDENT}}{first}".rstrip(), *(" " * INDENT + line for line in rest)]


LAYERS = (
    Entry(PRESET, f"Values of a preset, under your own flags: {', '.join(preset_names())}.", "quick"),
    Entry(
        Flag("config", Several, ("config",)),
        "File of flags, such as num_experts = 8, between the preset and your own flags. May be given several "
        "times.",
    ),
)


def help_text(config_type: type, prog: str, layers: Sequence[Entry], about: Help, *, everything: bool) -> str:
    """Return the help of a command: all flags, or the usual flags alone."""
    found = {entry.flag.field: entry for entry in (*entries(config_type), *layers)}
    usual = [found.pop(name) for name in about.usual or list(found)]
    lines = [f"usage: {prog} {' '.join(_usage(usual))}[FLAGS]".rstrip(), ""]
    for paragraph in inspect.cleandoc(config_type.__doc__ or "").split("\n\n"):
        lines += [*textwrap.wrap(paragraph, WIDTH), ""]
    if about.examples:
        lines += ["Examples:", *(f"  {prog} {example}" for example in about.examples), ""]
    lines += ["Flags:", *_lines(usual)]
    if everything:
        for title in dict.fromkeys(entry.title for entry in found.values()):
            lines += ["", f"{title}:", *_lines([entry for entry in found.values() if entry.title == title])]
    lines += ["", f"  {'-h, --help':{INDENT - 2}}Show the most used flags."]
    if found:
        lines += [f"  {'--help-all':{INDENT - 2}}Show all {len(usual) + len(found)} flags."]
    return "\n".join(lines)


def _lines(shown: Sequence[Entry]) -> Iterator[str]:
    for entry in shown:
        yield from entry.lines()


def _usage(shown: Sequence[Entry]) -> Iterator[str]:
    for entry in shown:
        if _is_positional(entry.flag):
            yield (
                f"[{_shown(entry.flag, None)}] "
                if _is_optional(entry.flag)
                else f"{_shown(entry.flag, None)} "
            )


def entries(config_type: type, made: Any = None, title: str = Entry.title) -> Iterator[Entry]:
    """Yield the flags of a config and of its groups; ``made`` has the defaults of a group."""
    known = {flag.field: flag for flag in flags_of(config_type).values()}
    own = []
    for each in fields(config_type):
        default = getattr(made, each.name, None) if made is not None else _made(each)
        if is_dataclass(default) and not isinstance(default, type):
            if not any(name in known for name in vars(default)):
                continue  # suppressed
            heading = inspect.cleandoc(type(default).__doc__ or "").partition("\n")[0].rstrip(".")
            yield from entries(type(default), default, heading)
        elif each.name in known:
            own.append(Entry(known[each.name], about_fields(config_type).get(each.name, ""), default, title))
    yield from own


def _made(each: Any) -> Any:
    if each.default_factory is not MISSING:
        return each.default_factory()
    return None if each.default is MISSING else each.default


def about_fields(config_type: type) -> dict[str, str]:
    """Return the docstring of each field of a class and of its bases, as one line."""
    found: dict[str, str] = {}
    for base in reversed(config_type.__mro__):
        found |= _documented(base.__module__).get(base.__qualname__, {})
    return found


@cache
def _documented(module: str) -> dict[str, dict[str, str]]:
    """Return the docstring of each field, by the names of the classes of a module."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not (file or "").endswith(".py"):
        return {}
    tree = ast.parse(Path(str(file)).read_text(encoding="utf-8"))
    return {node.name: dict(_field_docs(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _field_docs(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            value = after.value if isinstance(after, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield field.target.id, " ".join(value.value.split())


# --- one flag in words ------------------------------------------------------------------------------


def _marks(flag: Flag) -> tuple[Any, ...]:
    return getattr(flag.hint, "__metadata__", ())


def _is_positional(flag: Flag) -> bool:
    return tyro.conf.Positional in _marks(flag)


def _is_optional(flag: Flag) -> bool:
    return types.NoneType in flag.kinds


def _shown(flag: Flag, default: Any) -> str:
    """Return a flag with the type of its value: ``--num-experts INTEGER``."""
    if _is_positional(flag):
        return flag.names[0].upper()
    if flag.kinds == (bool,):
        return f"--[no-]{flag.names[0]}" if default else flag.option()
    return f"{flag.option()} {_word(flag)}"


def _word(flag: Flag) -> str:
    given = next((mark.metavar for mark in _marks(flag) if getattr(mark, "metavar", None)), None)
    if given or flag.adds_up:
        return given or "FILE"
    return " ".join(_words(flag.kinds))


def _words(kinds: Sequence[Any]) -> list[str]:
    """Return the type of a value: one word, or a word for each part of a list."""
    first = kinds[0]
    if get_origin(first) is tuple:
        return [" ".join(_words((part,))) if part is not ... else "…" for part in map(_bare, get_args(first))]
    words: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [str(choice) for choice in get_args(kind) if choice is not None]
        elif kind in WORDS:
            words.append(WORDS[kind])
    return ["|".join(word for word in words if word != "INTEGER" or "NUMBER" not in words)]


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if getattr(hint, "__metadata__", None) else hint


def _default(value: Any) -> str:
    """Return a default in words; no text where there is nothing to state."""
    if value is None or value is False or value is True or value == () or value == {}:
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
