"""The cache: files of results that can be computed again, such as prepared corpora and scores.

Several runs may write at once, and a file can be deleted at any time. Each file ends with a hash of its
contents. The hash is compared at every reading, and a broken file is made again. Nothing in a file is
executed (no pickle).
"""

from __future__ import annotations

import ast
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from bench.data.tokenizer import SPLITS, Content, Split, Vocabulary
from bench.files import remove_left_over, replacing
from gnnmoe.reading import read_bytes

MADE_BY = ("cache", "tokenizer")  # modules that prepare a text and store it
LEFT_OVER_SECONDS = 3600.0  # an older temporary file belongs to a writer that was killed
HERE = Path(__file__).parent
NO_CODE = frozenset({"ctx", "kind", "type_comment", "type_ignores"})  # fields of a node that change nothing
_NUMBERS = ("num_tokens", "num_words", "num_lines", "num_bytes", "sha256")
_MASKS = ("ends_word", "unknown")
MOST_CACHED = 2**34  # bytes
_SEAL_BYTES = len("\nsha256 \n") + 64
Made = TypeVar("Made")


def cache_folder() -> Path:
    """Return $GNNMOE_CACHE_DIR, else $XDG_CACHE_HOME/gnnmoe, else ~/.cache/gnnmoe."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("GNNMOE_CACHE_DIR") or Path(base, "gnnmoe")
    try:
        return Path(folder).expanduser()
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir(), "gnnmoe")


def cached_content(identity: list[Any], make: Callable[[], Content]) -> Content:
    """Return the content that ``identity`` (JSON) names, from the cache or from ``make`` (see ``cached``).

    Content that other code prepared has another name.
    """
    path = cache_folder() / f"corpus-{key_of(code_of(HERE, *MADE_BY), *identity)}.npz"
    return cached(path, "prepared corpus", make, read=_read, write=_write)


def key_of(*identity: Any) -> str:
    """Return 32 hex digits for a file's name; its contents depend on ``identity`` (JSON) alone."""
    return sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def code_of(folder: Path, *names: str) -> str:
    """Return one hash of the code of the modules ``names`` in a folder, for the key of what they store."""
    hashes = [syntax_sha256((folder / f"{name}.py").read_bytes()) for name in names]
    return sha256("\n".join(hashes).encode()).hexdigest()


@lru_cache(maxsize=1024)
def syntax_sha256(source: bytes) -> str:
    """Return the hash of a module's syntax tree, without comments, docstrings and layout.

    Every Python version gives the same hash.
    """
    parts: list[str] = []
    _write_tree(ast.parse(source), parts)
    return sha256("".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _write_tree(value: Any, parts: list[str]) -> None:
    """Append a node, a list or a plain value to ``parts``, but no statement that is a text alone."""
    if isinstance(value, ast.AST):
        parts.append(f"({type(value).__name__}")
        for name in value._fields:
            part = getattr(value, name, None)
            if isinstance(value, ast.JoinedStr) and name == "values":  # Python 3.12 adds empty texts
                part = [item for item in value.values if getattr(item, "value", None) != ""]
            if part is not None and part != [] and name not in NO_CODE:
                parts.append(f" {name}=")
                _write_tree(part, parts)
        parts.append(")")
    elif isinstance(value, list):
        parts.append("[")
        for item in value:
            if not _is_text(item):
                _write_tree(item, parts)
        parts.append("]")
    else:
        parts.append(repr(value))


def _is_text(node: Any) -> bool:
    """Whether a statement is a text alone: a docstring of a module, class, function or attribute."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def cached(
    path: Path,
    what: str,
    make: Callable[[], Made],
    *,
    read: Callable[[IO[bytes]], Made],
    write: Callable[[IO[bytes], Made], object],
) -> Made:
    """Return the contents of the file at ``path``, or the result of ``make``, which ``write`` then keeps.

    A broken file is replaced. A folder that cannot be written is left alone. Each gives one warning about
    ``what``.
    """
    found = kept(path, what, read)
    if found is not None:
        return found
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


def kept(path: Path, what: str, read: Callable[[IO[bytes]], Made]) -> Made | None:
    """Return what ``read`` finds in the file at ``path``; None if there is no file or it is broken.

    A broken file gives one warning about ``what``. A file is broken if its contents or its name do not agree
    with its hash, or if ``read`` raises.
    """
    try:
        raw = read_bytes(path, MOST_CACHED)
    except OSError:
        return None  # absent, or not readable: then writing fails too, with a message
    contents = raw[:-_SEAL_BYTES]
    try:
        if raw[-_SEAL_BYTES:] != _seal(path.name, BytesIO(contents)):
            raise ValueError("its contents are not those that were stored")
        return read(BytesIO(contents))
    except Exception as error:  # garbage and files of other versions fail in many ways
        warnings.warn(f"the {what} in {path} is broken ({_reason(error)}); it is made anew", stacklevel=5)
        return None


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a new file, add its hash, and put it at ``path``: readers see all or nothing.

    The last line has the sha256 of the file's name and of its contents; ``kept`` compares it. Left-overs of
    killed writers are removed.

    Raises:
        OSError: the file cannot be written; no part of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(path.with_name(f"*{path.suffix}"), LEFT_OVER_SECONDS)
    with replacing(path) as file:
        write(file)
        file.seek(0)
        file.write(_seal(path.name, file))


def _seal(name: str, contents: IO[bytes]) -> bytes:
    """Return the last line of a file with this name and these contents, which are read to their end."""
    digest = file_digest(contents, lambda: sha256(f"{name}\n".encode()))  # pyright: ignore
    return f"\nsha256 {digest.hexdigest()}\n".encode()


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0]


def _write(file: IO[bytes], content: Content) -> None:
    splits = content.splits
    about = {
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
        for mask in _MASKS:
            if getattr(split, mask) is not None:
                arrays[f"{name}.{mask}"] = np.packbits(getattr(split, mask))
    np.savez(file, **arrays)


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _compact(values: np.ndarray) -> np.ndarray:
    return values.astype(np.min_scalar_type(int(values.max())))


def _read(file: IO[bytes]) -> Content:
    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        words = arrays["words"].tobytes().decode()
        vocabulary = Vocabulary(tuple(words.split("\n")), arrays["counts"])
        size = vocabulary.size
        splits = {name: _read_split(name, arrays, about["splits"][name], size) for name in SPLITS}
        return Content(vocabulary, splits, about["num_distinct_words"], about["merges_sha256"])


def _read_split(name: str, arrays: Any, numbers: dict[str, Any], size: int) -> Split:
    """Return a split of a vocabulary of ``size`` words.

    Raises:
        ValueError: an array has another type or shape than the split, or an id that no word has.
    """
    count = numbers["num_tokens"]
    starts = arrays[f"{name}.document_starts"]
    lengths = {"stream": count + 1, "target_bytes": count, "document_starts": starts.size}
    for part, length in lengths.items():
        values = arrays[f"{name}.{part}"]
        if values.dtype.kind not in "iu" or values.shape != (length,) or values.min(initial=0) < 0:
            raise ValueError(f"{name}.{part} is {values.dtype} of shape {values.shape}")
    if int(arrays[f"{name}.stream"].max()) >= size:
        raise ValueError(f"{name} has an id that no word has")
    packed = {mask: arrays[f"{name}.{mask}"] for mask in _MASKS if f"{name}.{mask}" in arrays}
    return Split(
        name=name,
        stream=arrays[f"{name}.stream"].astype(np.int64),
        document_starts=arrays[f"{name}.document_starts"],
        target_bytes=arrays[f"{name}.target_bytes"].astype(np.int32),
        **{mask: np.unpackbits(bits, count=count).astype(bool) for mask, bits in packed.items()},
        **{field: numbers[field] for field in _NUMBERS},
    )
