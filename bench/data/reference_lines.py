"""N-gram baselines of perplexity: the scores of simple models on exactly the tokens that a run scores.

The losses of the Kneser-Ney trigram on a whole split are computed once per corpus and cached.

Shape suffixes: N predicted tokens, k order of an n-gram (1, 2 or 3). An n-gram of ids i₁ … i_k is one int64
key, i₁·V^(k−1) + … + i_k, so ``key // V`` is the key of its context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.data.cache import HERE, cache_folder, cached, code_of, key_of
from bench.data.corpus import Corpus
from bench.data.tokenizer import SPLITS, Vocabulary
from gnnmoe.config import Refused, unknown_name

MADE_BY = ("reference_lines",)  # modules that compute the losses and store them
ORDER = 3
DISCOUNT = 0.75  # Jurafsky and Martin, Speech and Language Processing, "Kneser-Ney smoothing"
LARGEST_VOCABULARY = 2_097_151  # V³ stays below 2⁶³


def reference_nll(corpus: Corpus, split_name: str, num_scored: int) -> dict[str, float]:
    """Return Σ −ln p over the first ``num_scored`` targets of a split, in nats, for each baseline.

    "unigram" uses the frequencies of training plus one (``Vocabulary.log_unigram``). "kneser_ney_trigram" is
    interpolated with discount 0.75 (``KneserNey``). Both are trained on the training split. Sums are in
    float64; perplexity = exp(Σ / num_scored). A vocabulary of more than ``LARGEST_VOCABULARY`` words, about
    two million, has no trigram.

    Raises:
        ValueError: an unknown split, or ``num_scored`` outside 1 .. its tokens.
    """
    if split_name not in SPLITS:
        raise ValueError(unknown_name("split", split_name, SPLITS))
    split = corpus.splits[split_name]
    if not 1 <= num_scored <= split.num_tokens:
        raise ValueError(f"num_scored must lie in 1..{split.num_tokens:,} ({split_name}); got {num_scored:,}")
    lines = {"unigram": unigram_nll(corpus.vocabulary, split.stream[1 : 1 + num_scored])}
    if corpus.vocabulary.size <= LARGEST_VOCABULARY:
        trigram = trigram_nll(corpus, split_name)[:num_scored]
        lines["kneser_ney_trigram"] = float(trigram.sum(dtype=np.float64))
    return lines


def unigram_nll(vocabulary: Vocabulary, targets: np.ndarray) -> float:
    """Return the sum of −ln p over ``targets`` (any shape, int64 ids), in nats."""
    return -float(vocabulary.log_unigram()[targets].sum())


def trigram_nll(corpus: Corpus, split_name: str) -> np.ndarray:
    """Return the trigram's −ln p of each target of a split, (num_tokens,) float64 in nats.

    The losses come from the cache if the same ids were scored before.
    """
    train, split, words = corpus.splits["train"], corpus.splits[split_name], corpus.vocabulary.size
    key = key_of(code_of(HERE, *MADE_BY), train.stream_sha256, split.stream_sha256, words)
    return cached(
        cache_folder() / "reference_lines" / f"{key}.npy",
        "reference line",
        lambda: KneserNey(train.stream, words).token_nll(split.stream),
        read=lambda file: np.load(file, allow_pickle=False),
        write=np.save,
    )


class KneserNey:
    """Interpolated Kneser-Ney smoothing of order 3.

    For each order k, from the trigram down to the unigram, with c the counts of that order,

        p_k(w | h) = max(c(h w) − D, 0) / Σ_v c(h v) + λ(h) · p_{k−1}(w | h without its first)
        λ(h) = D · |{v : c(h v) > 0}| / Σ_v c(h v)

    with D = 0.75 and p_0(w) = 1 / V, so an unseen word keeps some probability. For trigrams, c counts how
    often the trigram stands in the stream. For bigrams and unigrams, c counts the different tokens in front
    of them (continuation counts). An unseen context leaves all probability to the order below. The sum over
    the vocabulary is 1 for every context.

    Kneser and Ney, "Improved backing-off for m-gram language modeling", ICASSP 1995; interpolated as
    in Chen and Goodman, "An empirical study of smoothing techniques for language modeling", Computer
    Speech and Language 13, 1999. On WikiText-2 the test perplexity is 235.4.

    Shapes: ``train_stream`` (n + 1,) ids in 0 .. vocab_size − 1, at least three. N-grams may span the lines
    of the text: the stream is continuous, as it is for the models of a comparison.

    Raises:
        Refused: too few tokens.
        ValueError: ids out of range, or a vocabulary that is too large.
    """

    def __init__(self, train_stream: np.ndarray, vocab_size: int) -> None:
        if not 1 <= vocab_size <= LARGEST_VOCABULARY:
            raise ValueError(f"vocab_size must lie in 1..{LARGEST_VOCABULARY:,}; got {vocab_size:,}")
        if len(train_stream) < ORDER:
            raise Refused(f"a trigram model needs {ORDER} tokens of training; got {len(train_stream)}")
        self.vocab_size = vocab_size
        stream = _checked(train_stream, vocab_size)
        counted = [_counts(stream, order, vocab_size) for order in range(1, ORDER + 1)]
        self._levels = [_Level.build(keys, counts, vocab_size) for keys, counts in counted]

    def probability(self, ngrams: np.ndarray) -> np.ndarray:
        """Return p(last id | the ids before it), (N,) float64, of ``ngrams`` (N, k), k = 1, 2 or 3.

        Raises:
            ValueError: another shape, or ids out of range.
        """
        ids = _checked(ngrams, self.vocab_size)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= ORDER:
            raise ValueError(f"ngrams must be (N, k) with k in 1..{ORDER}; got {ids.shape}")
        p = np.full(len(ids), 1.0 / self.vocab_size)
        for order in range(1, ids.shape[1] + 1):
            keys = _keys(ids[:, -order:], self.vocab_size)
            level = self._levels[order - 1]
            p *= _look_up(level.contexts, level.backoff, keys // self.vocab_size, absent=1.0)
            p += _look_up(level.keys, level.share, keys, absent=0.0)
        return p

    def token_nll(self, stream: np.ndarray) -> np.ndarray:
        """Return −ln p of each target of ``stream`` (n + 1,), in order, (n,) float64 in nats.

        Target t is ``stream[t + 1]``. Its context is the two tokens before it, also across line ends. The
        first target has one token before it, and takes the bigram's probability.
        """
        ids = np.asarray(stream)
        if len(ids) < ORDER:
            return -np.log(self.probability(ids[None])) if len(ids) == 2 else np.empty(0)
        windows = np.lib.stride_tricks.sliding_window_view(ids, ORDER)
        p = np.concatenate([self.probability(ids[None, :2]), self.probability(windows)])
        return -np.log(p)


@dataclass(frozen=True, eq=False)
class _Level:
    """One order: ``share`` is (c − D) / Σ c of each n-gram, ``backoff`` is λ of each context."""

    keys: np.ndarray
    share: np.ndarray
    contexts: np.ndarray
    backoff: np.ndarray

    @classmethod
    def build(cls, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Level:
        """Return the level of sorted ``keys`` with ``counts``, both (n-grams,) int64."""
        contexts, starts, lengths = np.unique(keys // vocab_size, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, starts)
        share = (counts - DISCOUNT) / np.repeat(totals, lengths)
        return cls(keys, share, contexts, DISCOUNT * lengths / totals)


def _counts(stream: np.ndarray, order: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted keys of one order with their counts, both (n-grams,) int64."""
    if order == ORDER:
        return np.unique(_windows_keys(stream, order, vocab_size), return_counts=True)
    longer = np.unique(_windows_keys(stream, order + 1, vocab_size))
    return np.unique(longer % vocab_size**order, return_counts=True)


def _windows_keys(stream: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    return _keys(np.lib.stride_tricks.sliding_window_view(stream, order), vocab_size)


def _keys(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the keys (N,) int64 of n-grams (N, k)."""
    keys = ids[:, 0].copy()
    for column in ids.T[1:]:
        keys *= vocab_size
        keys += column
    return keys


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, absent: float) -> np.ndarray:
    """Return the value of each of ``wanted`` (N,) among sorted ``keys``, or ``absent``."""
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[found] == wanted, values[found], absent)


def _checked(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return ``ids`` as int64 after checking that they are ids of the vocabulary."""
    array = np.asarray(ids)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(f"ids must lie in 0..{vocab_size - 1}; got {array.min()}..{array.max()}")
    return array.astype(np.int64, copy=False)
