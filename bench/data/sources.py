"""What a source of text gives, and two of them: the local cache of ``datasets``, and the hub.

Every reader returns a ``Text`` or raises Refused with what is there and the remedy.
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
from pathlib import Path
from typing import Any

from bench.data.split import SPLITS
from gnnmoe.config import Refused, unknown_name

PROBE_SECONDS = 2.0
WIKITEXT = ("wikitext-2-v1", "wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1")
"""The configurations of wikitext, the first by default."""
REMEDY = (
    "pass --data-dir DIR or set GNNMOE_DATA_DIR to a folder with wiki.train.tokens, wiki.valid.tokens and "
    "wiki.test.tokens (or with train.txt, validation.txt and test.txt, or with the parquet files "
    "train-*.parquet, validation-*.parquet and test-*.parquet)"
)

_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?")
_COMMIT, _HASH_OF_FILES = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Text:
    """The text of each split, with what identifies it.

    ``origin`` is "folder", "cache" or "hub"; ``digest`` identifies the bytes and how they are read;
    ``read`` returns ``{"train": text, "validation": text, "test": text}`` or raises Refused;
    ``files`` has the SHA-256 of each file of a folder.
    """

    origin: str
    digest: str
    read: Callable[[], Mapping[str, str]]
    files: Mapping[str, str] = field(default_factory=dict)


def digest(*parts: Any) -> str:
    """Return a hash of ``parts``, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def no_text_column(where: str, text_column: str, columns: Sequence[str]) -> str:
    """Return the message for a source at ``where`` that has no column ``text_column``."""
    there = ", ".join(map(repr, columns)) or "none"
    return f"{where} has no text column {text_column!r}; its text columns: {there}; name one by --text-column"


def join_rows(rows: Iterable[str | None]) -> str:
    """Return one text from rows of one or more lines each, which may lack their last line break."""
    return "".join(row if row.endswith("\n") else f"{row}\n" for row in (row or "" for row in rows))


def refuse_path(dataset_name: str) -> None:
    """Refuse the name of a data set by which ``datasets`` would read files of this machine.

    Raises:
        Refused: saying what stands in the way, and what to do.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as formats

    name = _repository(dataset_name)
    if not _NAME.fullmatch(name) or ".." in name:
        raise Refused(
            f"--dataset takes the name of a data set, such as wikitext or owner/name, and never a path; got "
            f"{dataset_name!r}. To read files, pass --data-dir DIR."
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
    """Return the data set and configuration that are meant, the latter "" where there is none.

    Wikitext, also where no name is given, by its name on the hub or by one of its configurations, is
    ("wikitext", configuration). Raises Refused for a configuration that wikitext lacks.
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


class MadeHere(Refused):
    """An entry in the cache of ``datasets`` that goes by the name of a data set and is none of the hub's."""


class UnfitDataset(Refused):
    """A data set that was read and cannot serve: no such split, no such column, no text."""


def read_named(dataset_name: str, config_name: str, text_column: str = "text") -> Text:
    """Return the text of a data set by name, from the local cache of ``datasets`` or from the hub.

    The probe comes before the hub because ``datasets`` alone retries for many seconds when there
    is no connection. Raises Refused with the reason. The name is no path: see ``refuse_path``.
    """
    repository = _repository(dataset_name)
    title = _title(repository, config_name)
    try:
        return _named("cache", read_cache(repository, config_name, text_column))
    except UnfitDataset:
        raise
    except Exception as error:  # whatever is wrong with the cache, the hub may still serve
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
    if lines[0].startswith("Config name is missing"):  # the next line has those there are
        return f"{' '.join(lines[:2])}; name one by --dataset-config-name"
    return lines[0]


def _named(origin: str, texts: Mapping[str, str]) -> Text:
    return Text(
        origin, digest([hashlib.sha256(texts[s].encode()).hexdigest() for s in SPLITS]), lambda: texts
    )


def read_cache(repository: str, config_name: str, text_column: str) -> dict[str, str]:
    """Return the texts of a data set of the hub that ``datasets`` keeps here, without any connection."""
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

    ``datasets`` keeps a data set in OWNER___NAME/CONFIG/VERSION/HASH. Of local files there is no owner, and
    the hash is no commit of a repository.
    """
    for split in dataset:
        for file in dataset[split].cache_files:
            entry = Path(file["filename"]).parent
            owned = "___" in entry.parents[2].name and not _HASH_OF_FILES.fullmatch(entry.name)
            if not (owned or _COMMIT.fullmatch(entry.name)):
                raise MadeHere(f"the cache of `datasets` has {name}, but made from files of this machine")
    return _split_texts(dataset, name, text_column)


def _split_texts(dataset: Any, name: str, text_column: str) -> dict[str, str]:
    """Return one text for each split of a ``DatasetDict``; raise UnfitDataset where it cannot be."""
    missing = [split for split in SPLITS if split not in dataset]
    if missing:
        raise UnfitDataset(
            f"{name} has no split {', '.join(missing)}; it has {', '.join(dataset) or 'none'}; "
            "train, validation and test are needed, so name another set or split its text into files yourself"
        )
    texts: dict[str, str] = {}
    for split in SPLITS:
        features = dataset[split].features
        columns = [c for c in features if getattr(features[c], "dtype", "") in ("string", "large_string")]
        if text_column not in columns:
            raise UnfitDataset(no_text_column(f"{name}, split {split},", text_column, columns))
        texts[split] = join_rows(dataset[split].select_columns([text_column])[:][text_column])
        if not texts[split].strip():
            raise UnfitDataset(f"{name} has no text in column {text_column!r} of split {split}")
    return texts


def hub_reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Return whether the hub answers within ``seconds``; False at once where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered: list[bool] = []

    def probe() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):  # uses the proxies of the environment
                answered.append(True)
        except (OSError, ValueError):
            pass

    # A name look-up ignores the timeout, so it runs in a thread that nobody has to wait for.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered)
