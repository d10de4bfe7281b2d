from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bench.data.reference_lines import unigram_nll
from bench.data.tokenizer import Vocabulary


def _build(text: str, min_count: int = 1) -> Vocabulary:
    return Vocabulary.from_counts(Counter(text.split()), min_count)


def test_order_is_by_frequency_then_alphabet():
    vocabulary = _build("b a b c a <eos> d <eos> <eos>")
    assert _build("a b b").sha256 == _build("b a b").sha256 != _build("a c c").sha256
    assert vocabulary.words == ("<eos>", "a", "b", "c", "d", "<unk>")
    assert vocabulary.counts.tolist() == [3, 2, 2, 1, 1, 0]
    assert (vocabulary.size, vocabulary.eos_id, vocabulary.unk_id) == (6, 0, 5)


def test_rare_words_count_as_unknown():
    vocabulary = _build("a a b c <unk> <eos>", min_count=2)
    assert dict(zip(vocabulary.words, vocabulary.counts.tolist(), strict=True)) == {
        "<unk>": 3,
        "a": 2,
        "<eos>": 1,
    }


def test_encode_maps_words_outside_to_unknown():
    vocabulary = _build("a a b <eos>")
    ids = vocabulary.encode(["b", "nowhere", "a", "<eos>"])
    assert ids.dtype == np.int64
    assert [vocabulary.words[i] for i in ids] == ["b", "<unk>", "a", "<eos>"]


def test_ids_are_always_in_range():
    """Bad input: no text gives an id without a row, and no vocabulary without <unk> comes to be."""
    vocabulary = _build("a b b")
    ids = vocabulary.encode(["", "\n", "A", "b", "<eos>", "\U0001f600"])
    assert 0 <= ids.min() <= ids.max() < vocabulary.size
    for words, counts in ((("a", "<eos>"), 2), (("a", "a", "<eos>", "<unk>"), 4), (("<eos>", "<unk>"), 3)):
        with pytest.raises(ValueError, match="a vocabulary"):
            Vocabulary(words, np.zeros(counts, dtype=np.int64))


def test_unigram_is_a_distribution_by_hand():
    vocabulary = _build("a a a b <eos>")  # counts + 1: a 4, b 2, eos 2, unk 1
    log_p = vocabulary.log_unigram()
    assert log_p.dtype == np.float64
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-12)
    targets = vocabulary.encode(["a", "b", "z"])
    assert unigram_nll(vocabulary, targets) == pytest.approx(-np.log(4 / 9 * 2 / 9 * 1 / 9), rel=1e-12)
