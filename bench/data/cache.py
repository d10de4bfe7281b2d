"""What can be made again is kept in files: here a prepared corpus, elsewhere reference lines and scores.

Safe where several runs write at once. A file can be deleted at any time; a broken one is made again.
Nothing in it is executed (no pickle).
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from bench.data.split import SPLITS, Split
from bench.data.tokenizer import Content
from bench.data.vocabulary import Vocabulary

FORMAT = 2  # one more whenever the same source would be prepared or stored differently
LEFT_OVER_SECONDS = 3600.0  # a temporary file this old is of a writer that was killed
_NUMBERS = ("num_tokens", "num_words", "num_lines", "num_bytes", "sha256")
Made = TypeVar("Made")


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Return ``cache_dir``, else $GNNMOE_CACHE_DIR, $XDG_CACHE_HOME/gnnmoe or ~/.cache/gnnmoe."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = cache_dir or os.environ.get("GNNMOE_CACHE_DIR") or Path(base, "gnnmoe")
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir(), "gnnmoe")


def cached_content(identity: list[Any], make: Callable[[], Content], folder: Path) -> Content:
    """Return the content that ``identity`` (JSON) names: from ``folder``, else made; see ``cached``."""
    key = sha256(json.dumps([FORMAT, *identity]).encode()).hexdigest()
    path = folder / f"corpus-{key[:32]}.npz"
    return cached(
        path,
        "prepared corpus",
        make,
        read=lambda file: _read(file, key),
        write=lambda file, content: _write(file, content, key),
    )


def cached(
    path: Path,
    what: str,
    make: Callable[[], Made],
    *,
    read: Callable[[IO[bytes]], Made | None],
    write: Callable[[IO[bytes], Made], None],
) -> Made:
    """Return what ``read`` finds in the file at ``path``, else what ``make`` returns, which ``write`` keeps.

    ``read`` returns None for a file that is out of date and raises for one that is broken. A broken
    file is replaced, a folder that cannot be used is passed over; each gives one warning about
    ``what``. Raises what ``make`` raises.
    """
    try:
        with path.open("rb") as file:
            found = read(file)
        if found is not None:
            return found
    except OSError:
        pass  # absent, or out of reach: then writing fails too, and says so
    except Exception as error:  # garbage fails in many ways: zip, numpy, JSON, a missing key
        warnings.warn(f"the {what} in {path} is broken ({_reason(error)}); it is made anew", stacklevel=4)
    made = make()
    try:
        replace_file(path, lambda file: write(file, made))
    except OSError as error:
        warnings.warn(
            f"the {what} cannot be kept in {path.parent} ({_reason(error)}), so each run makes it again; "
            "set GNNMOE_CACHE_DIR to a folder that can be written",
            stacklevel=4,
        )
    return made


def replace_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a new file, then put it at ``path``: readers see all of it or nothing.

    Raises OSError, and leaves no part of a file behind; what killed writers left there goes too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path)
    part = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with part.open("xb") as file:
            write(file)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _remove_left_over(path: Path) -> None:
    before = time.time() - LEFT_OVER_SECONDS
    for part in path.parent.glob(f".*{path.suffix}-*-*.tmp"):
        with suppress(OSError):  # another process was quicker
            if part.stat().st_mtime < before:
                part.unlink()


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _write(file: IO[bytes], content: Content, key: str) -> None:
    splits = content.splits
    about = {
        "format": FORMAT,
        "key": key,
        "num_distinct_words": content.num_distinct_words,
        "merges_sha256": content.merges_sha256,
        "splits": {name: {field: getattr(splits[name], field) for field in _NUMBERS} for name in SPLITS},
    }
    arrays: dict[str, Any] = {
        "about": _as_bytes(json.dumps(about)),
        "words": _as_bytes("\n".join(content.vocabulary.words)),  # no word has a line break
        "counts": content.vocabulary.counts,
    }
    for name in SPLITS:
        split = splits[name]
        arrays[f"{name}.stream"] = _compact(split.stream)
        arrays[f"{name}.target_bytes"] = _compact(split.target_bytes)
        arrays[f"{name}.document_starts"] = split.document_starts
        if split.ends_word is not None:
            arrays[f"{name}.ends_word"] = np.packbits(split.ends_word)
    np.savez(file, **arrays)


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _compact(values: np.ndarray) -> np.ndarray:
    return values.astype(np.min_scalar_type(int(values.max())))


def _read(file: IO[bytes], key: str) -> Content:
    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        if (about["format"], about["key"]) != (FORMAT, key):
            raise ValueError("it belongs to another corpus or format")
        words = arrays["words"].tobytes().decode()
        vocabulary = Vocabulary(tuple(words.split("\n")), arrays["counts"])
        splits = {name: _read_split(name, arrays, about["splits"][name], vocabulary.size) for name in SPLITS}
        return Content(vocabulary, splits, about["num_distinct_words"], about["merges_sha256"])


def _read_split(name: str, arrays: Any, numbers: dict[str, Any], num_ids: int) -> Split:
    num_tokens = numbers["num_tokens"]
    ends = f"{name}.ends_word"
    split = Split(
        name=name,
        stream=arrays[f"{name}.stream"].astype(np.int64),
        document_starts=arrays[f"{name}.document_starts"],
        target_bytes=arrays[f"{name}.target_bytes"].astype(np.int32),
        ends_word=np.unpackbits(arrays[ends], count=num_tokens).astype(bool) if ends in arrays else None,
        **{field: numbers[field] for field in _NUMBERS},
    )
    covered = split.words_and_bytes(num_tokens)
    if covered != (split.num_words + split.num_lines, split.num_bytes):
        raise ValueError(f"the {name} split's words and bytes do not add up")
    if len(split.stream) != num_tokens + 1 or not 0 <= split.stream.min() <= split.stream.max() < num_ids:
        raise ValueError(f"the {name} split's ids do not fit the vocabulary")
    return split
