from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.data.reference_lines import DISCOUNT, LARGEST_VOCABULARY, KneserNey


@st.composite
def small_streams(draw) -> tuple[int, list[int], list[int]]:
    """A vocabulary size, a training stream and a stream to score."""
    vocab_size = draw(st.integers(1, 5))
    ids = st.integers(0, vocab_size - 1)
    return (
        vocab_size,
        draw(st.lists(ids, min_size=3, max_size=60)),
        draw(st.lists(ids, min_size=1, max_size=12)),
    )


def naive_counts(train: list[int], order: int) -> dict[tuple[int, ...], int]:
    if order == 3:
        counts: dict[tuple[int, ...], int] = defaultdict(int)
        for trigram in zip(train, train[1:], train[2:], strict=False):
            counts[trigram] += 1
        return counts
    fronts = defaultdict(set)
    for start in range(len(train) - order):
        fronts[tuple(train[start + 1 : start + 1 + order])].add(train[start])
    return {ngram: len(found) for ngram, found in fronts.items()}


def naive_probability(train: list[int], vocab_size: int, ngram: tuple[int, ...]) -> float:
    if not ngram:
        return 1 / vocab_size
    counts = naive_counts(train, len(ngram))
    lower = naive_probability(train, vocab_size, ngram[1:])
    followers = {key: c for key, c in counts.items() if key[:-1] == ngram[:-1]}
    if not followers:
        return lower
    total = sum(followers.values())
    own = followers[ngram] - DISCOUNT if ngram in followers else 0.0
    return own / total + DISCOUNT * len(followers) / total * lower


def test_by_hand():
    """Train 0 1 0 1 2. Trigrams 010, 101 and 012 once; bigrams 01, 10 and 12 have one front each, and so
    has each unigram: p₁ = 0.25/3 + 0.75/3 = 1/3. After 1: p₂(0) = p₂(2) = 0.25/2 + 0.75/3 = 0.375, p₂(1) =
    0.25; p₂(1 | 0) = 0.25 + 0.75/3 = 0.5. p₃(0 | 01) = 0.125 + 0.75 · 0.375, p₃(1 | 10) = 0.25 + 0.75/2."""
    train = np.array([0, 1, 0, 1, 2])
    nll = KneserNey(train, 3).token_nll(train)
    np.testing.assert_allclose(np.exp(-nll), [0.5, 0.40625, 0.625, 0.40625], rtol=1e-12)
    unseen = KneserNey(train, 3).probability(np.array([[2, 2, 0], [0, 1, 1], [2, 1, 0]]))
    np.testing.assert_allclose(unseen, [1 / 3, 0.1875, 0.375], rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(small_streams())
def test_each_token_against_the_formulas(streams):
    vocab_size, train, stream = streams
    ngrams = [tuple(stream[max(0, t - 1) : t + 2]) for t in range(len(stream) - 1)]
    expected = [-np.log(naive_probability(train, vocab_size, ngram)) for ngram in ngrams]
    found = KneserNey(np.array(train), vocab_size).token_nll(np.array(stream))
    assert (found.dtype, found.shape) == (np.float64, (len(stream) - 1,))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(small_streams())
def test_every_context_sums_to_one(streams):
    vocab_size, train, _ = streams
    model = KneserNey(np.array(train), vocab_size)
    for order in (1, 2, 3):
        ngrams = np.array(list(itertools.product(range(vocab_size), repeat=order)))
        p = model.probability(ngrams)
        assert p.min() > 0
        np.testing.assert_allclose(p.reshape(-1, vocab_size).sum(1), 1.0, rtol=1e-12)


def test_keys_of_the_largest_vocabulary_do_not_overflow():
    """Train L L L 0 L: p₁(L) = 1.25/3, p₂(L | L) = 0.125 + 0.75 · p₁, p₃(L | LL) = 0.125 + 0.75 · p₂."""
    last = LARGEST_VOCABULARY - 1
    model = KneserNey(np.array([last, last, last, 0, last]), LARGEST_VOCABULARY)
    p = model.probability(np.array([[last, last, last], [last, last, 0]]))
    np.testing.assert_allclose(p, [0.453125, 0.265625], atol=1e-6)  # and a little from 1/V


@pytest.mark.parametrize(
    ("train", "size", "said"),
    [
        ([0, 1], 2, "3 tokens"),
        ([0, 1, 2], 2, r"0\.\.1"),
        ([0, -1, 1], 2, r"-1\.\.1"),
        ([0, 1, 1], LARGEST_VOCABULARY + 1, "2,097,151"),
    ],
)
def test_bad_input_is_refused(train, size, said):
    with pytest.raises(ValueError, match=said):
        KneserNey(np.array(train), size)


def test_bad_ngrams_are_refused():
    model = KneserNey(np.array([0, 1, 0]), 2)
    with pytest.raises(ValueError, match=r"0\.\.1; got 0\.\.2"):
        model.token_nll(np.array([0, 2, 1]))
    with pytest.raises(ValueError, match="k in"):
        model.probability(np.zeros((1, 4), dtype=np.int64))
