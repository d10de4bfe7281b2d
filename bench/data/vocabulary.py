"""The closed list of a corpus's tokens, and the unigram model that goes with it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EOS = "<eos>"
UNK = "<unk>"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words (or pieces of words) in id order with their counts in the training split.

    Shapes: ``counts`` (size,) int64, tokens of the training split. Raises ValueError where a word
    stands twice, ``<eos>`` or ``<unk>`` is absent, or there is not one count for each word.
    """

    words: tuple[str, ...]
    counts: np.ndarray

    def __post_init__(self) -> None:
        if len(self._ids) != len(self.words) or not {EOS, UNK} <= self._ids.keys():
            raise ValueError(f"a vocabulary needs each word once, {EOS} and {UNK} among them")
        if self.counts.shape != (len(self.words),):
            raise ValueError(f"a vocabulary of {len(self.words)} words has {self.counts.size} counts")

    @classmethod
    def build(cls, tokens: Iterable[str], min_count: int = 1) -> Vocabulary:
        """Return the vocabulary of ``tokens``: most frequent first, ties in alphabetical order.

        Words seen fewer than ``min_count`` times (1 or more) count as ``<unk>``; ``<unk>`` and
        ``<eos>`` are always in, with a count of 0 where the tokens lack them.
        """
        return cls.from_counts(Counter(tokens), min_count)

    @classmethod
    def from_counts(cls, found: Mapping[str, int], min_count: int = 1) -> Vocabulary:
        """Return the vocabulary of words with their counts, as ``build`` does; a count may be 0."""
        kept = {word: n for word, n in found.items() if n >= min_count or word in (EOS, UNK)}
        kept[UNK] = kept.get(UNK, 0) + sum(found.values()) - sum(kept.values())
        kept.setdefault(EOS, 0)
        ordered = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
        return cls(tuple(word for word, _ in ordered), np.array([n for _, n in ordered], dtype=np.int64))

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    @property
    def size(self) -> int:
        """Number of words, the two special ones included."""
        return len(self.words)

    @property
    def eos_id(self) -> int:
        """Id of the mark at the end of every line."""
        return self._ids[EOS]

    @property
    def unk_id(self) -> int:
        """Id that stands for every word outside the vocabulary."""
        return self._ids[UNK]

    @cached_property
    def sha256(self) -> str:
        """Hash of the words in id order."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """Return the ids (len(words),) int64, each in 0..size − 1; a word outside becomes ``<unk>``."""
        ids, unk = self._ids, self.unk_id
        return np.fromiter((ids.get(word, unk) for word in words), dtype=np.int64, count=len(words))

    def log_unigram(self) -> np.ndarray:
        """Return log p(word) in nats, (size,) float64: p = (count + 1) / Σ (count + 1) in training.

        Adding one keeps a word that training lacks possible. (On WikiText-2 it also is what the
        usual unigram reference lines were made with: 914 on test, where the plain frequencies give 912.)
        """
        counts = self.counts.astype(np.float64) + 1.0
        return np.log(counts) - np.log(counts.sum())


def unigram_nll(vocabulary: Vocabulary, targets: np.ndarray) -> float:
    """Return the sum over ``targets`` (any shape, int64 ids) of −log p(target), in nats."""
    return -float(vocabulary.log_unigram()[targets].sum())
