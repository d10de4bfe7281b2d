"""Where text comes from: a folder, the local cache of ``datasets``, or the hub.

Every reader returns ``{"train": text, "validation": text, "test": text}`` or raises ValueError.
"""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.data.split import SPLITS

PROBE_SECONDS = 2.0
TOKEN_FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}
REMEDY = (
    "pass --data-dir DIR or set GNNMOE_DATA_DIR to a folder with wiki.train.tokens, wiki.valid.tokens and "
    "wiki.test.tokens (or the parquet files train-*.parquet, validation-*.parquet and test-*.parquet)"
)


def read_folder(folder: Path) -> dict[str, str]:
    """Return the text of each split in ``folder``: token files, or parquet files as on the hub."""
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"data folder {folder} {state}; {REMEDY}")
    files = {split: _files_of(folder, split) for split in SPLITS}
    missing = [TOKEN_FILES[split] for split in SPLITS if not files[split]]
    if missing:
        raise ValueError(
            f"data folder {folder} lacks {', '.join(missing)}; it holds {_listing(folder)}; {REMEDY}"
        )
    return {split: "".join(_read_file(path) for path in files[split]) for split in SPLITS}


def _files_of(folder: Path, split: str) -> list[Path]:
    tokens = folder / TOKEN_FILES[split]
    return [tokens] if tokens.is_file() else sorted(folder.glob(f"{split}-*.parquet"))


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _read_file(path: Path) -> str:
    if path.suffix == ".parquet":
        text = _read_parquet(path)
    else:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}); fetch the file again") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text; fetch the file again")
    return text


def _read_parquet(path: Path) -> str:
    import pandas as pd

    try:
        rows = pd.read_parquet(path, columns=["text"])["text"]
    except Exception as error:  # pyarrow raises several kinds for a damaged file or an absent column
        raise ValueError(f"{path} is not a parquet file with a 'text' column ({error})") from error
    return join_rows(rows)


def join_rows(rows: Iterable[str | None]) -> str:
    """Return one text from rows of one line each, which may lack their line break."""
    return "".join(row if row.endswith("\n") else f"{row}\n" for row in (row or "" for row in rows))


def read_named(dataset_name: str, config_name: str) -> tuple[dict[str, str], str]:
    """Return the texts of a data set by name, and "cache" or "hub": where they came from.

    The probe comes before the hub because ``datasets`` alone retries for many seconds when there
    is no connection. Raises ValueError with the reason.
    """
    repository = "Salesforce/wikitext" if dataset_name == "wikitext" else dataset_name
    try:
        return read_cache(repository, config_name), "cache"
    except Exception:  # whatever is wrong with the cache, the hub may still serve
        if not hub_reachable():
            raise ValueError(
                f"{repository} ({config_name}) is not in the local cache of `datasets`, "
                "and the hub cannot be reached"
            ) from None
    try:
        return read_hub(repository, config_name), "hub"
    except Exception as error:  # `datasets` raises many kinds: connection, access, missing split, disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`datasets` could not load {repository} ({config_name}): {reason}") from error


def read_cache(repository: str, config_name: str) -> dict[str, str]:
    """Return the texts that ``datasets`` has prepared on this machine, without any connection."""
    from datasets.packaged_modules.cache.cache import Cache

    builder = Cache(
        dataset_name=repository.split("/")[-1],
        repo_id=repository,
        config_name=config_name,
        version="auto",
        hash="auto",
    )
    return _split_texts(builder.as_dataset())


def read_hub(repository: str, config_name: str) -> dict[str, str]:
    """Return the texts as ``datasets`` downloads them."""
    from datasets import load_dataset

    return _split_texts(load_dataset(repository, config_name))


def _split_texts(dataset: Any) -> dict[str, str]:
    missing = [split for split in SPLITS if split not in dataset]
    if missing:
        raise ValueError(f"the data set has no split {', '.join(missing)}; it has {', '.join(dataset)}")
    texts = {split: join_rows(dataset[split]["text"]) for split in SPLITS}
    empty = [split for split in SPLITS if not texts[split].strip()]
    if empty:
        raise ValueError(f"the data set has no text in {', '.join(empty)}")
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
