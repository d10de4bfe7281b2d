"""The cache of prepared corpora: one file for each content, safe where several runs write at once.

A file can be deleted at any time; a broken one is made again. Nothing in it is executed (no pickle).
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.data.split import SPLITS, Split
from bench.data.tokenizer import Content
from bench.data.vocabulary import Vocabulary

FORMAT = 1  # one more whenever the same source would be prepared or stored differently
_NUMBERS = ("num_tokens", "num_words", "num_lines", "num_bytes", "sha256")


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Return ``cache_dir``, else $GNNMOE_CACHE_DIR, $XDG_CACHE_HOME/gnnmoe or ~/.cache/gnnmoe."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = cache_dir or os.environ.get("GNNMOE_CACHE_DIR") or Path(base, "gnnmoe")
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir(), "gnnmoe")


def cached_content(identity: list[Any], make: Callable[[], Content], folder: Path) -> Content:
    """Return the content that ``identity`` (JSON) names: from ``folder``, else made and put there.

    A broken file is replaced, a folder that cannot be used is passed over; each gives one warning.
    Raises what ``make`` raises.
    """
    key = sha256(json.dumps([FORMAT, *identity]).encode()).hexdigest()
    path = folder / f"corpus-{key[:32]}.npz"
    try:
        return _read(path, key)
    except OSError:
        pass  # absent, or out of reach: then writing fails too, and says so
    except Exception as error:  # garbage fails in many ways: zip, numpy, JSON, a missing key
        warnings.warn(
            f"the cached corpus {path} is broken ({_reason(error)}); it is prepared anew", stacklevel=3
        )
    content = make()
    try:
        replace_file(path, lambda file: _write(file, content, key))
    except OSError as error:
        warnings.warn(
            f"the prepared corpus cannot be kept in {folder} ({_reason(error)}), so each run prepares it "
            "again; set GNNMOE_CACHE_DIR to a folder that can be written",
            stacklevel=3,
        )
    return content


def replace_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a new file, then put it at ``path``: readers see all of it or nothing.

    Raises OSError, and leaves no part of a file behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with part.open("xb") as file:
            write(file)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _write(file: IO[bytes], content: Content, key: str) -> None:
    splits = content.splits
    about = {
        "format": FORMAT,
        "key": key,
        "num_distinct_words": content.num_distinct_words,
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


def _read(path: Path, key: str) -> Content:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        if (about["format"], about["key"]) != (FORMAT, key):
            raise ValueError("it belongs to another corpus or format")
        words = arrays["words"].tobytes().decode()
        vocabulary = Vocabulary(tuple(words.split("\n")), arrays["counts"])
        splits = {name: _read_split(name, arrays, about["splits"][name], vocabulary.size) for name in SPLITS}
        return Content(vocabulary, splits, about["num_distinct_words"])


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
