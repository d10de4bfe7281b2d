"""From the command line to a config: tyro parses, wrong input ends with status 2."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TypeVar

import tyro

from bench.layers import preset_names, with_layers
from bench.records.foreign import visible
from gnnmoe.config import Refused

LAYERS_HELP = (
    "--preset NAME puts the flags of a preset before your own; presets: {}. Default: quick.\n"
    "--config FILE.toml puts a file's flags (num_experts = 8) after the preset's and before your own."
)
LINE_BREAK = "\n"
OTHERS_WAIT_SECONDS = 10.0
Config = TypeVar("Config")


def parse(
    config_type: type[Config],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    presets: bool = False,
) -> Config:
    """Return a ``config_type`` from ``argv`` (default: the process's own arguments).

    With ``presets``, ``--preset NAME`` and ``--config FILE.toml`` are understood. Wrong input prints
    one message and exits with status 2; ``--help`` exits with status 0.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    description = config_type.__doc__ or ""
    if presets:
        description += "\n\n" + LAYERS_HELP.format(", ".join(preset_names()))
        try:
            arguments = with_layers(config_type, arguments)
        except Refused as error:
            fail(str(error))
    return tyro.cli(
        config_type, args=arguments, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,)
    )


def fail(message: str) -> NoReturn:
    """Print ``error: message`` and exit with status 2: wrong input, nothing written."""
    print(f"error: {visible(message, keep=LINE_BREAK)}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def silent_but_on_the_first_rank() -> Iterator[None]:
    """Print nothing in a process that torchrun started as another rank than 0.

    Wrong input is wrong on all ranks. The first says so, and the others wait for torchrun to end them
    with it: torchrun ends all as soon as one has ended.
    """
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
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
    """Print each warning once, as one line without file and source: they speak to the user."""
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            word = "note" if issubclass(category, UserWarning) else "warning"
            print(f"{word}: {message}", file=sys.stderr)

    warnings.showwarning = show
