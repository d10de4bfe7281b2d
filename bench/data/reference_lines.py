"""Reference lines of perplexity: what simple models score on exactly the tokens that a run scores.

The Kneser-Ney trigram's losses of a whole split are computed once per corpus and kept in a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

from bench.data.cache import cache_folder, cached
from bench.data.corpus import Corpus
from bench.data.kneser_ney import LARGEST_VOCABULARY, token_nll
from bench.data.split import SPLITS
from bench.data.vocabulary import unigram_nll
from gnnmoe.naming import unknown_name

FORMAT_VERSION = 1  # goes up when the file or the trigram model changes; older files are replaced


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

    From the cache where it is there, else computed and put there; see ``reference_nll``.
    """
    split = corpus.splits[split_name]
    folder = cache_folder(cache_dir) / "reference_lines"
    path = folder / f"{corpus.sha256}-{split_name}.npz"
    return cached(
        path,
        "reference line",
        lambda: token_nll(corpus.splits["train"].stream, split.stream, corpus.vocabulary.size),
        read=lambda file: _read(file, split.num_tokens),
        write=lambda file, nll: np.savez(file, format_version=FORMAT_VERSION, nll=nll),
    )


def _read(file: IO[bytes], num_tokens: int) -> np.ndarray | None:
    """Return the losses kept in a file, None where they are outdated."""
    with np.load(file, allow_pickle=False) as stored:
        if int(stored["format_version"]) != FORMAT_VERSION:
            return None
        nll = stored["nll"]
    if nll.shape != (num_tokens,) or nll.dtype != np.float64 or not np.isfinite(nll).all():
        raise ValueError(f"it does not hold {num_tokens} losses")
    return nll
