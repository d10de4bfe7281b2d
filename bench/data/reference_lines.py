"""Reference lines of perplexity: what simple models score on exactly the tokens that a run scores.

The Kneser-Ney trigram's losses of a whole split are computed once per corpus and kept in a folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.data.cache import HERE, cache_folder, cached, code_of, key_of
from bench.data.corpus import Corpus
from bench.data.kneser_ney import LARGEST_VOCABULARY, token_nll
from bench.data.split import SPLITS
from bench.data.vocabulary import unigram_nll
from gnnmoe.naming import unknown_name

MADE_BY = ("kneser_ney", "reference_lines")  # modules that compute the losses and store them


def reference_nll(
    corpus: Corpus, split_name: str, num_scored: int, cache_dir: Path | None = None
) -> dict[str, float]:
    """Return Σ −ln p over the first ``num_scored`` targets of a split, in nats, for each line.

    "unigram": frequencies of training plus one (``Vocabulary.log_unigram``). "kneser_ney_trigram":
    interpolated, discount 0.75 (``KneserNey``). Both are trained on the training split. Sums are in
    float64; perplexity = exp(Σ / num_scored). ``cache_dir`` is the folder for files that can be made
    again; by default GNNMOE_CACHE_DIR, else XDG_CACHE_HOME/gnnmoe, else ~/.cache/gnnmoe. A broken
    file is made again and a folder that cannot be written is left alone, each with one warning. A
    vocabulary of more than ``LARGEST_VOCABULARY`` words, about two million, has no trigram.

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
        trigram = trigram_nll(corpus, split_name, cache_dir)[:num_scored]
        lines["kneser_ney_trigram"] = float(trigram.sum(dtype=np.float64))
    return lines


def trigram_nll(corpus: Corpus, split_name: str, cache_dir: Path | None = None) -> np.ndarray:
    """Return the trigram's −ln p of each target of a split, (num_tokens,) float64 in nats.

    From the cache where the same ids were scored before, else computed and put there; see
    ``reference_nll``.
    """
    train, split, words = corpus.splits["train"], corpus.splits[split_name], corpus.vocabulary.size
    key = key_of(code_of(HERE, *MADE_BY), train.stream_sha256, split.stream_sha256, words)
    return cached(
        cache_folder(cache_dir) / "reference_lines" / f"{key}.npy",
        "reference line",
        lambda: token_nll(train.stream, split.stream, words),
        read=lambda file: np.load(file, allow_pickle=False),
        write=np.save,
    )
