"""Everything before a run's first number: what a user can get wrong is refused here, unwritten."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.config import DEFAULT_MAX_STEPS, RunConfig, TrainingConfig
from bench.data.blocks import TrainBlocks
from bench.data.corpus import Corpus, load_corpus
from bench.data.curriculum import Curriculum, make_curriculum
from bench.data.loader import BlockLoader, create_loader
from bench.data.sampler import Extent
from bench.data.sources import known_as
from bench.data.validation import validate_first_batch
from bench.device import resolve_device
from bench.difficulty import difficulty_scores
from bench.gate import refuse_wrong_names
from bench.memory_checks import refuse_wrong_flags, refuse_wrong_sizes
from bench.records.schema import config_dict, identity, run_id
from bench.records.store import RunFolder, check_writable
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers import coupler_identity


@dataclass
class Prepared:
    """What a run needs before its first number; making it writes nothing."""

    config: RunConfig
    model_config: GNNMoEConfig
    device: torch.device
    corpus: Corpus
    loaders: dict[str, BlockLoader]
    """train; val as used while training; val_final and, where asked for, test, at half the stride."""
    folder: RunFolder
    run_id: str
    identity: dict[str, Any]
    """Everything that can change one of the run's numbers; the run_id is its hash."""
    seconds: dict[str, float]

    @property
    def record_config(self) -> dict[str, Any]:
        """The config as the record holds it."""
        return config_dict(self.config)

    @property
    def checkpoint(self) -> Path:
        """Where the run's checkpoint lies."""
        folder = self.config.places.checkpoint_dir
        return self.folder.path / "checkpoint.pt" if folder is None else folder / f"{self.run_id}.pt"


def prepare(config: RunConfig) -> Prepared:
    """Check everything that a user can get wrong, and load the data.

    Raises:
        ValueError: saying what was wrong, what is allowed and what to do.
    """
    start = time.perf_counter()
    check_writable(config.places.results_dir)
    device = resolve_device(config.places.device)
    refuse_wrong_names(config.model.resolved(1))  # before the data are read
    _refuse_curriculum_without_epochs(config.training)
    corpus = load_corpus(**_corpus_arguments(config))
    _refuse_another_text(config, corpus)
    model_config = config.model.resolved(corpus.vocabulary.size)
    _refuse_missing_rows(model_config, corpus)
    refuse_wrong_sizes(config, model_config, device)
    loaders = make_loaders(config, corpus, device)
    for loader in loaders.values():
        validate_first_batch(loader)
    known_by = _identity(config, model_config, corpus, device, _order_of(loaders["train"]))
    name = run_id(known_by)
    folder = RunFolder(config.places.results_dir, config.places.study, name)
    seconds = {"prepare": time.perf_counter() - start}
    return Prepared(config, model_config, device, corpus, loaders, folder, name, known_by, seconds)


class Identifier:
    """Says of many configs what makes them the runs they are, as ``prepare`` does; loads each text once."""

    def __init__(self) -> None:
        self._corpora: dict[str, Corpus] = {}

    def __call__(self, config: RunConfig) -> tuple[dict[str, Any], GNNMoEConfig, Corpus]:
        """Return the run's identity, its model and its text.

        Raises:
            ValueError: as ``prepare``, for what can be seen without building the model.
        """
        refuse_wrong_flags(config.memory)
        _refuse_curriculum_without_epochs(config.training)
        key = repr((_corpus_arguments(config), _asked_by_name(config)))
        if key not in self._corpora:
            corpus = load_corpus(**_corpus_arguments(config))
            _refuse_another_text(config, corpus)
            self._corpora[key] = corpus
        corpus, device = self._corpora[key], resolve_device(config.places.device)
        model_config = config.model.resolved(corpus.vocabulary.size)
        _refuse_missing_rows(model_config, corpus)
        order = None
        if config.training.curriculum is not None:
            order = _order_of(make_loaders(config, corpus, device)["train"])
        return _identity(config, model_config, corpus, device, order), model_config, corpus


def _identity(
    config: RunConfig,
    model_config: GNNMoEConfig,
    corpus: Corpus,
    device: torch.device,
    order: dict[str, Any] | None,
) -> dict[str, Any]:
    model = coupler_identity(model_config)
    if model_config.vocab_size != corpus.vocabulary.size:  # else it follows from the data
        model["vocab_size"] = model_config.vocab_size
    return identity(config, model, corpus.sha256, device.type, curriculum=order)


def _order_of(loader: BlockLoader) -> dict[str, Any] | None:
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


def _asked_by_name(config: RunConfig) -> tuple[str, str] | None:
    """Return the data set and the configuration that must be had; None where any text will do."""
    names = config.data.dataset_name, config.data.dataset_config_name
    return None if names == (None, None) else known_as(*names)


def _corpus_arguments(config: RunConfig) -> dict[str, Any]:
    source = config.places.data_source
    if source == "auto" and _asked_by_name(config):  # no embedded text in its place
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
        ValueError: naming both.
    """
    asked, data = _asked_by_name(config), config.data
    if asked is None or asked == (corpus.name, corpus.config_name):
        return
    flags = {"--dataset": data.dataset_name, "--dataset-config-name": data.dataset_config_name}
    given = " and ".join(flag for flag, value in flags.items() if value is not None)
    raise ValueError(
        f"asked for {' '.join(asked).strip()} by name, but the {corpus.source} holds "
        f"{f'{corpus.name} {corpus.config_name}'.strip()} ({corpus.verdict}); "
        f"drop {given} to use it, or name another --data-dir."
    )


def _refuse_missing_rows(model_config: GNNMoEConfig, corpus: Corpus) -> None:
    """Refuse a vocabulary in which words of the data have no row.

    Raises:
        ValueError: naming both sizes.
    """
    words = corpus.vocabulary.size
    if model_config.vocab_size < words:
        raise ValueError(
            f"vocab_size is {model_config.vocab_size}, but the data have {words} words; "
            f"it must be {words} or more (None: as many as the data have)."
        )


def make_loaders(config: RunConfig, corpus: Corpus, device: torch.device) -> dict[str, BlockLoader]:
    """Return the loaders of ``Prepared``; raises ValueError as ``create_loader``."""
    training, size, length = config.training, config.training.batch_size, config.model.max_seq_length
    shared: dict[str, Any] = {
        "max_seq_length": length, "seed": training.seed, "num_workers": config.places.num_workers_dataloader,
        "pin_memory": device.type == "cuda",
    }  # fmt: skip
    evaluated = {**shared, "num_samples": config.data.num_eval_samples}
    half = max(1, length // 2)
    loaders = {
        "train": create_loader(
            corpus, "train", size, num_samples=config.data.num_train_samples,
            batch_schedule=training.batch_schedule, curriculum=_curriculum(config, corpus, device),
            min_batches=training.min_steps_per_epoch, extent=_extent(training), **shared,
        ),
        "val": create_loader(corpus, "val", size, **evaluated),
        "val_final": create_loader(corpus, "val", size, stride=half, **evaluated),
    }  # fmt: skip
    if config.data.evaluate_test:
        loaders["test"] = create_loader(corpus, "test", size, stride=half, **shared)
    return loaders


def _extent(training: TrainingConfig) -> Extent:
    steps = training.max_steps
    if steps is None and training.epochs is None:
        steps = DEFAULT_MAX_STEPS
    return Extent(training.epochs, steps, training.max_batches_per_epoch)


def _refuse_curriculum_without_epochs(training: TrainingConfig) -> None:
    if training.curriculum is not None and training.epochs is None:
        raise ValueError("a curriculum paces itself by epochs; say how many, with --epochs.")


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
