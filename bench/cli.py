"""From the command line to a config: presets become flags, tyro parses, errors end with status 2."""

from __future__ import annotations

import sys
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from gnnmoe.naming import unknown_name

PRESETS = Path(__file__).parent / "presets"
PRESET_HELP = "--preset NAME puts the flags of a preset before your own; presets: {}. Default: quick."
Config = TypeVar("Config")


def parse(
    config_type: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    presets: bool = False,
) -> Config:
    """Return a ``config_type`` from ``argv`` (default: the process's own arguments).

    With ``presets``, ``--preset NAME`` is understood. Wrong input prints one message and exits with
    status 2; ``--help`` exits with status 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    description = config_type.__doc__ or ""
    if presets:
        description += "\n\n" + PRESET_HELP.format(", ".join(preset_names()))
        try:
            arguments = with_preset(arguments)
        except ValueError as error:
            fail(str(error))
    return tyro.cli(
        config_type, args=arguments, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,)
    )


def fail(message: str) -> NoReturn:
    """Print ``error: message`` and exit with status 2: wrong input, nothing written."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def show_warnings_plainly() -> None:
    """Print each warning once, as one line without file and source: they speak to the user."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            word = "note" if issubclass(category, UserWarning) else "warning"
            print(f"{word}: {message}", file=sys.stderr)

    warnings.showwarning = show


def preset_names() -> list[str]:
    """Return the presets there are: the TOML files in bench/presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def with_preset(arguments: list[str]) -> list[str]:
    """Take ``--preset NAME`` out of ``arguments`` and put its flags in front of the others.

    Raises:
        ValueError: there is no such preset, or no name follows.
    """
    rest, name = [], "quick"
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, value = argument.partition("=")
        if flag == "--preset":
            name = value if equals else next(remaining, "")
        else:
            rest.append(argument)
    if name not in preset_names():
        raise ValueError(unknown_name("preset", name, preset_names()))
    return as_flags(tomllib.loads((PRESETS / f"{name}.toml").read_text())) + rest


def as_flags(values: dict[str, Any]) -> list[str]:
    """Return the flags that say what a flat TOML table says."""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags
