"""A corpus: three splits and the vocabulary of the training split, with their source."""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.data.cache import cached_content
from bench.data.sources import (
    EMBEDDED_MIN_COUNT,
    REMEDY,
    Text,
    UnfitDataset,
    digest,
    embedded_texts,
    known_as,
    read_folder,
    read_named,
    refuse_path,
)
from bench.data.tokenizer import (
    SPLITS,
    Content,
    Documents,
    Split,
    Vocabulary,
    article_lines,
    bpe_size,
    canonical_lines,
    tokenize,
    tokenizer_version,
)
from gnnmoe.config import Refused, unknown_name
from gnnmoe.reading import from_home

SOURCES = ("auto", "folder", "hub", "embedded")
OFFICIAL_TOKENS = {"train": 2_088_628, "validation": 217_646, "test": 245_569}
OFFICIAL_VOCABULARY = 33_278
OFFICIAL_SHA256: dict[str, str | None] = {
    # The hash of the published training file has not been verified. So no whole corpus is "official" yet: its
    # training split is "same counts" at best.
    "train": None,
    "validation": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
LARGE_SHARE_UNKNOWN = 0.15  # of the words of a split: more unknown words give a warning
_VERDICTS = ("official", "same counts", "other")  # from the strongest to the weakest


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts as token streams over one vocabulary.

    ``source`` is "folder", "cache", "hub" or "embedded". ``verdict`` compares the text with the published
    WikiText-2, word by word for every tokenizer: "official", "same counts" or "other", the weakest of the
    three splits. ``splits`` has the keys "train", "validation" and "test". ``warning`` is a sentence to show
    on screen and in every table, or None. ``tokenizer`` is "word" or "bpe:SIZE", with the size asked for.
    ``files`` has the SHA-256 of each file of a folder by its name. ``merges_sha256`` is the hash of the
    merges that BPE found, "" at word level.
    """

    name: str
    config_name: str
    source: str
    verdict: str
    vocabulary: Vocabulary
    splits: Mapping[str, Split]
    warning: str | None = None
    tokenizer: str = "word"
    files: Mapping[str, str] = field(default_factory=dict)
    merges_sha256: str = ""

    @property
    def sha256(self) -> str:
        """Identity of text and tokens; results on corpora with different hashes never share a table."""
        parts = [*(self.splits[name].sha256 for name in SPLITS), self.vocabulary.sha256]
        if self.merges_sha256:
            parts += ["bpe", self.merges_sha256]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_record(self) -> dict[str, Any]:
        """Return the entries of a run's record about its data, ready for JSON."""
        return {
            "name": self.name,
            "config_name": self.config_name,
            "source": self.source,
            "verdict": self.verdict,
            "tokenizer": self.tokenizer,
            "sha256": self.sha256,
            "files": dict(self.files),
            "vocabulary": {"size": self.vocabulary.size, "sha256": self.vocabulary.sha256},
            "splits": {name: _split_record(self.splits[name]) for name in SPLITS},
            "python_version": platform.python_version() if self.source == "embedded" else None,
            "warning": self.warning,
        }


def _split_record(split: Split) -> dict[str, Any]:
    return {
        "tokens": split.num_tokens,
        "words": split.num_words,
        "lines": split.num_lines,
        "bytes": split.num_bytes,
        "documents": len(split.document_starts),
        "unknown_words": split.unknown_words(split.num_tokens),
        "sha256": split.sha256,
        "stream_sha256": split.stream_sha256,
        "verdict": split_verdict(split),
    }


def load_corpus(
    *,
    data_dir: Path | None = None,
    source: str = "auto",
    dataset_name: str = "wikitext",
    dataset_config_name: str | None = None,
    tokenizer: str = "word",
    text_column: str = "text",
) -> Corpus:
    """Return the corpus that ``source`` names, from the cache or prepared anew.

    A cache that is broken or cannot be written gives one warning.

    Args:
        data_dir: Folder with the text; None: the folder in GNNMOE_DATA_DIR.
        source: "folder": that folder. "hub": the data set by its name, from the local cache of ``datasets``
            or from the hub, and nothing else. "embedded": Python's help texts. "auto": the folder if one is
            named, else the data set, else the embedded corpus with a warning. In all cases a data set that
            was read and cannot be used is an error.
        dataset_name: Name of the data set (see ``known_as``).
        dataset_config_name: Name of its configuration.
        tokenizer: "word", or "bpe:SIZE" for byte-level BPE trained on the training split.
        text_column: Column of parquet files and of data sets.

    Raises:
        Refused: naming the remedy.
    """
    size = bpe_size(tokenizer)
    tokenizer = "word" if size is None else f"bpe:{size}"
    found = _find(data_dir, source, *known_as(dataset_name, dataset_config_name), text_column)
    identity = [tokenizer, tokenizer_version(tokenizer), found.min_count, found.digest]
    content = cached_content(identity, lambda: tokenize(found.documents(), tokenizer, found.min_count))
    if size is not None and content.vocabulary.size < size:
        warnings.warn(
            f"You asked for {tokenizer}; the training text gives only {content.vocabulary.size:,} pieces. "
            "Using all of them.",
            stacklevel=2,
        )
    return _corpus(found, content, tokenizer)


def say_unknown_words(splits: Mapping[str, Split]) -> None:
    """Warn in one line if a large share of the words is unknown."""
    large = []
    for split in splits.values():
        unknown = split.unknown_words(split.num_tokens)
        if unknown > LARGE_SHARE_UNKNOWN * split.num_words:
            large.append(f"{unknown:,} of the {split.num_words:,} words of the {split.name} split")
    if large:
        warnings.warn(
            f"{' and '.join(large)} are not in the vocabulary. <unk> stands for each, and a perplexity says "
            "nothing about them. A tokenizer of subwords has no unknown words: --tokenizer bpe:8000.",
            stacklevel=2,
        )


@dataclass(frozen=True)
class _Found:
    """A source whose text is not yet tokenised; ``text`` is None for the embedded text."""

    name: str
    config_name: str
    source: str
    digest: str
    text: Text | None
    warning: str | None = None

    @property
    def min_count(self) -> int:
        return EMBEDDED_MIN_COUNT if self.text is None else 1

    def documents(self) -> Documents:
        if self.text is None:
            return embedded_texts()
        texts = self.text.read()
        lines = {split: canonical_lines(texts[split]) for split in SPLITS}
        return {split: (lines[split], article_lines(lines[split])) for split in SPLITS}


def _find(
    data_dir: Path | None, source: str, dataset_name: str, dataset_config_name: str, text_column: str
) -> _Found:
    if source not in SOURCES:
        raise Refused(unknown_name("data source", source, SOURCES))
    if source in ("hub", "embedded") and data_dir is not None:
        raise Refused(f"data source {source!r} reads no folder; drop --data-dir, or use source 'folder'")
    folder = data_dir or os.environ.get("GNNMOE_DATA_DIR") or None
    if source == "folder" and folder is None:
        raise Refused(f"data source 'folder' needs a folder; {REMEDY}")
    if source == "embedded":
        return _embedded("you asked for it")
    if source != "hub" and folder is not None:
        text = read_folder(from_home(Path(folder), "GNNMOE_DATA_DIR"), text_column)
        return _Found("local text", "", "folder", text.digest, text)
    refuse_path(dataset_name)
    try:
        text = read_named(dataset_name, dataset_config_name, text_column)
    except Refused as error:
        if source == "auto" and not isinstance(error, UnfitDataset):
            return _embedded(str(error))
        raise Refused(f"{error}; {REMEDY}") from error
    return _Found(dataset_name, dataset_config_name, text.origin, text.digest, text)


def _embedded(reason: str) -> _Found:
    warning = (
        f"NOT WIKITEXT-2: this run uses the small embedded text, Python's help pages ({reason}). "
        f"Its results are not comparable with published results. For WikiText-2, {REMEDY}"
    )
    config = f"python-{platform.python_version()}"
    return _Found("pydoc-topics", config, "embedded", digest(embedded_texts()), None, warning)


def _corpus(found: _Found, content: Content, tokenizer: str) -> Corpus:
    verdict = max((split_verdict(split) for split in content.splits.values()), key=_VERDICTS.index)
    if content.num_distinct_words != OFFICIAL_VOCABULARY:
        verdict = "other"
    name, config_name = found.name, found.config_name
    if found.source == "folder" and verdict != "other":  # its counts identify the text of a folder
        name, config_name = "wikitext", "wikitext-2-v1"
    return Corpus(
        name=name,
        config_name=config_name,
        source=found.source,
        verdict=verdict,
        vocabulary=content.vocabulary,
        splits=content.splits,
        warning=found.warning,
        tokenizer=tokenizer,
        files={} if found.text is None else found.text.files,
        merges_sha256=content.merges_sha256,
    )


def split_verdict(split: Split) -> str:
    """Return how a split compares with WikiText-2's: "official" (bytes), "same counts" or "other"."""
    if split.sha256 == OFFICIAL_SHA256[split.name]:
        return "official"
    words = split.num_words + split.num_lines
    return "same counts" if words == OFFICIAL_TOKENS[split.name] else "other"
