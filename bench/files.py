"""Files: written whole, locked, read as text of strangers, and without a place of this machine.

A study may come from somebody else. Its texts are shown as text, and its file names stay in its folder.
What a run writes names no absolute path, no host and no user.
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import platform
import re
import secrets
import stat
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from gnnmoe.config import Refused, shortened
from gnnmoe.reading import read_bytes

if TYPE_CHECKING:
    from filelock import BaseFileLock


# --- Written whole, or not at all


CANNOT_WRITE = "cannot be written"
"""In every message about a file or folder that cannot be written; a sweep stops where a run says so."""
TEMPORARY = re.compile(r"\.[0-9a-f]{1,8}")
"""The end of the name of a temporary file."""
NOT_WRITTEN = 74  # EX_IOERR of sysexits.h
"""The exit status of a run whose results cannot be written; ``--resume`` continues the run."""


class NotWritten(OSError):
    """A file cannot be written; the message names the file and the reason."""

    def __str__(self) -> str:
        return f"{Path(str(self.filename)).name} {CANNOT_WRITE}: {self.strerror}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in the error of a block that writes it.

    Raises:
        NotWritten: the disk refuses.
    """
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a new file, which replaces ``path`` when the block ends: all of it or nothing.

    The new file has the mode of the old file; without an old file, the umask gives the mode. The contents are
    on the disk before the file gets its name.

    Raises:
        NotWritten: the disk refuses; the old file stays, and no half-written file is left.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path):
        try:
            with part.open("x+b") as file:
                with suppress(OSError):  # there is no old file, or the file system has no modes
                    part.chmod(path.stat().st_mode & 0o777)
                yield file
                _sync(file)
            part.replace(path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def write_whole(path: Path, data: bytes) -> None:
    """Write a file as ``replacing`` does."""
    with replacing(path) as file:
        file.write(data)


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files as ``replacing`` does; all files are on the disk before the first gets its name."""
    with ExitStack() as stack:
        for path, data in contents.items():
            file = stack.enter_context(replacing(path))
            file.write(data)
            _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def remove_left_over(path: Path, seconds: float = 0.0) -> None:
    """Remove temporary files that killed writers of ``path`` left behind at least ``seconds`` ago.

    The name of ``path`` may be a pattern such as ``*.npz``. Other hidden files stay.
    """
    for part in path.parent.glob(f".{path.name}.*"):
        with suppress(OSError):  # another process was quicker
            old = not seconds or time.time() - part.stat().st_mtime >= seconds
            if old and TEMPORARY.fullmatch(part.suffix):
                part.unlink()


def cannot_write(path: Path, error: OSError, flag: str = "--results-dir") -> str:
    """Return the message that ``path`` cannot be written, why, and what to do."""
    what = flag.removeprefix("--").removesuffix("-dir")
    return f"the {what} folder {path} {CANNOT_WRITE} ({error.strerror}); choose another with {flag}."


def check_writable(folder: Path, flag: str = "--results-dir") -> None:
    """Check that ``folder``, which ``flag`` names, can be written; nothing is left behind.

    Raises:
        Refused: it, or the nearest folder above it that exists, is no folder or cannot be written; or a link
            on the way points nowhere.
    """
    try:
        nearest = folder.absolute()
        while not _is_there(nearest):
            if nearest.is_symlink():  # no folder can be made there
                raise OSError(errno.ENOENT, f"the link {nearest.name} points nowhere")
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise Refused(cannot_write(folder, error, flag)) from error


def write_between(path: Path, put: Callable[[str], str]) -> None:
    """Write a page whole, with the text that ``put`` makes from its old text.

    A page behind a link is written where the link points. The page keeps its mode and its line ends.

    Raises:
        Refused: the page cannot be read or written; and what ``put`` raises.
    """
    try:
        path = path.resolve()
        text = read_bytes(path).decode("utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: links in a circle
        why = getattr(error, "strerror", None) or "it is no text"
        raise Refused(f"--page {path} cannot be read ({why}).") from error
    data = put(text).encode()
    try:
        write_whole(path, data)
    except OSError as error:
        raise Refused(f"--page {path} {CANNOT_WRITE} ({error.strerror}).") from error


def between(text: str, marks: tuple[str, str], content: str) -> str:
    """Return a page's text with ``content`` between its marks, with the page's own line ends.

    Raises:
        Refused: the page has no such marks.
    """
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        lines = "\n".join(marks)
        raise Refused(f"the page has no place for tables; put these two lines in it:\n{lines}")
    line_end = "\r\n" if rest.startswith("\r\n") else "\n"
    return before + begin + f"\n\n{content}\n".replace("\n", line_end) + end + after


def utc_now(form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).strftime(form)


# --- Locked

POLL_SECONDS = 0.25


class Busy(Refused):
    """Another process holds the lock."""


def lock(path: Path, give_up: Callable[[], bool] | None = None) -> BaseFileLock | None:
    """Return the lock at ``path``, held until its ``release`` or the end of the process.

    Return None where another process holds the lock; with ``give_up``, wait until it returns True.

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


# --- Read


def kind_of(path: Path) -> Literal["file", "folder", "other"] | None:
    """Return what is at a path, behind links; None: nothing is there, or a link points nowhere.

    ``Path.exists`` and its like raise where a folder may not be searched, and say False where links form a
    circle or a name is too long.

    Raises:
        Refused: the path cannot be looked at; the message says why.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise Refused(f"{path} cannot be read ({getattr(error, 'strerror', error)}).") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def read_toml(what: str, path: Path) -> dict[str, Any]:
    """Return the entries of a TOML file; messages call it ``what``: ``--config``, ``sweep``, …

    Raises:
        Refused: the file cannot be read, or is not TOML; the message names the file.
    """
    try:
        return tomllib.loads(read_bytes(path).decode("utf-8-sig"))
    except OSError as error:
        reason = error.strerror if str(path) != "." else "name a TOML file"
        raise Refused(f"{what} {path} cannot be read: {reason}.") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{what} {path} is not TOML: {_wrong(error)}.") from error


def read_json_text(path: Path) -> tuple[str, Any]:
    """Return the text of a JSON file, whoever wrote it, and its value.

    Raises:
        Refused: the file cannot be read, is cut short or nested too deeply; the message names the file.
    """
    try:
        text = read_bytes(path).decode()
        return text, json.loads(text)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is cut short or no JSON: {_wrong(error)}.") from error


def _wrong(error: ValueError | RecursionError) -> str:
    """Return what is wrong with a text that a parser of the standard library does not read."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (
        "it has an integer of too many digits" if "int_max_str" in str(error) else shortened(str(error), 120)
    )


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; see ``read_json_text``."""
    return read_json_text(path)[1]


DAMAGE_LETTERS = 90
"""The most letters that a message says of what is wrong inside a damaged file."""


@contextmanager
def refusals_name(place: str, most: int | None = None) -> Iterator[None]:
    """Put ``place`` before the message of a refusal in the block: ``sweep x.toml: …``.

    At most ``most`` letters of the message stay.
    """
    try:
        yield
    except Refused as error:
        text = str(error)
        raise Refused(f"{place}: {text if most is None else shortened(text, most)}") from error


# --- Texts of strangers: shown as text, and kept in their folder

MOST_NESTED = 100
"""Levels of nested JSON that are read; a record has about 8."""
LONGEST_NAME = 200
"""Letters of a file name that a file may give; names of reports and runs have at most 40."""
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, C1), what overrides the direction of writing, and what UTF-8 cannot hold."""


def visible(text: str, keep: str = "") -> str:
    r"""Return ``text`` with each control character as its escape (``\x1b``), except those in ``keep``."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def shown(value: Any, name: str = "", levels: int = MOST_NESTED) -> Any:
    """Return a nested value of JSON as it may be shown: every text and key ``visible``.

    ``name`` is the key of the value. Texts under the key ``error`` keep their line breaks.

    Raises:
        Refused: the value has more than ``levels`` levels.
    """
    if isinstance(value, str):
        return visible(value, keep="\n" if name == "error" else "")
    if not isinstance(value, dict | list):
        return value
    if not levels:
        raise Refused(f"it is nested more than {MOST_NESTED} levels deep")
    if isinstance(value, dict):
        return {visible(key): shown(item, key, levels - 1) for key, item in value.items()}
    return [shown(item, name, levels - 1) for item in value]


def inside(folder: Path, name: str, source: Path) -> Path:
    """Return the path of the file ``name`` in ``folder``, as the file ``source`` names it.

    Raises:
        Refused: the name, or a symbolic link, leads out of the folder.
    """
    parts = re.split(r"[/\\]", name)
    plain = not {"", ".", ".."} & set(parts) and "\0" not in name and ":" not in parts[0]
    if not plain or max(map(len, parts)) > LONGEST_NAME:
        said = repr(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…")
        raise Refused(
            f"{source} names the file {said}, which is not in {folder}. Nothing was changed. Do not use "
            f"a study that you do not trust; else delete {source.name} and try again."
        )
    return not_linked_out(folder, name)


def not_linked_out(folder: Path, name: str) -> Path:
    """Return the path of the file ``name`` in ``folder``; another person may have made the folder.

    Raises:
        Refused: the file is, or lies behind, a symbolic link that leads out of the folder.
    """
    try:
        stays = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        stays = False
    if not stays:
        raise Refused(
            f"{folder / name} is a symbolic link, or lies behind one, that leads out of {folder}. "
            "Nothing was changed; delete the link and try again."
        )
    return folder / name


# --- Without a place of this machine

SAYS_NOTHING = frozenset(
    "root user admin localhost runner ubuntu linux cpu gpu cuda data train test mean gate topk static dense"
    " attention gnn hgnn quick baseline full original".split()
)
"""Names of users and machines that name nobody, and words of every record or command line."""
PROSE = frozenset({"", "command", "detail", "error", "reason", "remark", "warning"})
"""Keys of a record whose texts are sentences or command lines; every other text is a value."""
_IN = r"[^\s'\"`,;:()<>\[\]{}|=]"  # of a path without quotation marks
_ROOT = r"(?:(?:~[\w.-]*)?/{1,2}|(?:\.\.?/)+|[A-Za-z]:[\\/]{1,2}|\\\\)(?=[\w.~@+-])"
_PATH = re.compile(
    rf"(?P<web>\w+://{_IN}+)"
    rf"|(?P<quote>['\"`])(?P<quoted>{_ROOT}[^'\"`\n]+)(?P=quote)"
    rf"|(?<![\w)\]}}%./<…*\\~]){_ROOT}{_IN}*"
)
_LOGIN = re.compile(r"(?<=://)[^\s/@'\"]+@")
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_ADDRESS = re.compile(rf"(?<![\w.-])(?!127\.|0\.0\.0\.0){_BYTE}(?:\.{_BYTE}){{3}}(?![\w-]|\.\w)")
_PACKAGE = re.compile(r".*[/\\](?:site-packages|dist-packages|lib[/\\]python[\d.]+)[/\\](.+)")
_OWN = re.compile(rf"{re.escape(str(Path(__file__).parents[1]))}[/\\]((?:bench|gnnmoe|examples)[/\\].+)")


def without_places(value: Any, name: str = "") -> Any:
    """Return a text, or a nested value of JSON with all its texts, without a place of this machine.

    An absolute path, and one that climbs, becomes its last part. The path of a file of an installed package
    or of this project becomes its path in the package. Prose is a text alone, or under a key of ``PROSE``:
    there, host, IP address, user and the login of a URL become ``HOST`` and ``USER``. Keys and the values of
    flags stay, because a user may be called max.
    """
    if isinstance(value, dict):
        return {key: without_places(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, name) for item in value]
    if not isinstance(value, str):
        return value
    text = _PATH.sub(_last_part, value) if "/" in value or "\\" in value else value
    if name not in PROSE:
        return text
    text = _ADDRESS.sub("HOST", _LOGIN.sub("USER@", text))
    names, pattern = _own_names()
    return pattern.sub(lambda found: names[found[0].lower()], text) if pattern else text


def _last_part(found: re.Match[str]) -> str:
    if found["web"] and not found["web"].startswith("file:"):
        return found[0]
    quote = found["quote"] or ""
    path = found["quoted"] or found[0].rstrip(".")  # the end of a sentence
    after = "" if quote else found[0].removeprefix(path)
    in_package = _PACKAGE.match(path) or _OWN.match(path)
    name = in_package[1] if in_package else re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
    return f"{quote}{name}{quote}{after}"


@cache
def _own_names() -> tuple[dict[str, str], re.Pattern[str] | None]:
    """Return what stands for this machine's host names and the user's name, and what finds them."""
    host = platform.node()
    names = {host: "HOST", host.partition(".")[0]: "HOST"}
    with suppress(Exception):  # the system may not know the user: KeyError or OSError, by version
        names.setdefault(getpass.getuser(), "USER")
    names = {
        name.lower(): word
        for name, word in names.items()
        if len(name) > 1 and name.lower() not in SAYS_NOTHING
    }
    longest = sorted(names, key=len, reverse=True)
    form = rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])"  # none within --max-steps
    return names, re.compile(form, re.IGNORECASE) if names else None
