"""Everything before a run's first number: what a user can get wrong is refused here, unwritten."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from bench.config import RunConfig
from bench.data.corpus import Corpus, load_corpus
from bench.data.loader import create_loader
from bench.device import resolve_device
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
    loaders: dict[str, DataLoader[Any]]
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
    loaders = _loaders(config, corpus)
    model = coupler_identity(model_config)
    if model_config.vocab_size != corpus.vocabulary.size:  # else it follows from the data
        model["vocab_size"] = model_config.vocab_size
    known_by = identity(config, model, corpus.sha256, device.type)
    name = run_id(known_by)
    folder = RunFolder(config.places.results_dir, config.places.study, name)
    seconds = {"prepare": time.perf_counter() - start}
    return Prepared(config, model_config, device, corpus, loaders, folder, name, known_by, seconds)


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


def _loaders(config: RunConfig, corpus: Corpus) -> dict[str, DataLoader[Any]]:
    size, length, seed = config.training.batch_size, config.model.max_seq_length, config.training.seed
    shared: dict[str, Any] = {
        "max_seq_length": length, "seed": seed, "num_workers": config.places.num_workers_dataloader,
    }  # fmt: skip
    evaluated = {**shared, "num_samples": config.data.num_eval_samples}
    half = max(1, length // 2)
    loaders = {
        "train": create_loader(corpus, "train", size, num_samples=config.data.num_train_samples, **shared),
        "val": create_loader(corpus, "val", size, **evaluated),
        "val_final": create_loader(corpus, "val", size, stride=half, **evaluated),
    }
    if config.data.evaluate_test:
        loaders["test"] = create_loader(corpus, "test", size, stride=half, **shared)
    return loaders
