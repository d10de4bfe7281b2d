"""Everything before a run's first number: what a user can get wrong is refused here, unwritten."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.config import DEFAULT_MAX_STEPS, RunConfig, TrainingConfig
from bench.data.blocks import TrainBlocks
from bench.data.corpus import Corpus, load_corpus, say_unknown_words
from bench.data.curriculum import Curriculum, make_curriculum
from bench.data.loader import BlockLoader, create_loader
from bench.data.sampler import Extent
from bench.data.sources import known_as
from bench.data.validation import validate_first_batch
from bench.gate import refuse_wrong_names
from bench.identity import Identified, configuration_id, identity, run_id, settings_in_record
from bench.measure.code import code_hashes
from bench.record import ReadOnlyFolder, RunFolder, Settings, check_writable
from bench.run.difficulty import difficulty_scores
from bench.schedule import BatchSchedule
from bench.training.communication import probe_tokens
from bench.training.execution import Execution
from bench.training.ranks import ALONE, Ranks
from bench.tune.budget import refuse_uneven_pieces, refuse_wrong_flags, refuse_wrong_sizes
from bench.tune.find import Request, Say, request_for
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.registry import coupler_identity


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
