"""A corpus: three splits and the vocabulary of the first, with where they came from."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from bench.data.embedded import MIN_COUNT, embedded_texts
from bench.data.sources import REMEDY, read_folder, read_named
from bench.data.split import SPLITS, Split, article_lines, build_split, canonical_lines, line_words
from bench.data.vocabulary import Vocabulary
from gnnmoe.naming import unknown_name

SOURCES = ("auto", "folder", "hub", "embedded")
OFFICIAL_TOKENS = {"train": 2_088_628, "validation": 217_646, "test": 245_569}
OFFICIAL_VOCABULARY = 33_278
OFFICIAL_SHA256: dict[str, str | None] = {
    # The hash of the published training file has not been verified, so no corpus is "official" as a
    # whole yet; its training split is at best "same counts".
    "train": None,
    "validation": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
_VERDICTS = ("official", "same counts", "other")  # from the strongest to the weakest


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts as token streams over one vocabulary.

    ``source`` is "folder", "cache", "hub" or "embedded"; ``verdict`` says how the text compares with
    the published WikiText-2 (the weakest of its splits: "official", "same counts" or "other");
    ``splits`` has the keys "train", "validation" and "test"; ``warning`` is one sentence to show on
    screen and in every table, or None.
    """

    name: str
    config_name: str
    source: str
    verdict: str
    vocabulary: Vocabulary
    splits: Mapping[str, Split]
    warning: str | None = None

    @property
    def sha256(self) -> str:
        """Identity of the content; results of corpora that differ here never share a table."""
        parts = [*(self.splits[name].sha256 for name in SPLITS), self.vocabulary.sha256]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_record(self) -> dict[str, Any]:
        """Return what a run's record says about its data, ready for JSON."""
        return {
            "name": self.name,
            "config_name": self.config_name,
            "source": self.source,
            "verdict": self.verdict,
            "sha256": self.sha256,
            "vocabulary": {"size": self.vocabulary.size, "sha256": self.vocabulary.sha256},
            "splits": {name: _split_record(self.splits[name]) for name in SPLITS},
            "python_version": platform.python_version() if self.source == "embedded" else None,
            "warning": self.warning,
        }


def load_corpus(
    *,
    data_dir: Path | None = None,
    source: str = "auto",
    dataset_name: str = "wikitext",
    dataset_config_name: str = "wikitext-2-v1",
) -> Corpus:
    """Return the corpus that ``source`` names.

    ``auto``: ``data_dir``, else the folder in GNNMOE_DATA_DIR, else the local cache of ``datasets``,
    else the hub, else the embedded corpus with a warning. ``folder``: one of the first two. ``hub``:
    the data set by name, from the cache or the hub, with no fall-back. ``embedded``: Python's help
    texts. Raises ValueError with the remedy.
    """
    if source not in SOURCES:
        raise ValueError(unknown_name("data source", source, SOURCES))
    if source in ("hub", "embedded") and data_dir is not None:
        raise ValueError(f"data source {source!r} reads no folder; drop --data-dir, or use source 'folder'")
    folder = data_dir or os.environ.get("GNNMOE_DATA_DIR") or None
    if source == "folder" and folder is None:
        raise ValueError(f"data source 'folder' needs a folder; {REMEDY}")
    if source == "embedded":
        return _embedded("it was asked for")
    if source != "hub" and folder is not None:
        return _named_by_verdict(
            _from_texts(read_folder(Path(folder).expanduser()), "local text", "", "folder")
        )
    try:
        texts, origin = read_named(dataset_name, dataset_config_name)
    except ValueError as error:
        if source == "auto":
            return _embedded(str(error))
        raise ValueError(f"{error}; {REMEDY}") from error
    return _from_texts(texts, dataset_name, dataset_config_name, origin)


def _named_by_verdict(corpus: Corpus) -> Corpus:
    """Call a folder's text WikiText-2 where it is: by its counts, not by what was asked for."""
    if corpus.verdict == "other":
        return corpus
    return replace(corpus, name="wikitext", config_name="wikitext-2-v1")


def split_verdict(split: Split) -> str:
    """Return how a split compares with WikiText-2's: "official" (bytes), "same counts" or "other"."""
    if split.sha256 == OFFICIAL_SHA256[split.name]:
        return "official"
    return "same counts" if split.num_tokens == OFFICIAL_TOKENS[split.name] else "other"


def _from_texts(texts: Mapping[str, str], name: str, config_name: str, source: str) -> Corpus:
    lines = {split: canonical_lines(texts[split]) for split in SPLITS}
    documents = {split: (lines[split], article_lines(lines[split])) for split in SPLITS}
    return _assemble(documents, name, config_name, source)


def _embedded(reason: str) -> Corpus:
    warning = (
        f"NOT WIKITEXT-2: the small embedded text of Python's help pages serves ({reason}), and its results "
        f"compare with no published ones; for WikiText-2, {REMEDY}"
    )
    config = f"python-{platform.python_version()}"
    return _assemble(
        embedded_texts(), "pydoc-topics", config, "embedded", min_count=MIN_COUNT, warning=warning
    )


def _assemble(
    documents: Mapping[str, tuple[Sequence[str], Sequence[int]]],
    name: str,
    config_name: str,
    source: str,
    *,
    min_count: int = 1,
    warning: str | None = None,
) -> Corpus:
    """Return the corpus of ``documents``: for each split, its lines and where documents begin."""
    words = {split: line_words(documents[split][0]) for split in SPLITS}
    vocabulary = Vocabulary.build(chain.from_iterable(words["train"]), min_count=min_count)
    splits = {split: build_split(split, *documents[split], vocabulary, words[split]) for split in SPLITS}
    verdict = max((split_verdict(split) for split in splits.values()), key=_VERDICTS.index)
    if vocabulary.size != OFFICIAL_VOCABULARY:
        verdict = "other"
    return Corpus(name, config_name, source, verdict, vocabulary, splits, warning)


def _split_record(split: Split) -> dict[str, Any]:
    return {
        "tokens": split.num_tokens,
        "words": split.num_words,
        "lines": split.num_lines,
        "bytes": split.num_bytes,
        "documents": len(split.document_starts),
        "sha256": split.sha256,
        "verdict": split_verdict(split),
    }
