"""Texts and studies that change hands: theirs shown as text and kept in its folder, ours without a place.

What a run writes names no absolute path, no host and no user: ``without_places``.
"""

from __future__ import annotations

import getpass
import platform
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from gnnmoe.config import Refused

MOST_NESTED = 100
"""Levels of nested JSON that are read; a record has about 8."""
LONGEST_NAME = 200
"""Letters of a file name that a file may name; those of a report and of a run have at most 40."""
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, C1), what overrides the direction of writing, and what UTF-8 cannot hold."""


def visible(text: str, keep: str = "") -> str:
    r"""Return ``text`` with each control character as its escape (``\x1b``), but for those in ``keep``."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def shown(value: Any, name: str = "") -> Any:
    """Return a nested value of JSON as it may be shown: every text and key ``visible``.

    The texts under the name ``error`` keep their line breaks.

    Raises:
        Refused: it is nested too deeply.
    """
    return _shown(value, name, MOST_NESTED)


def inside(folder: Path, name: str, source: Path) -> Path:
    """Return the path of the file ``name`` in ``folder``, as the file ``source`` names it.

    Raises:
        Refused: the name leaves the folder; or a symbolic link does.
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
    """Return the path of the file ``name`` of our own in ``folder``, which others may have made.

    Raises:
        Refused: it is, or lies behind, a symbolic link that leads out of the folder.
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


def _shown(value: Any, name: str, levels: int) -> Any:
    if isinstance(value, str):
        return visible(value, keep="\n" if name == "error" else "")
    if not isinstance(value, dict | list):
        return value
    if not levels:
        raise Refused(f"it is nested more than {MOST_NESTED} levels deep")
    if isinstance(value, dict):
        return {visible(key): _shown(item, key, levels - 1) for key, item in value.items()}
    return [_shown(item, name, levels - 1) for item in value]


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


SAYS_NOTHING = frozenset({"root", "user", "admin", "localhost", "runner", "ubuntu", "linux", "cpu", "gpu",
                          "cuda", "data", "train", "test", "mean", "gate", "topk", "static", "dense",
                          "attention", "gnn", "hgnn", "quick", "baseline", "full", "original"})  # fmt: skip
"""Names of users and machines that are no one's, and words of every record or command line."""
PROSE = frozenset({"", "command", "detail", "error", "reason", "remark", "warning"})
"""Names of the texts in a record that are sentences or command lines; all else is a value."""
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

    Of an absolute path, and of one that climbs, the last part stays; of a file of an installed package or
    of this project its path in the package. In prose, which is a text by itself or under a name of ``PROSE``,
    host, IP address, user and the login of a URL become ``HOST`` and ``USER``. Keys and the values of flags
    stay: a user may be called max.
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
    after = "" if quote else found[0][len(path):]  # fmt: skip
    in_package = _PACKAGE.match(path) or _OWN.match(path)
    name = in_package[1] if in_package else re.split(r"[/\\]+", path.rstrip("/\\"))[-1]
    return f"{quote}{name}{quote}{after}"


@cache
def _own_names() -> tuple[dict[str, str], re.Pattern[str] | None]:
    """Return what stands for this machine's host names and the user's, and what finds them."""
    host = platform.node()
    names = {host: "HOST", host.partition(".")[0]: "HOST"}
    with suppress(Exception):  # a user that the system does not know: KeyError or OSError, by version
        names.setdefault(getpass.getuser(), "USER")
    names = {name.lower(): word for name, word in names.items()
             if len(name) > 1 and name.lower() not in SAYS_NOTHING}  # fmt: skip
    longest = sorted(names, key=len, reverse=True)
    form = rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])"  # none within --max-steps
    return names, re.compile(form, re.IGNORECASE) if names else None
