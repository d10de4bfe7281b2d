"""Everything before a run's first number: what a user can get wrong is refused here, unwritten."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.config import RunConfig
from bench.data.corpus import Corpus, load_corpus, say_unknown_words
from bench.data.loader import BlockLoader
from bench.data.sources import known_as
from bench.gate import refuse_wrong_names
from bench.identity import Identified, configuration_id, identity, run_id, settings_in_record
from bench.loaders import (
    make_loaders,
    order_of,
    refuse_curriculum_without_epochs,
    scorer_identity,
    validate_first_batches,
)
from bench.measure.code import code_hashes
from bench.record import ReadOnlyFolder, RunFolder, Settings, check_writable
from bench.training.execution import Execution
from bench.training.ranks import ALONE, Ranks
from bench.tune.budget import refuse_uneven_pieces, refuse_wrong_flags, refuse_wrong_sizes
from bench.tune.find import Request, Say, request_for
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers import coupler_identity


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
    def record_config(self) -> Settings:
        """The config as the record holds it."""
        return settings_in_record(self.config)

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

    def search(self, say: Say, *, any_size: bool = False, start: int | None = None) -> Request:
        """Return the search for what fits, as ``request_for``."""
        # A curriculum never serves fewer blocks than in its first epoch.
        samples = self.loaders["train"].sampler_obj.samples_in(0)
        return request_for(
            self.config, self.model_config, self.corpus, self.device, self.ranks,
            epoch_samples=samples, any_size=any_size, start=start, say=say,
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
    corpus = load_corpus(**_corpus_arguments(config))
    _refuse_another_text(config, corpus)
    say_unknown_words(corpus.splits)
    model_config = config.model.resolved(corpus.vocabulary.size)
    _refuse_missing_rows(model_config, corpus)
    refuse_wrong_sizes(config, model_config, device, ranks)
    loaders = make_loaders(config, corpus, device, ranks)
    validate_first_batches(loaders)
    order = order_of(loaders["train"])
    known_by = _identity(config, model_config, corpus, device, order, ranks.world_size)
    name = run_id(known_by)
    folder = (RunFolder if ranks.first else ReadOnlyFolder)(
        config.places.results_dir, config.places.study, name
    )
    seconds = {"prepare": time.perf_counter() - start}
    shared = configuration_id(known_by, scorer_identity(config.training))
    return Prepared(
        config, model_config, execution, corpus, loaders, folder, name, known_by, shared,
        code_hashes(model_config), seconds, ranks,
    )  # fmt: skip


class Identifier:
    """Says of many configs what makes them the runs they are, as ``prepare`` does; loads each text once.

    ``device`` is that of runs on other machines, which this one may lack; without it, each config's own.
    ``world_size`` processes share each batch.
    """

    def __init__(self, device: torch.device | None = None, world_size: int = 1) -> None:
        self._device, self._world_size = device, world_size
        self._corpora: dict[str, Corpus] = {}

    def __call__(self, config: RunConfig) -> Identified:
        """Return what makes a config the run that it is.

        Raises:
            Refused: as ``prepare``, for what can be seen without building the model.
        """
        refuse_wrong_flags(config.memory)
        refuse_curriculum_without_epochs(config.training)
        refuse_uneven_pieces(config.training.batch_sizes, 1, self._world_size)
        key = repr((_corpus_arguments(config), _asked_by_name(config)))
        if key not in self._corpora:
            corpus = load_corpus(**_corpus_arguments(config))
            _refuse_another_text(config, corpus)
            self._corpora[key] = corpus
        corpus, device = self._corpora[key], self._device or Execution.of(config).device
        model_config = config.model.resolved(corpus.vocabulary.size)
        _refuse_missing_rows(model_config, corpus)
        order = None
        if config.training.curriculum is not None:
            here = device if self._device is None else torch.device("cpu")
            order = order_of(make_loaders(config, corpus, here)["train"])
        found = _identity(config, model_config, corpus, device, order, self._world_size)
        shared = configuration_id(found, scorer_identity(config.training))
        return Identified(found, model_config, corpus, shared, code_hashes(model_config))


def _identity(
    config: RunConfig,
    model_config: GNNMoEConfig,
    corpus: Corpus,
    device: torch.device,
    order: dict[str, Any] | None,
    world_size: int = 1,
) -> dict[str, Any]:
    model = coupler_identity(model_config)
    if model_config.vocab_size != corpus.vocabulary.size:  # else it follows from the data
        model["vocab_size"] = model_config.vocab_size
    return identity(config, model, corpus.sha256, device.type, world_size, curriculum=order)


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
        Refused: naming both.
    """
    asked, data = _asked_by_name(config), config.data
    if asked is None or asked == (corpus.name, corpus.config_name):
        return
    flags = {"--dataset": data.dataset_name, "--dataset-config-name": data.dataset_config_name}
    given = " and ".join(flag for flag, value in flags.items() if value is not None)
    raise Refused(
        f"asked for {' '.join(asked).strip()} by name, but the {corpus.source} holds "
        f"{f'{corpus.name} {corpus.config_name}'.strip()} ({corpus.verdict}); "
        f"drop {given} to use it, or name another --data-dir."
    )


def _refuse_missing_rows(model_config: GNNMoEConfig, corpus: Corpus) -> None:
    """Refuse a vocabulary in which words of the data have no row.

    Raises:
        Refused: naming both sizes.
    """
    words = corpus.vocabulary.size
    if model_config.vocab_size < words:
        raise Refused(
            f"vocab_size is {model_config.vocab_size}, but the data have {words} words; "
            f"it must be {words} or more (None: as many as the data have)."
        )
