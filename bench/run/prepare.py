"""Everything before the first number of a run. User errors are refused here, before anything is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.check.leak_check import refuse_wrong_names
from bench.config import RunConfig
from bench.data.corpus import Corpus, say_unknown_words
from bench.data.loader import BlockLoader
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
from bench.tune.find import Say, refuse_wrong_sizes, request_for
from bench.tune.trials import Request
from gnnmoe.config import GNNMoEConfig


@dataclass(frozen=True)
class Prepared:
    """What a run needs before its first number; making it writes nothing.

    ``run_id`` and ``identity`` describe what the user asked for. If the length is fitted to the memory, the
    run searches first, and the later phases get ``at_length`` of the result.
    """

    config: RunConfig
    model_config: GNNMoEConfig
    execution: Execution
    corpus: Corpus
    loaders: dict[str, BlockLoader]
    """train; val for evaluations during training; val_final and, if asked for, test, with half the stride."""
    folder: RunFolder
    run_id: str
    identity: dict[str, Any]
    """Everything that can change a number of the run; the run_id is its hash."""
    configuration: str
    """The id that all seeds of the configuration share: ``configuration_id``."""
    code: dict[str, str]
    """The hashes of the code that runs: ``code_hashes``."""
    seconds: dict[str, float]
    ranks: Ranks = ALONE
    """The processes that share each batch."""

    @property
    def device(self) -> torch.device:
        """The device of the run."""
        return self.execution.device

    @property
    def record_config(self) -> RecordedConfig:
        """The config as it stands in the record."""
        return settings_in_record(self.config)

    def probe(self) -> Tensor:
        """Return the validation tokens (B, L) for ``communication``; all ranks have the same tokens."""
        windows, rows = self.loaders["val"].dataset_obj, self.config.training.batch_size
        batch = windows.__getitems__(list(range(min(rows, len(windows)))))
        return probe_tokens(batch["input_ids"]).to(self.device)

    @property
    def checkpoint(self) -> Path:
        """The path of the run's checkpoint."""
        folder = self.config.places.checkpoint_dir
        return self.folder.path / "checkpoint.pt" if folder is None else folder / f"{self.run_id}.pt"

    @property
    def trained_identity(self) -> dict[str, Any]:
        """The identity with the length of the trained model, from which its weights can be loaded."""
        model = {**self.identity["model"], "max_seq_length": self.model_config.max_seq_length}
        return {**self.identity, "model": model}

    def at_length(self, length: int) -> Prepared:
        """Return the run with this length for model, training blocks and evaluation windows."""
        if length == self.model_config.max_seq_length:
            return self
        config = replace(self.config, model=replace(self.config.model, max_seq_length=length))
        loaders = make_loaders(config, self.corpus, self.device, self.ranks)
        validate_first_batches(loaders)
        model_config = replace(self.model_config, max_seq_length=length)
        return replace(self, config=config, model_config=model_config, loaders=loaders)

    def search(self, say: Say) -> Request:
        """Return the memory search of this run: see ``request_for``."""
        # The first epoch of a curriculum has the fewest blocks.
        return request_for(
            self.config, self.model_config, self.corpus, self.device, self.ranks, say=say,
            epoch_samples=self.loaders["train"].sampler_obj.samples_in(0),
        )  # fmt: skip


def prepare(config: RunConfig, ranks: Ranks = ALONE) -> Prepared:
    """Check everything that a user can get wrong, and load the data; only the first rank prints.

    Raises:
        Refused: with what was wrong, what is allowed and what to do.
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
