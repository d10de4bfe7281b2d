"""From lines to token streams: by words, or by byte-level BPE trained on the training split.

Under BPE each word is cut on its own, with one space in front of it; ``<eos>`` closes every line and
the word ``<unk>`` stays one token. A word ``<eos>`` in the text is the mark, as at word level.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.data.split import SPLITS, Pieces, Split, Words, WordTable, build_split, split_words
from bench.data.vocabulary import EOS, UNK, Vocabulary
from gnnmoe.config import Refused

MIN_PIECES = 256 + 2  # every byte, <eos> and <unk>
MAX_PIECES = 1_000_000
_SPEC = re.compile(r"bpe:([0-9]+)")

Documents = Mapping[str, tuple[Sequence[str], Sequence[int]]]
"""For each split its lines, and the indices of the lines at which documents begin, the first 0."""


@dataclass(frozen=True, eq=False)
class Content:
    """A prepared text: what the cache holds.

    ``num_distinct_words`` is the vocabulary at word level; ``merges_sha256`` is the hash of the merges
    that BPE found, "" at word level.
    """

    vocabulary: Vocabulary
    splits: Mapping[str, Split]
    num_distinct_words: int
    merges_sha256: str = ""


def bpe_size(spec: str) -> int | None:
    """Return the vocabulary size that ``bpe:SIZE`` asks for, None for ``word``.

    Raises Refused for another spec, a size that cannot be, or BPE without its package.
    """
    if spec == "word":
        return None
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise Refused(f"unknown tokenizer {spec!r}; allowed: word, or bpe:SIZE such as bpe:8000")
    size = int(match[1])
    if not MIN_PIECES <= size <= MAX_PIECES:
        raise Refused(
            f"tokenizer {spec!r}: the size must lie in {MIN_PIECES}..{MAX_PIECES} "
            f"(every byte, {EOS} and {UNK} are always in); such as bpe:8000"
        )
    tokenizer_version(spec)
    return size


def tokenizer_version(spec: str) -> str:
    """Return the version of the library that cuts words, "" at word level; Refused without it."""
    if spec == "word":
        return ""
    try:
        import tokenizers
    except ImportError as error:
        raise Refused(
            f"tokenizer {spec!r} needs the package `tokenizers`; install it with pip install 'gnnmoe[bpe]', "
            "or use the tokenizer 'word'"
        ) from error
    return tokenizers.__version__


def tokenize(documents: Documents, spec: str, min_count: int = 1) -> Content:
    """Return the streams of ``documents`` and the vocabulary of their training split.

    ``min_count`` is for the word level (see ``Vocabulary.build``). Raises Refused as ``bpe_size``.
    """
    size = bpe_size(spec)
    table = WordTable()
    words = {split: split_words(split, *documents[split], table) for split in SPLITS}
    counts = np.bincount(words["train"].numbers, minlength=len(table)).tolist()
    vocabulary = Vocabulary.from_counts(dict(zip(table, counts, strict=True)), min_count)
    num_distinct_words = vocabulary.size
    if size is None:
        return Content(vocabulary, _by_words(words, table, vocabulary), num_distinct_words)
    bpe = _train(documents["train"][0], size)
    return Content(*_by_pieces(words, table, bpe), num_distinct_words, _merges_sha256(bpe))


def _by_words(words: Mapping[str, Words], table: WordTable, vocabulary: Vocabulary) -> dict[str, Split]:
    none = np.zeros(len(table), dtype=np.int32)  # a word's bytes all go to its only piece
    ids = vocabulary.encode(list(table))
    unknown = ids == vocabulary.unk_id
    if UNK in table:
        unknown[table[UNK]] = False
    pieces = Pieces(ids, np.arange(len(table) + 1), none, unknown)
    return {name: build_split(found, pieces, vocabulary.eos_id) for name, found in words.items()}


def _by_pieces(words: Mapping[str, Words], table: WordTable, bpe: Any) -> tuple[Vocabulary, dict[str, Split]]:
    ids = bpe.get_vocab()
    tokens = tuple(sorted(ids, key=ids.__getitem__))
    assert [ids[token] for token in tokens] == list(range(len(tokens))), "token ids have a gap"
    pieces = _cut(table, bpe, tokens)
    splits = {name: build_split(found, pieces, ids[EOS]) for name, found in words.items()}
    counts = np.bincount(splits["train"].stream[1:], minlength=len(tokens)).astype(np.int64)
    return Vocabulary(tokens, counts), splits


def _cut(table: Iterable[str], bpe: Any, tokens: Sequence[str]) -> Pieces:
    words = list(table)
    cut = [encoding.ids for encoding in bpe.encode_batch([f" {word}" for word in words])]
    for mark in (EOS, UNK):
        if mark in words:
            cut[words.index(mark)] = [bpe.token_to_id(mark)]
    starts = np.cumsum([0, *map(len, cut)], dtype=np.int64)
    ids = np.fromiter((piece for pieces in cut for piece in pieces), dtype=np.int64, count=starts[-1])
    # The byte-level alphabet has one character for each byte.
    lengths = np.array([0 if token in (EOS, UNK) else len(token) for token in tokens], dtype=np.int32)
    return Pieces(ids, starts, lengths[ids])


def _train(lines: Iterable[str], size: int) -> Any:
    """Return a ``tokenizers.Tokenizer`` with ``size`` pieces, or fewer where no pair comes twice."""
    # Unset, the library would warn at every later fork, such as a data loader's worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_text(lines), trainer)
    bpe.encode_special_tokens = True  # "(<unk>" within a word is text; the word <unk> is set apart above
    return bpe


def _merges_sha256(bpe: Any) -> str:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return hashlib.sha256(json.dumps(merges).encode()).hexdigest()


def _training_text(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield " ".join(["", *(word for word in line.split() if word not in (EOS, UNK))])
