"""From the command line to a config: tyro reads the words, ``bench.config`` checks them.

The order of the layers is preset < ``--config`` files < command line. A refusal ends with exit status 2. Also
here: warnings for users.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypedDict, TypeVar

import tyro

from bench.config import (
    PRESET,
    Flag,
    FlagTable,
    RunConfig,
    allowed,
    build,
    by_field,
    flags_of,
    layered,
    preset,
    run_flags,
)
from bench.files import read_toml, refusals_name, visible
from bench.help import ALL_FLAGS, Help, help_text
from bench.help import LAYERS as LAYERS_HELP
from bench.interruption import WrongRanks, ranks_of, speaks
from gnnmoe.config import Refused, brief, nearest_name, shortened

LAYERS = {entry.flag.field: entry.flag for entry in LAYERS_HELP}
HELP, HELP_ALL = {"-h", "--help"}, {"--help-all", "--help_all"}
NAMES_ELSEWHERE = {
    "bs": "batch-size", "d-model": "embed-dim", "dim": "embed-dim", "dropout": "dropout-rate",
    "heads": "num-heads", "hidden-size": "embed-dim", "iterations": "max-steps", "layers": "num-layers",
    "lr": "learning-rate", "max-length": "max-seq-length", "model": "coupler", "name": "run-name",
    "num-epochs": "epochs", "out": "results-dir", "output-dir": "results-dir", "seq-len": "max-seq-length",
    "steps": "max-steps", "warmup": "warmup-steps", "wd": "weight-decay",
}  # fmt: skip
"""Flags of other tools, and the flag here."""
OTHERS_WAIT_SECONDS = 10.0
LONGEST_WORD = 250
"""A value of more letters is cut in a message; a path may be nearly as long."""
Config = TypeVar("Config")


def parse(
    config_type: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str = "python -m bench",
    presets: bool = False,
    about: Help = ALL_FLAGS,
) -> Config:
    """Return a ``config_type`` from ``argv`` (default: the arguments of the process).

    ``presets`` allows ``--preset NAME`` and ``--config FILE.toml``. Wrong input prints one message and exits
    with status 2; ``--help`` and ``--help-all`` exit with status 0 and show what ``about`` says.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (HELP | HELP_ALL) & set(arguments):
        everything = bool(HELP_ALL & set(arguments))
        print(help_text(config_type, prog, LAYERS_HELP if presets else (), about, everything=everything))
        raise SystemExit(0)
    try:
        Path.cwd()  # torch ends the process where it is gone
    except OSError as error:
        fail(f"the current folder cannot be used ({error.strerror}); change to another folder.")
    try:
        return config_from(config_type, arguments, presets)
    except Refused as error:
        fail(str(error))


def config_from(config_type: type[Config], arguments: Sequence[str], presets: bool) -> Config:
    """Return the config of a preset, the ``--config`` files and the words of a command line.

    The preset of the command line wins over the preset of the last file, and that over quick. Flags of a run
    that ``config_type`` does not have are left out.

    Raises:
        Refused: naming the flag as the user wrote it, its value and what is allowed.
    """
    known = {**flags_of(config_type), **(LAYERS if presets else {})}
    said = read_words(known, arguments)
    by_name = {flag.field: flag for flag in known.values()}
    own = {name: by_name[name].read(words) for name, words in said.items()}
    names = {name: by_name[name].option() for name in own}
    if not presets:
        return build(config_type, own, names)
    of_a_run = {**flags_of(RunConfig), **known, "preset": PRESET}  # a run's files serve all commands
    del of_a_run["config"]
    files = [read_file(Path(path), of_a_run) for path in own.pop("config", [])]
    chosen = [(table.pop("preset"), called["preset"]) for table, called in files if "preset" in table]
    chosen += [(own.pop("preset"), "--preset")] if "preset" in own else []
    table = preset(PRESET.plain(*chosen[-1]) if chosen else "quick")
    called: dict[str, str] = {}
    for layer, its_names in [*files, (own, names)]:
        table, called = layered(table, layer), {**called, **its_names}
    return build(config_type, table, called)


def read_words(known: Mapping[str, Flag], arguments: Sequence[str]) -> dict[str, Any]:
    """Return the words of a command line for each flag, by field; a switch is true or false.

    Raises:
        Refused: a flag is unknown, or has no value.
    """
    flags = {flag.field: flag for flag in known.values()}
    types = {
        name: Annotated[(_words_of(flag), flag, *getattr(flag.hint, "__metadata__", ()))]
        for name, flag in flags.items()
    }
    words = TypedDict("words", types, total=False)  # pyright: ignore[reportArgumentType]
    nothing = {name: () for name, flag in flags.items() if flag.adds_up}
    printed = io.StringIO()
    options = {"default": nothing, "return_unknown_args": True, "add_help": False}
    try:
        with redirect_stderr(printed):
            said, unknown = tyro.cli(words, args=arguments, **options)
    except SystemExit:
        raise _without_value(known, printed.getvalue()) from None
    if unknown:
        raise _unknown(known, unknown)
    return {name: given for name, given in said.items() if given != nothing.get(name)}


def _words_of(flag: Flag) -> Any:
    """Return how many words a flag has: none (a switch), any number or one."""
    return bool if flag.kinds == (bool,) else tuple[str, ...] if flag.is_list else str


def _without_value(known: Mapping[str, Flag], printed: str) -> Refused:
    found = re.search(r"'--([\w-]+)'", printed)
    flag = known.get(found[1].replace("-", "_")) if found else None
    if flag is None:
        return Refused("a flag has no value; --help-all lists all flags.")
    return Refused(f"{flag.option()} has no value; it must be {allowed(flag.hint)}.")


def _unknown(known: Mapping[str, Flag], words: Sequence[str]) -> Refused:
    first = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if first is None:
        return Refused(f"{brief(words[0])} belongs to no flag; --help-all lists all flags.")
    options = {f"--{name}" for flag in known.values() for name in flag.names}
    options |= {f"--no-{name}" for flag in known.values() if flag.kinds == (bool,) for name in flag.names}
    meant = NAMES_ELSEWHERE.get(first.lstrip("-").replace("_", "-"))
    near = f" Did you mean '--{meant}'?" if f"--{meant}" in options else nearest_name(first, options)
    of_a_run = run_flags().get(first.lstrip("-").replace("-", "_"))
    if of_a_run is not None and "sweep" in known:
        return Refused(
            f"{brief(first)} is a flag of a run, not of bench.sweep; set {of_a_run.field} for all runs under "
            f"[base] in the sweep file, or as {of_a_run.field}=VALUE after --sweep."
        )
    return Refused(f"unknown flag {brief(first)}; --help-all lists all flags.{near}")


def read_file(path: Path, known: Mapping[str, Flag]) -> tuple[FlagTable, dict[str, str]]:
    """Return the values of a flat TOML file by field, not yet checked, and the name of each in messages.

    Raises:
        Refused: the file cannot be read, is not TOML, has a key that is no flag, or has a flag twice.
    """
    entries = read_toml("--config", path)
    with refusals_name(f"--config {path}"):
        table, names = by_field(entries, known)
    return table, {name: f"--config {path}: {key}" for name, key in names.items()}


def fail(message: str) -> NoReturn:
    """Print ``error: message`` and exit with status 2: wrong input, nothing written."""
    short = re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: shortened(word[0]), message)
    print("error:", visible(short, keep="\n"), file=sys.stderr)
    raise SystemExit(2)


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int, int] | None:
    """Return what ``ranks_of`` returns.

    Raises:
        Refused: a variable is missing or no number, as where WORLD_SIZE is left of another program.
    """
    try:
        return ranks_of(environment)
    except WrongRanks as error:
        raise Refused(str(error)) from error


@contextmanager
def silent_but_on_the_first_rank() -> Iterator[None]:
    """Print nothing in a process that torchrun started as another rank than 0.

    Wrong input is wrong on all ranks. Rank 0 prints the message. The other ranks wait until torchrun ends
    them: it ends all ranks as soon as one rank has ended.
    """
    if speaks():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # noqa: PTH123
        try:
            yield
        except SystemExit as end:
            if end.code:
                time.sleep(OTHERS_WAIT_SECONDS)
            raise


def show_warnings_plainly() -> None:
    """Print each warning once, as one line for the user, without file and source."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            word = "note" if issubclass(category, UserWarning) else "warning"
            print(f"{word}: {visible(str(message))}", file=sys.stderr)

    warnings.showwarning = show
