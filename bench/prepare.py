"""Everything before a run's first number: what a user can get wrong is refused here, unwritten."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.config import RunConfig
from bench.data.blocks import TrainBlocks
from bench.data.corpus import Corpus, load_corpus
from bench.data.curriculum import Curriculum, make_curriculum
from bench.data.loader import BlockLoader, create_loader
from bench.data.validation import validate_first_batch
from bench.device import resolve_device
from bench.difficulty import checkpoint_scorer
from bench.gate import refuse_wrong_names
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
    corpus = load_corpus(**_corpus_arguments(config))
    _refuse_another_text(config, corpus)
    model_config = config.model.resolved(corpus.vocabulary.size)
    _refuse_missing_rows(model_config, corpus)
    loaders = _loaders(config, corpus, device)
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
        key = repr((_corpus_arguments(config), config.data.dataset_name))
        if key not in self._corpora:
            corpus = load_corpus(**_corpus_arguments(config))
            _refuse_another_text(config, corpus)
            self._corpora[key] = corpus
        corpus, device = self._corpora[key], resolve_device(config.places.device)
        model_config = config.model.resolved(corpus.vocabulary.size)
        _refuse_missing_rows(model_config, corpus)
        order = None
        if config.training.curriculum is not None:
            order = _order_of(_loaders(config, corpus, device)["train"])
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
    """Return what a curriculum changes: its pace, and the order of the blocks by content."""
    curriculum = loader.sampler_obj.curriculum
    if curriculum is None:
        return None
    order = curriculum.easiest_first.astype("<i8").tobytes()
    return {**curriculum.to_record(), "order_sha256": hashlib.sha256(order).hexdigest()}


def _corpus_arguments(config: RunConfig) -> dict[str, Any]:
    source, named = config.places.data_source, config.data.dataset_name is not None
    if source == "auto" and named:  # asked for by name: no embedded text in its place
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
    asked = (config.data.dataset_name, config.data.dataset_config_name)
    if asked[0] is not None and asked != (corpus.name, corpus.config_name):
        raise ValueError(
            f"asked for {asked[0]} {asked[1]} by name, but the {corpus.source} holds "
            f"{corpus.name} {corpus.config_name} ({corpus.verdict}); "
            "drop --dataset-name to use it, or name another --data-dir."
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


def _loaders(config: RunConfig, corpus: Corpus, device: torch.device) -> dict[str, BlockLoader]:
    training, length, seed = config.training, config.model.max_seq_length, config.training.seed
    size = training.batch_size
    shared: dict[str, Any] = {
        "max_seq_length": length, "seed": seed, "num_workers": config.places.num_workers_dataloader,
    }  # fmt: skip
    evaluated = {**shared, "num_samples": config.data.num_eval_samples}
    half = max(1, length // 2)
    loaders = {
        "train": create_loader(
            corpus, "train", size, num_samples=config.data.num_train_samples,
            batch_schedule=training.batch_schedule, curriculum=_curriculum(config, corpus, device),
            min_batches=training.min_steps_per_epoch, **shared,
        ),
        "val": create_loader(corpus, "val", size, **evaluated),
        "val_final": create_loader(corpus, "val", size, stride=half, **evaluated),
    }  # fmt: skip
    if config.data.evaluate_test:
        loaders["test"] = create_loader(corpus, "test", size, stride=half, **shared)
    return loaders


def _curriculum(
    config: RunConfig, corpus: Corpus, device: torch.device
) -> Callable[[TrainBlocks], Curriculum] | None:
    training = config.training
    if training.curriculum is None:
        return None
    scorer, epochs = training.curriculum, training.epochs
    assert epochs is not None, "the config refuses a curriculum without epochs"

    def make(blocks: TrainBlocks) -> Curriculum:
        return make_curriculum(
            blocks, corpus.vocabulary, scorer, pacing=training.curriculum_pacing, epochs=epochs,
            start=training.curriculum_start, seed=training.seed, strict=training.strict_curriculum,
            load_model=lambda path: checkpoint_scorer(path, corpus, device),
        )  # fmt: skip

    return make
