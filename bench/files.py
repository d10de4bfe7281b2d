"""Files: written whole or not at all, locked, read as TOML; and the time in UTC that they state."""

from __future__ import annotations

import os
import secrets
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gnnmoe.config import Refused

if TYPE_CHECKING:
    from filelock import BaseFileLock

POLL_SECONDS = 0.25


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file, which takes the place of ``path`` when the block ends: whole or not at all.

    The umask gives its mode. Its contents are on the disk before it gets its name.

    Raises:
        OSError: the disk refuses; what was there before stays, and nothing half-written does.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with part.open("x+b") as file:
            yield file
            _sync(file)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as ``replacing`` does."""
    with replacing(path) as file:
        file.write(data)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files as ``replacing`` does; all are on the disk before the first gets its name."""
    with ExitStack() as stack:
        for path, data in contents.items():
            file = stack.enter_context(replacing(path))
            file.write(data)
            _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def remove_left_over(path: Path, seconds: float = 0.0) -> None:
    """Remove what killed writers of ``path`` left behind at least so many seconds ago.

    The name of ``path`` may be a pattern such as ``*.npz``.
    """
    for part in path.parent.glob(f".{path.name}.*"):
        with suppress(OSError):  # another process was quicker
            if time.time() - part.stat().st_mtime >= seconds:
                part.unlink()


class Busy(Refused):
    """Another process holds the lock."""


def lock(path: Path, give_up: Callable[[], bool] | None = None) -> BaseFileLock | None:
    """Return the lock at ``path``, held until its ``release`` or the end of the process.

    None where another process holds it; with ``give_up``, waits until that says True.

    Raises:
        OSError: the file cannot be made or locked.
    """
    from filelock import FileLock, Timeout  # 45 ms, which --help has no use for

    found = FileLock(path, blocking=False, thread_local=False)
    while True:
        try:
            found.acquire()
            return found
        except Timeout:
            if give_up is None or give_up():
                return None
            time.sleep(POLL_SECONDS)


def write_between(path: Path, put: Callable[[str], str]) -> None:
    """Let ``put`` make a page's new text of its old one, and write it whole.

    Raises:
        Refused: the page cannot be read or written; and what ``put`` raises.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise Refused(f"--page {path} cannot be read ({why}).") from error
    data = put(text).encode()
    try:
        write_whole(path, data)
    except OSError as error:
        raise Refused(f"--page {path} cannot be written ({error.strerror}).") from error


def between(text: str, marks: tuple[str, str], content: str) -> str:
    """Return a page's text with ``content`` between its marks.

    Raises:
        Refused: it has no such marks.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        lines = "\n".join(marks)
        raise Refused(f"the page has no place for tables; put these two lines in it:\n{lines}")
    return f"{before}{begin}\n\n{content}\n{end}{after}"


def cannot_write(path: Path, error: OSError) -> str:
    """Return the message that ``path`` cannot be written, why, and what to do."""
    return (
        f"the results folder {path} cannot be written ({error.strerror}); choose another with --results-dir."
    )


def read_toml(what: str, path: Path) -> dict[str, Any]:
    """Return the entries of a TOML file; messages call it ``what``: ``--config``, ``sweep``, …

    Raises:
        Refused: naming the file: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror if str(path) != "." else "name a TOML file"
        raise Refused(f"{what} {path} cannot be read: {reason}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"{what} {path} is not TOML: {error}.") from error


@contextmanager
def refusals_name(place: str) -> Iterator[None]:
    """Put the place to blame before the message of what is refused in the block: ``sweep x.toml: …``."""
    try:
        yield
    except Refused as error:
        raise Refused(f"{place}: {error}") from error


def utc_now(form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).strftime(form)
