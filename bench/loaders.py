"""The loaders of a run: its blocks in their order, and what is evaluated."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.config import DEFAULT_MAX_STEPS, RunConfig, TrainingConfig
from bench.data.blocks import TrainBlocks
from bench.data.corpus import Corpus
from bench.data.curriculum import Curriculum, make_curriculum
from bench.data.loader import BlockLoader, create_loader
from bench.data.sampler import Extent
from bench.data.validation import validate_first_batch
from bench.difficulty import difficulty_scores
from bench.schedule import BatchSchedule
from bench.training.ranks import ALONE, Ranks
from gnnmoe.config import Refused


def make_loaders(
    config: RunConfig, corpus: Corpus, device: torch.device, ranks: Ranks = ALONE
) -> dict[str, BlockLoader]:
    """Return the loaders of ``Prepared``, each with this rank's part of the batches.

    Raises:
        Refused: as ``create_loader``.
    """
    training, length, seed = config.training, config.model.max_seq_length, config.training.seed
    size = max(1, training.batch_size // ranks.world_size)
    shared: dict[str, Any] = {
        "max_seq_length": length, "seed": seed, "num_workers": config.places.num_workers_dataloader,
        "pin_memory": device.type == "cuda",
        "rank": ranks.rank, "world_size": ranks.world_size,
    }  # fmt: skip
    evaluated = {**shared, "num_samples": config.data.num_eval_samples}
    half = max(1, length // 2)
    loaders = {
        "train": create_loader(
            corpus, "train", size, num_samples=config.data.num_train_samples,
            batch_schedule=_schedule(training, ranks.world_size),
            curriculum=_curriculum(config, corpus, device),
            min_batches=training.min_steps_per_epoch, extent=_extent(training), **shared,
        ),
        "val": create_loader(corpus, "val", size, **evaluated),
        "val_final": create_loader(corpus, "val", size, stride=half, **evaluated),
    }  # fmt: skip
    if config.data.evaluate_test:
        loaders["test"] = create_loader(corpus, "test", size, stride=half, **shared)
    return loaders


def validate_first_batches(loaders: dict[str, BlockLoader]) -> None:
    """Look at the first batch of each loader; a rank of a small evaluation may have none.

    Raises:
        BatchValidationError: naming the first check that failed.
    """
    for loader in loaders.values():
        sampler = loader.sampler_obj
        if sampler.shard.rank == 0 or not sampler.contiguous or len(sampler):
            validate_first_batch(loader)


def _schedule(training: TrainingConfig, world_size: int) -> BatchSchedule | None:
    """Return the schedule of one rank's part of the batches."""
    if training.batch_schedule is None:
        return None
    sizes = BatchSchedule.parse(training.batch_schedule).sizes
    return BatchSchedule(tuple((epoch, size // world_size) for epoch, size in sizes))


def _extent(training: TrainingConfig) -> Extent:
    steps = training.max_steps
    if steps is None and training.epochs is None:
        steps = DEFAULT_MAX_STEPS
    return Extent(training.epochs, steps, training.max_batches_per_epoch)


def refuse_curriculum_without_epochs(training: TrainingConfig) -> None:
    """Raise Refused where a curriculum has no epochs to pace itself by."""
    if training.curriculum is not None and training.epochs is None:
        raise Refused("a curriculum paces itself by epochs; say how many, with --epochs.")


def _curriculum(
    config: RunConfig, corpus: Corpus, device: torch.device
) -> Callable[[TrainBlocks], Curriculum] | None:
    training = config.training
    if training.curriculum is None:
        return None
    scorer, epochs = training.curriculum, training.epochs
    assert epochs is not None, "refused before"
    announce = None if config.places.quiet else partial(print, file=sys.stderr, flush=True)

    def make(blocks: TrainBlocks) -> Curriculum:
        return make_curriculum(
            blocks, corpus.vocabulary, scorer, pacing=training.curriculum_pacing, epochs=epochs,
            start=training.curriculum_start, seed=training.seed, strict=training.strict_curriculum,
            score_by_checkpoint=partial(difficulty_scores, corpus=corpus, device=device, announce=announce),
        )  # fmt: skip

    return make


def order_of(loader: BlockLoader) -> dict[str, Any] | None:
    """Return what a curriculum changes: its pace, and the order of the blocks by content.

    None where every epoch has all blocks: then order and numbers are those without a curriculum.
    """
    curriculum = loader.sampler_obj.curriculum
    if curriculum is None or curriculum.size(0) == len(curriculum.scores):
        return None
    order = curriculum.easiest_first.astype("<i8").tobytes()
    return {
        "blocks_by_epoch": curriculum.to_record()["blocks_by_epoch"],
        "order_sha256": hashlib.sha256(order).hexdigest(),
    }


def scorer_identity(training: TrainingConfig) -> str | None:
    """Return what decides the order of a curriculum besides the seed; None without a curriculum.

    ``rarity``; ``model:`` and the sha256 of the checkpoint; or ``random``, where that file is missing.
    """
    if training.curriculum is None:
        return None
    kind, _, path = training.curriculum.partition(":")
    if kind != "model":
        return kind
    if not path or not Path(path).is_file():
        return "random"
    with Path(path).open("rb") as file:
        return f"model:{hashlib.file_digest(file, 'sha256').hexdigest()}"
