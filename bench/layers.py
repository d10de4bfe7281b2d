"""Presets and TOML files as flags, put before the command line's own: there is one parser for all three."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.config import RunConfig
from bench.files import read_toml, refusals_name
from bench.flags import LENGTHS, PRESETS, FlagType, Table, as_flags, checked, flag_types, preset_names
from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name


def with_layers(config_type: type, arguments: Sequence[str]) -> list[str]:
    """Return the flags of the preset, of each ``--config`` file, and of the command line, in this order.

    The preset is the command line's, else the last file's, else quick. Where a layer says how long
    to train (``epochs`` or ``max_steps``), what the layers before it say about that is dropped. What a
    layer says of a run and ``config_type`` has no flag for is left out.

    Raises:
        Refused: there is no such preset or file, or a file says what no flag could.
    """
    own, presets, files = _split(arguments)
    own_flags = flag_types(config_type)
    known = {**flag_types(RunConfig), **own_flags}  # a run's files serve every command that shares flags
    tables = [read_table(Path(name), known) for name in files]
    presets = [table.pop("preset") for table in tables if "preset" in table] + presets
    name = presets[-1] if presets else "quick"
    if name not in preset_names():
        raise Refused(unknown_name("preset", name, preset_names()))
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
        Refused: naming the file and, where it is to blame, the key: the file cannot be read, it is
            not TOML, a key is no flag or stands there under two names, a value has the wrong type.
    """
    entries = read_toml("--config", path)
    with refusals_name(f"--config {path}"):
        return checked(entries, known)
