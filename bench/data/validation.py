"""A look at the first batch before anything is trained on it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.data.loader import BlockLoader
from gnnmoe.config import Refused
from gnnmoe.head import IGNORED

_KEYS = ("input_ids", "targets")


class BatchValidationError(Refused, AssertionError):
    """The first batch is not what the model expects; ``check`` names the check that failed."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"the first batch fails the check {check!r}: {detail}")
        self.check = check


def validate_first_batch(loader: BlockLoader, vocabulary_sha256: str | None = None) -> bool:
    """Return True if the loader's next batch is sound.

    Checks keys, dtype, shapes, ids in range, targets that are the inputs one later, the vocabulary
    against ``vocabulary_sha256`` (a checkpoint's, say) and finite curriculum scores. The
    batch is made beside the loader: no random number is drawn, and the loader stands where it stood.

    Raises:
        BatchValidationError: naming the first check that failed, also under ``python -O``.
    """
    corpus = loader.corpus
    if vocabulary_sha256 not in (None, corpus.vocabulary.sha256):
        detail = f"{corpus.name} has another one than was expected; use the same data set and tokenizer"
        raise BatchValidationError("vocabulary", detail)
    curriculum = loader.sampler_obj.curriculum
    if curriculum is not None and not np.isfinite(curriculum.scores).all():
        raise BatchValidationError(
            "scores", "curriculum scores are not all finite; make the curriculum again"
        )
    numbers = next(iter(loader.sampler_obj), [])
    if not numbers:
        raise BatchValidationError("shape", "there is no batch in this epoch; use a smaller batch")
    batch = loader.dataset_obj.__getitems__(numbers)
    _check_form(batch, (len(numbers), loader.dataset_obj.length))
    _check_ids(batch, corpus.vocabulary.size)
    _check_shift(batch["input_ids"], batch["targets"])
    return True


def _check_form(batch: dict[str, Tensor], shape: tuple[int, int]) -> None:
    if set(batch) != set(_KEYS):
        detail = f"{', '.join(sorted(batch)) or 'none'}; {' and '.join(_KEYS)} are expected"
        raise BatchValidationError("keys", detail)
    for name in _KEYS:
        tensor = batch[name]
        if tensor.dtype != torch.int64:
            raise BatchValidationError("dtype", f"{name} is {tensor.dtype}, torch.int64 is expected")
        if tuple(tensor.shape) != shape:
            detail = f"{name} is {tuple(tensor.shape)}, {shape} (batch, length) is expected"
            raise BatchValidationError("shape", detail)


def _check_ids(batch: dict[str, Tensor], vocabulary: int) -> None:
    for name in _KEYS:
        ids = batch[name][batch[name] != IGNORED] if name == "targets" else batch[name]
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if len(outside):
            detail = (
                f"{len(outside)} of the {name} lie outside 0..{vocabulary - 1}, first {int(outside[0])}; "
                "the ids belong to another vocabulary"
            )
            raise BatchValidationError("range", detail)


def _check_shift(inputs: Tensor, targets: Tensor) -> None:
    scored = targets != IGNORED
    if not scored.any(dim=1).all():
        raise BatchValidationError("shift", "a sample has no target to score")
    # Past the last target of a text the inputs are padding, so both neighbours have to be scored.
    both = scored[:, :-1] & scored[:, 1:]
    wrong = int((targets[:, :-1] != inputs[:, 1:])[both].sum())
    if wrong:
        detail = (
            f"{wrong} of {int(both.sum())} targets are not the next input; targets are the inputs one later: "
            "targets[:, :-1] == input_ids[:, 1:]"
        )
        raise BatchValidationError("shift", detail)
