"""Text from a folder: the published token files, plain text files, or parquet files as on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from bench.data.sources import REMEDY, Text, digest, join_rows, no_text_column
from bench.data.split import SPLITS
from gnnmoe.config import Refused

TOKEN_FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}
_FORMS = {  # the three kinds of folder, each with the patterns of its files
    "tokens": {split: (name,) for split, name in TOKEN_FILES.items()},
    "parquet": {split: (f"{split}-*.parquet",) for split in SPLITS},
    "txt": {"train": ("train.txt",), "validation": ("validation.txt", "valid.txt"), "test": ("test.txt",)},
}


def read_folder(folder: Path, text_column: str = "text") -> Text:
    """Return the text of ``folder``, which holds all three splits in one form.

    ``text_column`` is for parquet files. Raises Refused with what is there and the remedy; of what
    is inside a file only when the text is read.
    """
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise Refused(f"data folder {folder} {state}; {REMEDY}")
    form, paths = _files_of(folder)
    contents = {split: [(path, _read_bytes(path)) for path in paths[split]] for split in SPLITS}
    hashes = {
        path.name: hashlib.sha256(raw).hexdigest() for files in contents.values() for path, raw in files
    }
    key = [[hashes[path.name] for path in paths[split]] for split in SPLITS]

    def read() -> dict[str, str]:
        return {
            split: "".join(_decode(path, raw, text_column) for path, raw in files)
            for split, files in contents.items()
        }

    return Text("folder", digest(form, text_column if form == "parquet" else "", key), read, hashes)


def _files_of(folder: Path) -> tuple[str, dict[str, list[Path]]]:
    """Return the one form in which ``folder`` holds all three splits, and each split's files."""
    try:
        found = {
            form: {s: sorted(p for name in names for p in folder.glob(name)) for s, names in patterns.items()}
            for form, patterns in _FORMS.items()
        }
        listing = _listing(folder)
    except OSError as error:
        raise Refused(f"data folder {folder} cannot be read ({error.strerror}); {REMEDY}") from error
    complete = [form for form, files in found.items() if all(files.values())]
    if len(complete) > 1:
        raise Refused(
            f"data folder {folder} holds its text as {' and as '.join(complete)}, and which one is meant "
            f"cannot be known; it holds {listing}; keep one kind in the folder"
        )
    if not complete:
        form = max(found, key=lambda form: sum(map(bool, found[form].values())))
        missing = [" or ".join(_FORMS[form][split]) for split in SPLITS if not found[form][split]]
        raise Refused(
            f"data folder {folder} lacks {', '.join(missing)}; it holds {listing}; "
            f"all three must be of one kind; {REMEDY}"
        )
    files = found[complete[0]]
    for split in SPLITS:
        _refuse_wrong_number(folder, split, files[split])
    return complete[0], files


def _refuse_wrong_number(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Refuse a part of a parquet file's shards, shards of two exports, or two text files."""
    names = [path.name for path in files]
    totals = {int(match[1]) for name in names if (match := re.search(r"-of-([0-9]+)\.parquet$", name))}
    wrong = totals != {len(names)} if totals else len(names) > 1 and names[0].endswith(".txt")
    if wrong:
        needs = f"{max(totals)} files" if totals else "one file"
        raise Refused(
            f"data folder {folder}: the {split} split needs {needs}, and there are {len(names)}: "
            f"{_shorten(names)}; put the whole split there, once"
        )


def _listing(folder: Path) -> str:
    return _shorten(sorted(path.name for path in folder.iterdir()))


def _shorten(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); {REMEDY}") from error


def _decode(path: Path, raw: bytes, text_column: str) -> str:
    if path.suffix == ".parquet":
        text = _decode_parquet(path, raw, text_column)
    else:
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refused(
                f"{path} is not UTF-8 text ({error}); fetch the file again, or save it as UTF-8"
            ) from error
    if not text.strip():
        raise Refused(f"{path} holds no text; fetch the file again")
    return text


def _decode_parquet(path: Path, raw: bytes, text_column: str) -> str:
    import pandas as pd

    try:
        frame = pd.read_parquet(BytesIO(raw))
    except Exception as error:  # pyarrow raises several kinds for a damaged file
        raise Refused(f"{path} is not a parquet file ({error}); fetch the file again") from error
    columns = [name for name in frame.columns if pd.api.types.is_string_dtype(frame[name].dropna())]
    if text_column not in columns:
        raise Refused(no_text_column(str(path), text_column, columns))
    return join_rows(frame[text_column].fillna(""))
