"""Texts without a place or a name of the machine: what is published of a record says what, and not where.

Absolute paths, home and temporary folders and what lies above the working folder become ``PATH``; of a file
its name stays, of a library's or the project's own source its place in the package. Host and user become
``HOST`` and ``USER``. What is neutral already stays as it is, so that twice is once.
"""

from __future__ import annotations

import getpass
import platform
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PLACE, HOST, USER = "PATH", "HOST", "USER"
FOLDERS = {"data_dir": "data", "results_dir": "results", "checkpoint_dir": "checkpoints"}
"""Flags, by field, whose value is a folder; and what they become, also where it is a relative one."""
SAYS_NOTHING = frozenset({"root", "user", "admin", "localhost", "runner", "ubuntu", "linux", "cpu", "gpu",
                          "cuda", "data", "train", "test"})  # fmt: skip
"""Names of users and machines that are no one's, and words of every record."""
FILE = re.compile(r"[\w.+-]+\.(py|toml|json|jsonl|npz|pt|txt|tokens|parquet|md|so|log|ipynb)")
REPOSITORY = Path(__file__).parents[2]
_FIELD, _FLAG = re.compile(r"\w+"), re.compile(r"--[\w-]+")
_COLOUR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_LOGIN = re.compile(r"(?<=://)[^\s/@'\"]+@")
_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_ADDRESS = re.compile(rf"(?<![\w.-])(?!127\.|0\.0\.0\.0){_BYTE}(?:\.{_BYTE}){{3}}(?![\w-]|\.\w)")
_IN = r"[^\s'\"`,;:()<>\[\]{}|=]"  # of a path without quotation marks
_ROOT = r"(?:file://[\w.-]*)?(?:(?:~[\w.-]*)?/{1,2}|[A-Za-z]:[\\/]{1,2}|\\\\)(?=[\w.~@+-])"  # absolute
_PATHS = re.compile(
    rf"(?P<web>https?://{_IN}+)"
    rf"|(?P<quote>['\"`])(?P<quoted>(?:{_ROOT}|{PLACE}/)[^'\"`\n]+)(?P=quote)"
    rf"|(?:(?<![\w)\]}}%./<…*\\~])|(?<=\s-[A-Za-z])){_ROOT}{_IN}+"
    rf"|(?<![\w./])(?:\./)*(?:\.\.[/\\])+{_IN}*"
    rf"|(?<![\w/]){PLACE}/{_IN}+"
)


class Neutral:
    """Makes texts neutral: ``known`` paths (with a separator) as it says, everything else by its form.

    ``hide`` are further names, such as the host that a study ran on where that is another one.
    """

    def __init__(self, known: Mapping[str, str] | None = None, hide: Iterable[str] = ()) -> None:
        own = {str(folder): PLACE for folder in own_folders()}
        paths = {path: name for path, name in {**own, **(known or {})}.items() if re.search(r"[/\\]", path)}
        names = {**dict.fromkeys(hide, HOST), **own_names()}
        self._paths, self._path = paths, _any_of(paths, r"(?<![\w/\\.-])", r"(?![\w-])", 0)
        self._names = {name.lower(): word for name, word in names.items()}
        self._name = _any_of(self._names, r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])", re.IGNORECASE)

    def text(self, text: str) -> str:
        """Return a text of any kind, also of many lines; colours of a terminal go."""
        text = _COLOUR.sub("", text)
        if self._path:
            text = self._path.sub(lambda found: self._paths[found[0]], text)
        text = _ADDRESS.sub(HOST, _PATHS.sub(_without_place, _LOGIN.sub(f"{USER}@", text)))
        return self._name.sub(lambda found: self._names[found[0].lower()], text) if self._name else text

    def command(self, command: str) -> str:
        """Return a line of shell: its words one by one, folders of the project's flags by what they are."""
        try:
            words = shlex.split(command)
        except ValueError:  # no line of shell
            return self.text(command)
        flags = {f"--{name.replace('_', '-')}": folder for name, folder in FOLDERS.items()}
        found: list[str] = []
        for place, word in enumerate(words):
            flag, equals, value = word.partition("=")
            folder = flags.get(flag.replace("_", "-"))
            before = flags.get(words[place - 1].replace("_", "-")) if place else None
            if folder and equals:
                found.append(f"{flag}={folder}")
            elif before and not word.startswith("-"):
                found.append(before)
            elif flag.startswith("-") and equals:
                found.append(f"{flag if _FLAG.fullmatch(flag) else self.text(flag)}={self._word(value)}")
            else:
                found.append(word if _FLAG.fullmatch(word) else self._word(word))
        return shlex.join(found)

    def value(self, value: Any) -> Any:
        """Return a nested value for JSON with every text in it neutral.

        Keys too, but for names of fields: max_steps stays also where Max ran it.
        """
        if isinstance(value, dict):
            names = [key if _FIELD.fullmatch(key) else self.text(key) for key in map(str, value)]
            return {name: self.value(item) for name, item in zip(names, value.values(), strict=True)}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return self.text(value) if isinstance(value, str) else value

    def _word(self, word: str) -> str:
        """Return one word, which as a whole may be a path with blanks in it."""
        return self.text(f"'{word}'")[1:-1] if "'" not in word else self.text(word)


def own_folders() -> list[Path]:
    """Return the folders of this machine that texts may name although there are blanks in them."""
    found = [Path(tempfile.gettempdir())]
    with suppress(RuntimeError, OSError):
        found += [Path.home(), Path.cwd()]
    return [folder for folder in found if " " in str(folder)]


def own_names() -> dict[str, str]:
    """Return this machine's host names and the user's, each with the word for it."""
    host = platform.node()
    names = {host: HOST, host.partition(".")[0]: HOST}
    with suppress(Exception):  # a user that the system does not know: KeyError or OSError, by version
        names.setdefault(getpass.getuser(), USER)
    with suppress(RuntimeError):
        names.setdefault(Path.home().name, USER)
    return {name: word for name, word in names.items() if len(name) > 1 and name.lower() not in SAYS_NOTHING}


def base_name(path: str) -> str:
    """Return the last part of a path of any system."""
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1]


def _any_of(texts: Iterable[str], before: str, after: str, flags: int) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest_first))}){after}", flags) \
        if longest_first else None  # fmt: skip


def _without_place(found: re.Match[str]) -> str:
    if found["web"]:
        return found[0]
    if found["quote"]:
        return f"{found['quote']}{_neutral(found['quoted'])}{found['quote']}"
    path = found[0].rstrip(".")  # the end of a sentence
    return _neutral(path) + found[0][len(path):]  # fmt: skip


def _neutral(path: str) -> str:
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    for packages in ("site-packages", "dist-packages"):
        if packages in parts[:-1]:
            return "/".join(parts[parts.index(packages) + 1:])  # fmt: skip
    for place in range(len(parts) - 1):
        own = "/".join(parts[place:])
        if parts[place] in ("bench", "gnnmoe", "examples") and (REPOSITORY / own).is_file():
            return own
    last = parts[-1] if parts else ""
    if re.fullmatch(r"python[\d.]*", last):
        return last
    return f"{PLACE}/{last}" if FILE.fullmatch(last) else PLACE
