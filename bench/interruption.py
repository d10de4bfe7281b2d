"""How a signal ends a command: with one line of the first rank and exit status 130.

Imports the standard library only.

``bench/__init__.py`` calls ``guard`` before anything else is imported. The ``main`` of every command is
``interruptible``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn

INTERRUPTED = 130
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a run or a sweep to save its state and end."""
Main = Callable[..., int]


AGAIN_SECONDS = 0.01
_came: list[bool] = []
"""KeyboardInterrupt was raised here; a library may have made another error of it."""
_kept: list[str] = ["nothing is kept."]
"""What the last line of an interrupted command says."""


def guard() -> None:
    """Let SIGINT end this process at once, while its command is imported; lose no SIGINT in a destructor."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    sys.unraisablehook = sending_again(sys.unraisablehook)


def sending_again(show: Callable[[Any], object]) -> Callable[[Any], None]:
    """Return a ``sys.unraisablehook`` that sends SIGINT again after a destructor; ``show`` does the rest.

    Python drops an exception in a destructor, so that the signal would be lost.
    """

    def hook(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            show(lost)
            return
        main = threading.main_thread().ident
        assert main is not None
        # From a thread, and later: in this function, Python would drop it too.
        again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()

    return hook


def _end(*_: Any) -> None:
    say(_kept[0])
    os._exit(INTERRUPTED)  # out of an import, an exception may come as any other exception


def _interrupt(*_: Any) -> NoReturn:
    _came.append(True)
    raise KeyboardInterrupt


def say(kept: str) -> None:
    """Print that the command was interrupted, and what is kept, where this process ``speaks``."""
    if speaks():
        print(f"interrupted: {kept}", file=sys.stderr, flush=True)


def keeping(kept: str) -> None:
    """Let ``kept`` be what a later interrupt says; an earlier interrupt has been dealt with."""
    _kept[0] = kept
    _came.clear()


def interruptible(kept: str) -> Callable[[Main], Main]:
    """Return a decorator for the ``main`` of a command: SIGINT ends it with one line that says ``kept``.

    ``keeping`` changes what it says. When the command has ended, its process ignores SIGINT.
    """

    def decorate(main: Main) -> Main:
        @wraps(main)
        def ending(argv: Sequence[str] | None = None) -> int:
            keeping(kept)
            try:
                with handling((signal.SIGINT,), _interrupt):
                    return main(argv)
            except BaseException as error:
                if not _came and not isinstance(error, KeyboardInterrupt):
                    raise
                say(_kept[0])
                exec("")  # else, where the interrupt came in an exec, Python would end by the signal again
                return INTERRUPTED

        return ending

    return decorate


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Handle signals by ``handler`` in the block; in another thread than the main thread, do nothing.

    SIGHUP stays ignored where it is ignored, as under nohup: the process outlives its terminal. The handler
    of the import does not come back: nothing is left to interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in numbers if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_IGN if earlier is _end else earlier)


class Interruption:
    """Turns a stopping signal into a request while a block defers it, else into KeyboardInterrupt.

    A second signal always interrupts at once. After ``over``, signals do nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False
        self._over = False

    def over(self) -> None:
        """Ignore all later signals: the end of the run is known, and little is left to do."""
        self._over = True

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Ignore signals in the block, which writes the end of the run."""
        before, self._over = self._over, True
        try:
            yield
        finally:
            self._over = before

    @contextmanager
    def installed(self) -> Iterator[Interruption]:
        """Handle the signals in the block; in another thread than the main thread, do nothing."""
        with handling(STOPPING, self._handle):
            yield self

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal in the block only set ``requested``; the block looks where it can stop."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, *_: Any) -> None:
        if self._over:
            return
        if not self._deferring or self.requested:
            _interrupt()
        self.requested = True


# --- One process of several

MOST_PROCESSES, MOST_PORT = 100_000, 65_535
MISSING = {"LOCAL_WORLD_SIZE": "set it to the number of ranks on this machine, "}
UNSET = "unset WORLD_SIZE for a run of one process, or start the run with torchrun."


class WrongRanks(ValueError):
    """The variables of torchrun are wrong or incomplete; the message says which, and what to do."""


def speaks(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints: of several ranks, only the first prints.

    Where the variables are wrong, there may be no first rank, and each process prints.
    """
    try:
        found = ranks_of(environment)
    except WrongRanks:
        return True
    return found is None or found[1] == 0


def ranks_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int, int] | None:
    """Return the world size, rank, local rank and local world size that torchrun gave this process.

    Return None where it is the only process. Without both local variables, each machine has one rank.

    Raises:
        WrongRanks: a variable is missing or no number, as where WORLD_SIZE is left of another program.
    """
    world = _number(environment, "WORLD_SIZE", 1, MOST_PROCESSES, "1")
    if world == 1:
        return None
    rank = _number(environment, "RANK", 0, world - 1)
    local_world = _number(
        environment, "LOCAL_WORLD_SIZE", 1, world, None if "LOCAL_RANK" in environment else "1"
    )
    local = _number(environment, "LOCAL_RANK", 0, local_world - 1, "0" if local_world == 1 else None)
    _number(environment, "MASTER_PORT", 1, MOST_PORT)
    if not environment.get("MASTER_ADDR"):
        raise WrongRanks(f"WORLD_SIZE is {world} in the environment, but MASTER_ADDR is not set; {UNSET}")
    return world, rank, local, local_world


def _number(
    environment: Mapping[str, str], name: str, least: int, most: int, default: str | None = None
) -> int:
    text = environment.get(name, default)
    if text is None:
        size = environment["WORLD_SIZE"]
        raise WrongRanks(
            f"WORLD_SIZE is {size} in the environment, but {name} is not set; {MISSING.get(name, '')}{UNSET}"
        )
    if not (text.isascii() and text.isdecimal() and len(text) < 7) or not least <= int(text) <= most:
        raise WrongRanks(
            f"{name} is {text[:32]!r} in the environment; it must be a whole number from {least} to "
            f"{most:,}. Otherwise, {UNSET}"
        )
    return int(text)
