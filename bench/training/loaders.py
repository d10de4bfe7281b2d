"""From a config to the text, the model's config and the batches of a run.

A curriculum can order the training blocks by the checkpoint of a finished run. Scoring a large text takes
minutes, so the scores are cached.
"""

from __future__ import annotations

import hashlib
import os
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.config import (
    DEFAULT_MAX_STEPS,
    BatchSchedule,
    DataConfig,
    ExecutionConfig,
    RunConfig,
    TrainingConfig,
)
from bench.data.blocks import TrainBlocks
from bench.data.cache import cache_folder, cached, key_of
from bench.data.corpus import Corpus, load_corpus
from bench.data.curriculum import Curriculum, ScoreBlocks, make_curriculum, model_scores, parts_of
from bench.data.loader import BlockLoader, Extent, create_loader, validate_first_batch
from bench.data.sources import known_as
from bench.files import kind_of
from bench.training.checkpoint import load_checkpoint
from bench.training.environment import couplers_sha256, project_sha256
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Execution
from gnnmoe.config import GNNMoEConfig, Refused, brief
from gnnmoe.model import GNNMoEModel

_REMEDY = "name the checkpoint.pt of a finished run"


def load_text(config: RunConfig) -> Corpus:
    """Return the text that a config asks for.

    Raises:
        Refused: as ``load_corpus``, the text is not the data set that was asked for by name, or it has no
            columns and one is named.
    """
    corpus = load_corpus(**corpus_arguments(config))
    _refuse_another_text(config, corpus)
    has_columns = corpus.source in ("hub", "cache") or any(name.endswith(".parquet") for name in corpus.files)
    column = config.data.text_column
    if column != DataConfig.text_column and not has_columns:
        raise Refused(
            f"text_column is {brief(column)}, but the {corpus.source} text has no columns; drop it, or name "
            "a --dataset or a folder of parquet files."
        )
    return corpus


def model_for(config: RunConfig, corpus: Corpus) -> GNNMoEConfig:
    """Return the model's config for the words of a text.

    Raises:
        Refused: the vocabulary has fewer rows than the text has words.
    """
    model, words = config.model.resolved(corpus.vocabulary.size), corpus.vocabulary.size
    if model.vocab_size < words:
        raise Refused(
            f"vocab_size is {model.vocab_size}, but the data have {words} words; "
            f"it must be {words} or more (None: as many as the data have)."
        )
    return model


def asked_by_name(config: RunConfig) -> tuple[str, str] | None:
    """Return the data set and the configuration that the user asked for; None if any text will do."""
    names = config.data.dataset_name, config.data.dataset_config_name
    return None if names == (None, None) else known_as(*names)


def corpus_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of ``load_corpus``; two configs with equal arguments have the same text."""
    source = config.places.data_source
    if source == "auto" and asked_by_name(config):  # no embedded text in its place
        has_folder = config.places.data_dir is not None or os.environ.get("GNNMOE_DATA_DIR")
        source = "folder" if has_folder else "hub"
    return {
        "data_dir": config.places.data_dir,
        "source": source,
        "dataset_name": config.data.dataset_name or "wikitext",
        "dataset_config_name": config.data.dataset_config_name,
        "text_column": config.data.text_column,
        "tokenizer": config.data.tokenizer,
    }


def _refuse_another_text(config: RunConfig, corpus: Corpus) -> None:
    """Refuse a text that is not the data set asked for by name.

    Raises:
        Refused: naming both.
    """
    asked, data = asked_by_name(config), config.data
    if asked is None or asked == (corpus.name, corpus.config_name):
        return
    flags = {"--dataset": data.dataset_name, "--dataset-config-name": data.dataset_config_name}
    given = " and ".join(flag for flag, value in flags.items() if value is not None)
    raise Refused(
        f"asked for {' '.join(asked).strip()} by name, but the {corpus.source} holds "
        f"{f'{corpus.name} {corpus.config_name}'.strip()} ({corpus.verdict}); "
        f"drop {given} to use it, or name another --data-dir."
    )


def make_loaders(
    config: RunConfig, corpus: Corpus, device: torch.device, ranks: Ranks = ALONE
) -> dict[str, BlockLoader]:
    """Return the loaders of a run, by the names in ``Prepared``, each with this rank's part of the batches.

    Raises:
        Refused: as ``create_loader``.
    """
    size, shared = _shared(config, device, ranks)
    evaluated = {**shared, "num_samples": config.data.num_eval_samples}
    half = max(1, config.model.max_seq_length // 2)
    loaders = {
        "train": training_loader(config, corpus, device, ranks),
        "val": create_loader(corpus, "val", size, **evaluated),
        "val_final": create_loader(corpus, "val", size, stride=half, **evaluated),
    }  # fmt: skip
    if config.data.evaluate_test:
        loaders["test"] = create_loader(corpus, "test", size, stride=half, **shared)
    return loaders


def training_loader(
    config: RunConfig, corpus: Corpus, device: torch.device, ranks: Ranks = ALONE
) -> BlockLoader:
    """Return the loader of the training batches, with this rank's part of them.

    Raises:
        Refused: as ``create_loader``.
    """
    size, shared = _shared(config, device, ranks)
    return create_loader(
        corpus, "train", size, num_samples=config.data.num_train_samples,
        batch_schedule=_schedule(config.training, ranks.world_size),
        curriculum=_curriculum(config, corpus, device),
        min_batches=config.training.min_steps_per_epoch, extent=_extent(config.training), **shared,
    )  # fmt: skip


def _shared(config: RunConfig, device: torch.device, ranks: Ranks) -> tuple[int, dict[str, Any]]:
    """Return the sequences of a batch on this rank, and the arguments that all loaders share."""
    return max(1, config.training.batch_size // ranks.world_size), {
        "max_seq_length": config.model.max_seq_length, "seed": config.training.seed,
        "num_workers": config.places.num_workers_dataloader, "pin_memory": device.type == "cuda",
        "rank": ranks.rank, "world_size": ranks.world_size,
    }  # fmt: skip


def validate_first_batches(loaders: dict[str, BlockLoader]) -> None:
    """Check the first batch of each loader; in a small evaluation a rank may have no batch.

    Raises:
        BatchValidationError: naming the first check that failed.
    """
    for loader in loaders.values():
        sampler = loader.sampler_obj
        if sampler.shard.rank == 0 or not sampler.contiguous or len(sampler):
            validate_first_batch(loader)


def _schedule(training: TrainingConfig, world_size: int) -> BatchSchedule | None:
    """Return the batch schedule of one rank."""
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
    """Raise Refused if there is a curriculum but no number of epochs."""
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
    """Return what a curriculum changes: the blocks per epoch, and a hash of their order by content.

    None if every epoch has all blocks: then the numbers are the same as without a curriculum.
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

    It is ``rarity``, or ``model:`` with the sha256 of the checkpoint, or ``random`` if that file is missing.
    """
    if training.curriculum is None:
        return None
    kind, path = parts_of(training.curriculum)
    if kind != "model":
        return kind
    if path is None or kind_of(path) != "file":
        return "random"
    try:
        with path.open("rb") as file:
            return f"model:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise Refused(f"--curriculum: {path} cannot be read ({error.strerror}).") from error


def difficulty_scores(
    path: Path,
    blocks: TrainBlocks,
    *,
    corpus: Corpus,
    device: torch.device,
    announce: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Return the mean nll in nats of each block by a checkpoint's model, (blocks,) float64.

    The scores are cached (see ``cache_folder``) for the same checkpoint and blocks. ``announce`` gets one
    sentence before scoring. Raises Refused as ``checkpoint_scorer``.
    """

    def make() -> np.ndarray:
        score = checkpoint_scorer(path, blocks.length, corpus, device)
        if announce is not None:
            announce(f"scoring {len(blocks):,} blocks by {path} …")
        return model_scores(blocks, score)

    return cached(
        cache_folder() / "difficulty" / f"{_key(path, blocks, corpus)}.npy",
        "set of difficulty scores",
        make,
        read=lambda file: np.load(file, allow_pickle=False),
        write=np.save,
    )


def _key(path: Path, blocks: TrainBlocks, corpus: Corpus) -> str:
    try:
        with path.open("rb") as file:
            checkpoint = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"checkpoint {path} cannot be read ({error.strerror}); {_REMEDY}.") from error
    indices = hashlib.sha256(blocks.indices.numpy().astype("<i8").tobytes()).hexdigest()
    text = corpus.sha256, corpus.splits["train"].stream_sha256
    return key_of(project_sha256(), couplers_sha256(), checkpoint, *text, blocks.length, indices)


def checkpoint_scorer(path: Path, length: int, corpus: Corpus, device: torch.device) -> ScoreBlocks:
    """Return a function from inputs and targets (B, ``length``) to the mean nll in nats of each block (B,).

    Raises:
        Refused: the file is no checkpoint of a run after its first evaluation, or the run had another
            text, shorter sequences, or a coupler from a file.
    """
    fields, weights = _contents(path, corpus)
    model = _model(path, fields, weights, corpus.vocabulary.size, device).eval()
    trained = model.config.max_seq_length
    if trained < length:
        raise _unfit(
            path,
            f"was trained at max_seq_length {trained}, but this run's blocks have {length} tokens; "
            f"use --max-seq-length {trained} or less, or a checkpoint trained at {length} or more",
        )

    def score(input_ids: Tensor, targets: Tensor) -> Tensor:
        return model.token_nll(input_ids.to(device), targets.to(device)).mean(1)

    return score


def _contents(path: Path, corpus: Corpus) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the model's fields and its best weights."""
    state = load_checkpoint(path, _REMEDY)
    try:
        fields, text = state["identity"]["model"], state["identity"]["data"]["sha256"]
        if state.get("tuned"):  # interrupted: its model has the length found, its identity the one asked for
            fields = {**fields, "max_seq_length": state["tuned"]["length"]}
        weights = state["model"] if "model" in state else state["trainer"]["best_model"]
    except KeyError as error:
        raise _unfit(path, f"is no checkpoint of a run: it lacks {error.args[0]}; {_REMEDY}") from error
    except TypeError as error:
        raise _unfit(path, f"is no checkpoint of a run: a part of it is no dict; {_REMEDY}") from error
    if text != corpus.sha256:
        there = f"{corpus.name} {corpus.config_name}".strip()
        raise _unfit(
            path,
            "was trained on another text or with another tokenizer; "
            f"name a checkpoint of a run on {there} with the tokenizer {corpus.tokenizer}",
        )
    if not weights:
        raise _unfit(path, f"is of a run that was interrupted before its first evaluation; {_REMEDY}")
    return fields, weights


def _model(
    path: Path, fields: dict[str, Any], weights: dict[str, Tensor], words: int, device: torch.device
) -> GNNMoEModel:
    """Return the model in float32, whatever its training precision: the scores only order the blocks."""
    try:
        config = GNNMoEConfig(**{"vocab_size": words, **fields})
        model = Execution(ExecutionConfig(), device).build(config, seed=0)
        model.load_state_dict(weights)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise _unfit(
            path,
            f"cannot be built again ({reason}); use one whose coupler is registered, made by this version",
        ) from error
    return model


def _unfit(path: Path, reason: str) -> Refused:
    return Refused(f"the curriculum's difficulty model {path} {reason}.")
