"""Where the text of a corpus comes from: a folder, a data set of the hub by its name, or Python itself.

Every reader returns a ``Text`` or raises Refused with what it found and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.data.tokenizer import SPLITS
from bench.files import kind_of
from gnnmoe.config import Refused, brief, listed, shortened, unknown_name
from gnnmoe.reading import open_file

PROBE_SECONDS = 2.0  # within which the hub must answer
WIKITEXT = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
"""The configurations of wikitext, the default first."""
TOKEN_FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}
REMEDY = (
    "pass --data-dir DIR, a folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens "
    "(or train.txt …, or train-*.parquet …)"
)
TEXT_TYPES = ("string", "large_string", "string_view")
"""The types of a column of text, as pyarrow and ``datasets`` name them."""
EMBEDDED_MIN_COUNT = 2  # in the embedded text, a word seen once in training becomes <unk>
_EMBEDDED_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}

_FORMS = {  # the three kinds of folder, each with the patterns of its files
    "tokens": {split: (name,) for split, name in TOKEN_FILES.items()},
    "parquet": {split: (f"{split}-*.parquet",) for split in SPLITS},
    "txt": {"train": ("train.txt",), "validation": ("validation.txt", "valid.txt"), "test": ("test.txt",)},
}
_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")
_COMMIT, _HASH_OF_FILES = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{16}")
# Words, numbers and punctuation of prose, without operators, brackets and quotes.
_PROSE = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?|[0-9]+(?:[.][0-9]+)*|[.,;:!?]")


@dataclass(frozen=True)
class Text:
    """The text of each split, with its identity.

    ``origin`` is "folder", "cache" or "hub". ``digest`` identifies the bytes and how they are read. ``read``
    returns ``{"train": text, "validation": text, "test": text}`` or raises Refused. ``files`` has the SHA-256
    of each file of a folder.
    """

    origin: str
    digest: str
    read: Callable[[], Mapping[str, str]]
    files: Mapping[str, str] = field(default_factory=dict)


def digest(*parts: Any) -> str:
    """Return a hash of ``parts``, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _no_text_column(where: str, text_column: str, columns: Sequence[str]) -> str:
    there = listed([repr(shortened(column)) for column in columns]) or "none"
    asked = repr(shortened(text_column))
    return f"{where} has no text column {asked}; its text columns: {there}; name one by --text-column"


def join_rows(rows: Iterable[str | None]) -> str:
    """Return one text from rows of one or more lines each; a row may lack its last line break."""
    return "".join(row if row.endswith("\n") else f"{row}\n" for row in (row or "" for row in rows))


# --- a folder: the published token files, plain text files, or parquet files as on the hub -----------


def read_folder(folder: Path, text_column: str) -> Text:
    """Return the text of ``folder``, which holds all three splits in one form.

    ``text_column`` applies to parquet files. The contents of the files are decoded only when the text is
    read.

    Raises:
        Refused: naming the files of the folder and the remedy.
    """
    kind = kind_of(folder)
    if kind != "folder":
        state = "does not exist" if kind is None else "is not a folder"
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
    """Return the one form in which ``folder`` holds all three splits, and the files of each split."""
    try:
        there = sorted(path.name for path in folder.iterdir())  # with links that point nowhere
    except OSError as error:
        raise Refused(f"data folder {folder} cannot be read ({error.strerror}); {REMEDY}") from error
    found = {
        form: {
            split: [folder / name for name in there if any(fnmatchcase(name, one) for one in of_split)]
            for split, of_split in patterns.items()
        }
        for form, patterns in _FORMS.items()
    }
    listing = _shorten(there)
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
            f"data folder {folder} lacks {', '.join(missing)} (all three of one kind); it holds {listing}; "
            "name another --data-dir."
        )
    files = found[complete[0]]
    for split in SPLITS:
        _refuse_wrong_number(folder, split, files[split])
    return complete[0], files


def _refuse_wrong_number(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Refuse an incomplete set of parquet shards, shards of two exports, and two text files."""
    names = [path.name for path in files]
    totals = {int(match[1]) for name in names if (match := re.search(r"-of-([0-9]+)\.parquet$", name))}
    wrong = totals != {len(names)} if totals else len(names) > 1 and names[0].endswith(".txt")
    if wrong:
        needs = f"{max(totals)} files" if totals else "one file"
        raise Refused(
            f"data folder {folder}: the {split} split needs {needs}, and there are {len(names)}: "
            f"{_shorten(names)}; put the whole split there, once"
        )


def _shorten(names: Sequence[str]) -> str:
    return listed([brief(name)[1:-1] for name in names]) or "nothing"


def _read_bytes(path: Path) -> bytes:
    kind = kind_of(path)
    if kind is None:
        raise Refused(f"{path} is a link whose target does not exist; {REMEDY}")
    if kind == "other":  # a pipe would be waited for
        raise Refused(f"{path} is a pipe or a device, not a file; {REMEDY}")
    try:
        with open_file(path) as file:
            return file.read()
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
    _refuse_zero_bytes(str(path), text)
    return text


def _refuse_zero_bytes(where: str, text: str) -> None:
    """Refuse an archive, UTF-16 without a mark, and other files that are no text.

    Raises:
        UnfitDataset: names the place of the first zero byte.
    """
    place = text.find("\0")
    if place >= 0:
        line = text.count("\n", 0, place) + 1
        raise UnfitDataset(
            f"{where} is no text: line {line} holds a zero byte, at letter {place + 1:,} of the whole. "
            "It may be an archive, or UTF-16; unpack it, or save it as UTF-8"
        )


def _decode_parquet(path: Path, raw: bytes, text_column: str) -> str:
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_dictionary

    try:
        file = ParquetFile(BytesIO(raw))
        fields = list(file.schema_arrow)
    except Exception as error:  # pyarrow raises several kinds for a damaged file
        raise Refused(f"{path} is not a parquet file ({error}); fetch the file again") from error
    kinds = (field.type.value_type if is_dictionary(field.type) else field.type for field in fields)
    columns = [field.name for field, kind in zip(fields, kinds, strict=True) if str(kind) in TEXT_TYPES]
    if text_column not in columns:
        raise Refused(_no_text_column(str(path), text_column, columns))
    if sum(field.name == text_column for field in fields) > 1:
        raise Refused(
            f"{path} has several columns {brief(text_column)}; rename them, or name another by --text-column"
        )
    try:
        return join_rows(file.read(columns=[text_column])[text_column].to_pylist())
    except Exception as error:  # as above
        raise Refused(f"{path} is damaged ({error}); fetch the file again") from error


# --- a data set by its name: from the local cache of ``datasets``, or from the hub -------------------


class MadeHere(Refused):
    """The cache of ``datasets`` has an entry of this name, but made from local files, not from the hub."""


class UnfitDataset(Refused):
    """A data set was read and cannot be used: a split or a column is missing, or there is no text."""


def refuse_path(dataset_name: str) -> None:
    """Refuse the name of a data set for which ``datasets`` would read files of this machine.

    Raises:
        Refused: naming the obstacle and the remedy.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as formats

    name = _repository(dataset_name)
    if not _NAME.fullmatch(name) or ".." in name:
        raise Refused(
            f"--dataset takes the name of a data set, such as wikitext or owner/name, and never a path; got "
            f"{brief(dataset_name)}. To read files, pass --data-dir DIR."
        )
    if name in formats:
        raise Refused(
            f"--dataset {name} names a file format of `datasets`, by which it would read the files of the "
            "current folder. To read files, pass --data-dir DIR."
        )
    if os.path.lexists(name):
        raise Refused(
            f"--dataset {name} takes the name of a data set and never reads a path, but {name} is in the "
            f"current folder, and `datasets` would read it. To read it, pass --data-dir {name}. To read the "
            "data set of this name, start in another folder."
        )


def _repository(dataset_name: str) -> str:
    return "Salesforce/wikitext" if dataset_name == "wikitext" else dataset_name


def known_as(dataset_name: str | None, config_name: str | None) -> tuple[str, str]:
    """Return the data set and its configuration, "" without one.

    The name of wikitext on the hub, the name of one of its configurations, and no name at all all mean
    ("wikitext", configuration).

    Raises:
        Refused: wikitext has no such configuration.
    """
    if dataset_name in WIKITEXT:
        if config_name not in (None, dataset_name):
            raise Refused(
                f"the data set {dataset_name} is a configuration of wikitext, and {config_name} is asked for "
                "too; give one of them"
            )
        return "wikitext", dataset_name
    if dataset_name not in (None, "wikitext", "Salesforce/wikitext"):
        return dataset_name, config_name or ""
    if config_name not in (None, *WIKITEXT):
        raise Refused(unknown_name("configuration of wikitext", config_name, WIKITEXT))
    return "wikitext", config_name or WIKITEXT[0]


def read_named(dataset_name: str, config_name: str, text_column: str) -> Text:
    """Return the text of a data set by its name, from the local cache of ``datasets`` or from the hub.

    The hub is probed first, because ``datasets`` itself retries for many seconds without a connection. The
    name is not a path (``refuse_path``).

    Raises:
        Refused: naming the reason.
    """
    repository = _repository(dataset_name)
    title = _title(repository, config_name)
    try:
        return _named("cache", read_cache(repository, config_name, text_column))
    except UnfitDataset:
        raise
    except Exception as error:  # if the cache is damaged in any way, the hub may still work
        if not hub_reachable():
            why = error if isinstance(error, MadeHere) else f"{title} is not in the local cache of `datasets`"
            raise Refused(f"{why}, and the hub cannot be reached") from None
    try:
        return _named("hub", read_hub(repository, config_name, text_column))
    except UnfitDataset:
        raise
    except Exception as error:  # `datasets` raises many kinds: connection, access, disk
        raise Refused(f"`datasets` could not load {title}: {_reason(error)}") from error


def _title(repository: str, config_name: str) -> str:
    return f"{repository} ({config_name})" if config_name else repository


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    if lines[0].startswith("Config name is missing"):  # the next line lists the names
        return f"{' '.join(lines[:2])}; name one by --dataset-config-name"
    return lines[0]


def _named(origin: str, texts: Mapping[str, str]) -> Text:
    hashes = [hashlib.sha256(texts[split].encode()).hexdigest() for split in SPLITS]
    return Text(origin, digest(hashes), lambda: texts)


def read_cache(repository: str, config_name: str, text_column: str) -> dict[str, str]:
    """Return the texts of a data set of the hub from the cache of ``datasets``, without a connection."""
    from datasets.packaged_modules.cache.cache import Cache

    builder = Cache(
        dataset_name=repository.split("/")[-1],
        repo_id=repository,
        config_name=config_name or None,
        version="auto",
        hash="auto",
    )
    return _of_the_hub(builder.as_dataset(), _title(repository, config_name), text_column)


def read_hub(repository: str, config_name: str, text_column: str) -> dict[str, str]:
    """Return the texts as ``datasets`` downloads them."""
    from datasets import load_dataset

    dataset = load_dataset(repository, config_name or None)
    return _of_the_hub(dataset, _title(repository, config_name), text_column)


def _of_the_hub(dataset: Any, name: str, text_column: str) -> dict[str, str]:
    """Return one text for each split of a ``DatasetDict`` whose files came from the hub.

    ``datasets`` keeps a data set in OWNER___NAME/CONFIG/VERSION/HASH. A data set of local files has no owner,
    and its hash is not the hash of a repository's commit.
    """
    for split in dataset:
        for file in dataset[split].cache_files:
            entry = Path(file["filename"]).parent
            owned = "___" in entry.parents[2].name and not _HASH_OF_FILES.fullmatch(entry.name)
            if not (owned or _COMMIT.fullmatch(entry.name)):
                raise MadeHere(f"the cache of `datasets` has {name}, but made from files of this machine")
    missing = [split for split in SPLITS if split not in dataset]
    if missing:
        raise UnfitDataset(
            f"{name} has no split {', '.join(missing)}; it has {', '.join(dataset) or 'none'}; "
            "train, validation and test are needed, so name another set or split its text into files yourself"
        )
    return {split: _text_of(dataset[split], name, split, text_column) for split in SPLITS}


def _text_of(rows: Any, name: str, split: str, text_column: str) -> str:
    kinds = {name: getattr(feature, "dtype", "") for name, feature in rows.features.items()}
    columns = [name for name, kind in kinds.items() if kind in TEXT_TYPES]
    if text_column not in columns:
        raise UnfitDataset(_no_text_column(f"{name}, split {split},", text_column, columns))
    text = join_rows(rows.select_columns([text_column])[:][text_column])
    if not text.strip():
        raise UnfitDataset(f"{name} has no text in column {brief(text_column)} of split {split}")
    _refuse_zero_bytes(f"{name}, split {split},", text)
    return text


def hub_reachable() -> bool:
    """Return whether the hub answers within ``PROBE_SECONDS``; False at once if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered: list[bool] = []

    def probe() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):  # uses the environment's proxies
                answered.append(True)
        except (OSError, ValueError, HTTPException):  # HTTPException: what answers is no hub
            pass

    # A name look-up ignores the timeout, so it runs in a thread that nothing has to wait for.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answered)


# --- the embedded text: the help pages that every CPython carries ------------------------------------


def embedded_texts() -> dict[str, tuple[list[str], list[int]]]:
    """Return for each split its lines (one per paragraph) and the line at which each topic begins.

    The text is that of ``pydoc_data.topics``. It lets the project run without a folder and without the hub.
    It is not WikiText-2, and it differs between Python versions. A paragraph that several topics share is
    kept once, and no topic is in two splits.
    """
    texts: dict[str, tuple[list[str], list[int]]] = {split: ([], []) for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for paragraphs in _topics():
        tokens = sum(len(paragraph.split()) + 1 for paragraph in paragraphs)
        total = sum(sizes.values()) + tokens
        split = max(SPLITS, key=lambda name: _EMBEDDED_SHARES[name] * total - sizes[name])  # the shortest one
        lines, starts = texts[split]
        starts.append(len(lines))
        lines.extend(f" {paragraph} " for paragraph in paragraphs)
        sizes[split] += tokens
    return texts


def _topics() -> list[list[str]]:
    """Return the tokenised paragraphs of each topic, topics in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Refused(
            "this Python lacks pydoc_data.topics, the text of the embedded corpus; install Python's standard "
            "library in full, or pass --data-dir DIR (or set GNNMOE_DATA_DIR) with WikiText-2"
        ) from error
    seen: set[str] = set()
    found: list[list[str]] = []
    for name in sorted(topics):
        paragraphs = dict.fromkeys(map(_paragraph, re.split(r"\n\s*\n", topics[name])))
        fresh = [paragraph for paragraph in paragraphs if paragraph and paragraph not in seen]
        seen.update(fresh)
        if fresh:
            found.append(fresh)
    return found


def _paragraph(text: str) -> str:
    """Return the tokens of a paragraph between spaces, without lines of drawing (``*****``)."""
    drawn = (line for line in text.split("\n") if re.search(r"[A-Za-z]", line))
    return " ".join(_PROSE.findall(" ".join(drawn)))
