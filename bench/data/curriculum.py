"""A curriculum: each epoch serves a growing share of the blocks, the easiest blocks first.

Source: Platanios et al., "Competence-based Curriculum Learning", NAACL 2019 (arXiv:1903.09848).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data.blocks import TrainBlocks
from bench.data.tokenizer import Vocabulary
from bench.files import kind_of
from gnnmoe.config import Refused, unknown_name
from gnnmoe.reading import from_home
from gnnmoe.seeds import stream_seed

ScoreBlocks = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets (B, L) int64 → the mean nll of each block (B,) in nats."""
ScoreByCheckpoint = Callable[[Path, TrainBlocks], np.ndarray]
"""An existing checkpoint and blocks → the scores of its model, as ``model_scores`` returns them."""

PACINGS = ("linear", "competence_sqrt")
_CHUNK = 4096  # blocks scored at once by rarity
_BATCH = 32  # blocks scored at once by a model


class DifficultyModelMissing(Refused):
    """The model that should order the blocks of a curriculum does not exist."""


@dataclass(frozen=True, eq=False)
class Curriculum:
    """The easiest share of the blocks by epoch; epoch ``epochs`` − 1 and all later epochs serve every block.

    With t = epoch / (epochs − 1), the share is start + (1 − start)·t for ``linear`` and
    √(start² + (1 − start²)·t) for ``competence_sqrt``. Blocks with equal scores keep their order.
    ``order_source`` is "rarity", "model" or "random_fallback".

    Shapes: ``scores`` (blocks,), a low score for an easy block.

    Raises:
        Refused: scores that are not finite, an unknown pacing, epochs below 1, or a start outside (0, 1].
    """

    scores: np.ndarray
    pacing: str
    epochs: int
    start: float = 0.2
    order_source: str = "rarity"
    easiest_first: np.ndarray = field(init=False, repr=False)
    """Numbers of the blocks from the easiest to the hardest, (blocks,) int64."""

    def __post_init__(self) -> None:
        if self.pacing not in PACINGS:
            raise Refused(unknown_name("curriculum pacing", self.pacing, PACINGS))
        if self.epochs < 1:
            raise Refused(f"curriculum epochs must be 1 or more; got {self.epochs}")
        if not 0 < self.start <= 1:
            raise Refused(f"curriculum start must lie in (0, 1], a share of the blocks; got {self.start}")
        if self.scores.ndim != 1 or not len(self.scores):
            raise ValueError(f"difficulty scores must be one number a block; got shape {self.scores.shape}")
        wrong = np.flatnonzero(~np.isfinite(self.scores))
        if len(wrong):
            raise Refused(
                f"{len(wrong):,} of {len(self.scores):,} difficulty scores are not finite, the first that of "
                f"block {wrong[0]} ({self.scores[wrong[0]]}); mend the scorer, or use the scorer 'rarity'"
            )
        object.__setattr__(self, "easiest_first", np.argsort(self.scores, kind="stable"))

    def share(self, epoch: int) -> float:
        """Return the share of the blocks that ``epoch`` serves, in (0, 1]."""
        if epoch >= self.epochs - 1:
            return 1.0
        progress = epoch / (self.epochs - 1)
        if self.pacing == "linear":
            return self.start + (1 - self.start) * progress
        return math.sqrt(self.start**2 + (1 - self.start**2) * progress)

    def size(self, epoch: int) -> int:
        """Return the number of blocks that ``epoch`` serves: the rounded share, at least 1."""
        return max(1, round(self.share(epoch) * len(self.scores)))

    def subset(self, epoch: int) -> np.ndarray:
        """Return the numbers of the easiest blocks of ``epoch``, in rising order, (size,) int64."""
        return np.sort(self.easiest_first[: self.size(epoch)])

    def to_record(self) -> dict[str, Any]:
        """Return the entries of a run's record about its curriculum, ready for JSON."""
        names = ("order_source", "pacing", "epochs", "start")
        return {name: getattr(self, name) for name in names} | {
            "blocks_by_epoch": [self.size(epoch) for epoch in range(self.epochs)]
        }


def make_curriculum(
    blocks: TrainBlocks,
    vocabulary: Vocabulary,
    scorer: str,
    *,
    pacing: str,
    epochs: int,
    start: float = 0.2,
    seed: int = 0,
    strict: bool = False,
    score_by_checkpoint: ScoreByCheckpoint | None = None,
) -> Curriculum:
    """Return the curriculum of ``blocks`` by ``scorer``: "rarity" or "model:CHECKPOINT".

    ``score_by_checkpoint`` scores by a checkpoint. If the checkpoint is missing, the order is random and
    fixed by ``seed``, with one warning.

    Raises:
        DifficultyModelMissing: the checkpoint is missing and ``strict`` is set.
        Refused: another wrong argument, or scores that are not finite.
    """
    source, path = parts_of(scorer)
    if source == "rarity":
        scores = rarity_scores(blocks, vocabulary)
    elif path is not None and kind_of(path) == "file":
        assert score_by_checkpoint is not None, "whoever allows a model as scorer says how it scores"
        scores = score_by_checkpoint(path, blocks)
    else:
        scores, source = _random_scores(path, len(blocks), seed, strict), "random_fallback"
    return Curriculum(scores, pacing, epochs, start, source)


def parts_of(scorer: str) -> tuple[str, Path | None]:
    """Return "rarity" or "model", and the path of the model's checkpoint, where it has any.

    Raises:
        Refused: there is no such scorer, or the path begins with an unknown home folder.
    """
    kind, _, path = scorer.partition(":")
    if kind not in ("rarity", "model") or (kind == "rarity" and path):
        raise Refused(unknown_name("curriculum scorer", scorer, ("rarity", "model:CHECKPOINT")))
    return kind, from_home(Path(path), "curriculum") if path else None


def rarity_scores(blocks: TrainBlocks, vocabulary: Vocabulary) -> np.ndarray:
    """Return the mean −log p_unigram in nats of each block's targets, (blocks,) float64.

    Platanios et al. take the sum over a sentence. Blocks are equally long, so the order is the same.
    """
    rarity = -vocabulary.log_unigram()
    chunks = range(0, len(blocks), _CHUNK)
    parts = (_numbers(blocks, first, _CHUNK) for first in chunks)
    return np.concatenate([rarity[blocks.__getitems__(part)["targets"].numpy()].mean(1) for part in parts])


@torch.no_grad()
def model_scores(blocks: TrainBlocks, score_blocks: ScoreBlocks) -> np.ndarray:
    """Return the mean nll in nats that a model gives each block, (blocks,) float64."""
    parts = []
    for first in range(0, len(blocks), _BATCH):
        batch = blocks.__getitems__(_numbers(blocks, first, _BATCH))
        scores = score_blocks(batch["input_ids"], batch["targets"])
        if scores.shape != batch["targets"].shape[:1]:
            raise ValueError(
                f"a scorer returns one number a block, ({len(batch['targets'])},); got {tuple(scores.shape)}"
            )
        parts.append(scores.double().cpu().numpy())
    return np.concatenate(parts)


def _numbers(blocks: TrainBlocks, first: int, count: int) -> range:
    return range(first, min(first + count, len(blocks)))


def _random_scores(path: Path | None, blocks: int, seed: int, strict: bool) -> np.ndarray:
    missing = "the curriculum has no difficulty model"
    if path is not None:
        missing = f"the curriculum's difficulty model {path} is not there"
    remedy = "pass model:CHECKPOINT with the checkpoint.pt of a finished run, or the scorer rarity"
    if strict:
        raise DifficultyModelMissing(f"{missing}; {remedy}, or drop --strict-curriculum")
    warnings.warn(
        f"{missing}: a random order of the blocks serves, over the same sizes; {remedy}", stacklevel=3
    )
    generator = np.random.default_rng(stream_seed(seed, "data.curriculum"))
    return generator.permutation(blocks).astype(np.float64)
