"""The final evaluation of a run: raw sums for its record, and the nll of every token."""

from __future__ import annotations

import time

import numpy as np

from bench.data.blocks import EvalWindows
from bench.data.reference_lines import reference_nll
from bench.gate import Scored
from bench.learning import Learning
from bench.prepare import Prepared
from bench.record import Quality, SplitQuality, not_measured
from bench.training.evaluation import evaluate
from gnnmoe.model import GNNMoEModel


def score(
    prepared: Prepared, model: GNNMoEModel, learning: Learning
) -> tuple[Quality, dict[str, np.ndarray], list[Scored]]:
    """Return the record's ``quality``, the arrays of nll.npz, and each split as it was scored.

    The arrays are by split the nll in nats (T,) and the document of each target.

    On several ranks each scores a stretch of the text, and all return the whole.
    """
    loaders, device = prepared.loaders, prepared.device
    found: dict[str, SplitQuality] = {}
    arrays: dict[str, np.ndarray] = {}
    scored: list[Scored] = []
    for split, loader in (("validation", loaders["val_final"]), ("test", loaders.get("test"))):
        if loader is None:
            continue
        start = time.perf_counter()
        result = evaluate(model, loader, device, learning.micro_batch_size, prepared.ranks)
        scored.append(Scored(split, loader, result.nll, time.perf_counter() - start))
        windows = loader.dataset
        assert isinstance(windows, EvalWindows)
        learning.ledger.evaluated(f"{split} at the end", windows.num_scored, result.tokens)
        words, text_bytes = windows.split.words_and_bytes(result.tokens)
        lines = reference_nll(prepared.corpus, split, result.tokens)
        found[split] = SplitQuality(
            nll_sum=result.nll_sum, tokens=result.tokens, words=words, bytes=text_bytes,
            unknown_words=windows.split.unknown_words(result.tokens),
            length=windows.length, stride=windows.stride,
            **{f"{line}_nll_sum": nll_sum for line, nll_sum in lines.items()},
        )  # fmt: skip
        arrays |= {f"{split}_nll": result.nll, f"{split}_document": windows.document_ids().astype(np.int32)}
    not_asked = not_measured("not asked for; --evaluate-test scores it")
    quality = Quality(validation=found["validation"], test=found.get("test", not_asked),
                      best_step=learning.trainer.done.best_step)  # fmt: skip
    return quality, arrays, scored
