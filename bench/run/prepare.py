"""Everything before a run's first number: what a user can get wrong is refused here, unwritten."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.config import RunConfig
from bench.data.corpus import Corpus, say_unknown_words
from bench.data.loader import BlockLoader
from bench.gate import refuse_wrong_names
from bench.record import ReadOnlyFolder, RecordedConfig, RunFolder, check_writable
from bench.run.identity import identified, run_id, settings_in_record
from bench.training.evaluation import probe_tokens
from bench.training.loaders import (
    load_text,
    make_loaders,
    model_for,
    order_of,
    refuse_curriculum_without_epochs,
    validate_first_batches,
)
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Execution
from bench.tune.find import Request, Say, refuse_wrong_sizes, request_for
from gnnmoe.config import GNNMoEConfig


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its first number; making it writes nothing.

    ``run_id`` and ``identity`` are those of what was asked for. Where the length is fitted, the run begins
    with that, and all that follows is given ``at_length``.
    """

    config: RunConfig
    model_config: GNNMoEConfig
    execution: Execution
    corpus: Corpus
    loaders: dict[str, BlockLoader]
    """train; val as used while training; val_final and, where asked for, test, at half the stride."""
    folder: RunFolder
    run_id: str
    identity: dict[str, Any]
    """Everything that can change one of the run's numbers; the run_id is its hash."""
    configuration: str
    """What all seeds of the run's configuration share: ``configuration_id``."""
    code: dict[str, str]
    """The hashes of the code that runs: ``code_hashes``."""
    seconds: dict[str, float]
    ranks: Ranks = ALONE
    """The processes that share each of its batches."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.execution.device

    @property
    def record_config(self) -> RecordedConfig:
        """The config as the record holds it."""
        return settings_in_record(self.config)

    def probe(self) -> Tensor:
        """Return the validation tokens (B, L) on which couplers are asked; they are alike on all ranks."""
        windows, rows = self.loaders["val"].dataset_obj, self.config.training.batch_size
        batch = windows.__getitems__(list(range(min(rows, len(windows)))))
        return probe_tokens(batch["input_ids"]).to(self.device)

    @property
    def checkpoint(self) -> Path:
        """Where the run's checkpoint lies."""
        folder = self.config.places.checkpoint_dir
        return self.folder.path / "checkpoint.pt" if folder is None else folder / f"{self.run_id}.pt"

    @property
    def trained_identity(self) -> dict[str, Any]:
        """The identity with the length that the model has: what its weights are loaded by."""
        model = {**self.identity["model"], "max_seq_length": self.model_config.max_seq_length}
        return {**self.identity, "model": model}

    def at_length(self, length: int) -> Prepared:
        """Return the run with this length throughout: model, training blocks and evaluation windows."""
        if length == self.model_config.max_seq_length:
            return self
        config = replace(self.config, model=replace(self.config.model, max_seq_length=length))
        loaders = make_loaders(config, self.corpus, self.device, self.ranks)
        validate_first_batches(loaders)
        model_config = replace(self.model_config, max_seq_length=length)
        return replace(self, config=config, model_config=model_config, loaders=loaders)

    def search(self, say: Say) -> Request:
        """Return the search for what fits, as ``request_for``."""
        # A curriculum never serves fewer blocks than in its first epoch.
        return request_for(
            self.config, self.model_config, self.corpus, self.device, self.ranks, say=say,
            epoch_samples=self.loaders["train"].sampler_obj.samples_in(0),
        )  # fmt: skip


def prepare(config: RunConfig, ranks: Ranks = ALONE) -> Prepared:
    """Check everything that a user can get wrong, and load the data; all but the first rank keep silent.

    Raises:
        Refused: saying what was wrong, what is allowed and what to do.
    """
    start = time.perf_counter()
    if ranks.first:
        check_writable(config.places.results_dir)
    else:
        config = replace(config, places=replace(config.places, quiet=True, plots=False, track=None))
    execution = Execution.of(config, ranks)
    device = execution.device
    refuse_wrong_names(config.model.resolved(1))  # before the data are read
    refuse_curriculum_without_epochs(config.training)
    corpus = load_text(config)
    say_unknown_words(corpus.splits)
    model_config = model_for(config, corpus)
    refuse_wrong_sizes(config, model_config, device, ranks)
    loaders = make_loaders(config, corpus, device, ranks)
    validate_first_batches(loaders)
    known_by = identified(config, model_config, corpus, device, order_of(loaders["train"]), ranks.world_size)
    name = run_id(known_by.identity)
    folder = (RunFolder if ranks.first else ReadOnlyFolder)(
        config.places.results_dir, config.places.study, name
    )
    return Prepared(
        config, model_config, execution, corpus, loaders, folder, name, known_by.identity,
        known_by.configuration, known_by.code, {"prepare": time.perf_counter() - start}, ranks,
    )  # fmt: skip
