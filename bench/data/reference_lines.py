"""Reference lines of perplexity: what simple models score on exactly the tokens that a run scores.

The Kneser-Ney trigram's losses of a whole split are computed once per corpus and kept in a folder.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

from bench.data.cache import cache_folder
from bench.data.corpus import Corpus
from bench.data.kneser_ney import token_nll
from bench.data.split import SPLITS
from bench.data.vocabulary import unigram_nll
from gnnmoe.naming import unknown_name

FORMAT_VERSION = 1  # goes up when the file or the trigram model changes; older files are replaced
_BROKEN = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


def reference_nll(
    corpus: Corpus, split_name: str, num_scored: int, cache_dir: Path | None = None
) -> dict[str, float]:
    """Return Σ −ln p over the first ``num_scored`` targets of a split, in nats, for each line.

    "unigram": frequencies of training plus one (``Vocabulary.log_unigram``). "kneser_ney_trigram":
    interpolated, discount 0.75 (``KneserNey``). Both are trained on the training split. Sums are in
    float64; perplexity = exp(Σ / num_scored). ``cache_dir`` is the folder for files that can be made
    again; by default GNNMOE_CACHE_DIR, else XDG_CACHE_HOME/gnnmoe, else ~/.cache/gnnmoe. A broken
    file is made again and a folder that cannot be written is left alone, each with one warning.

    Raises:
        ValueError: an unknown split, or ``num_scored`` outside 1 .. its tokens.
    """
    if split_name not in SPLITS:
        raise ValueError(unknown_name("split", split_name, SPLITS))
    split = corpus.splits[split_name]
    if not 1 <= num_scored <= split.num_tokens:
        raise ValueError(f"num_scored must lie in 1..{split.num_tokens:,} ({split_name}); got {num_scored:,}")
    trigram = trigram_nll(corpus, split_name, cache_dir)[:num_scored]
    return {
        "unigram": unigram_nll(corpus.vocabulary, split.stream[1 : 1 + num_scored]),
        "kneser_ney_trigram": float(trigram.sum(dtype=np.float64)),
    }


def trigram_nll(corpus: Corpus, split_name: str, cache_dir: Path | None = None) -> np.ndarray:
    """Return the trigram's −ln p of each target of a split, (num_tokens,) float64 in nats.

    From the cache where it is there, else computed and put there; see ``reference_nll``.
    """
    split = corpus.splits[split_name]
    folder = cache_folder(cache_dir) / "reference_lines"
    path = folder / f"{corpus.sha256}-{split_name}.npz"
    nll = _read(path, split.num_tokens)
    if nll is None:
        nll = token_nll(corpus.splits["train"].stream, split.stream, corpus.vocabulary.size)
        _write(path, nll)
    return nll


def _read(path: Path, num_tokens: int) -> np.ndarray | None:
    """Return the losses kept in ``path``; None where they are missing, outdated or broken."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if int(stored["format_version"]) != FORMAT_VERSION:
                return None
            nll = stored["nll"]
        if nll.shape != (num_tokens,) or nll.dtype != np.float64 or not np.isfinite(nll).all():
            raise ValueError(f"it does not hold {num_tokens} losses")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _BROKEN as error:
        warnings.warn(f"the reference lines in {path} are broken ({error}); made again", stacklevel=4)
        return None
    return nll


def _write(path: Path, nll: np.ndarray) -> None:
    """Put the losses in ``path`` in one step, so that another run sees all of them or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, format_version=FORMAT_VERSION, nll=nll)
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"the reference lines are not kept in {path.parent}: {error}", stacklevel=4)
