"""Everything before the first number of a run: user errors are refused, data are loaded, the run gets its id.

Nothing is written here. The identity of a run is everything that can change one of its numbers; the run_id is
its hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.config import DEFAULT_MAX_STEPS, BatchSchedule, MeasureConfig, RunConfig, TrainingConfig, plain
from bench.data.corpus import Corpus, say_unknown_words
from bench.data.loader import BlockLoader
from bench.files import check_writable, without_places
from bench.measure.experts import TOKENS, Experts
from bench.record import OF_CLASSES, ReadOnlyFolder, RecordedConfig, RunFolder
from bench.training.environment import code_hashes
from bench.training.evaluation import probe_tokens
from bench.training.loaders import (
    asked_by_name,
    corpus_arguments,
    load_text,
    make_loaders,
    order_of,
    scorer_identity,
    validate_first_batches,
)
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Execution, to_device
from bench.tune.find import Checked, Say, checked, request_for
from bench.tune.trials import Request
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.registry import coupler_identity
from gnnmoe.discovery import is_file
from gnnmoe.hypergraph.strategies import place_of


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

    def experts(self, micro_batch_size: int | None) -> Experts:
        """Return what measures the experts, on the first validation tokens, in such micro-batches."""
        windows = self.loaders["val"].dataset_obj
        rows = min(-(-TOKENS // self.model_config.max_seq_length), len(windows))
        batch = to_device(windows.__getitems__(list(range(rows))), self.device)
        return Experts(batch, micro_batch_size or self.config.training.batch_size)

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
        if config.places.checkpoint_dir is not None:
            check_writable(config.places.checkpoint_dir, "--checkpoint-dir")
    else:
        config = replace(config, places=replace(config.places, quiet=True, plots=False, track=None))
    execution = Execution.of(config, ranks)
    found = checked(config, execution.device, ranks)
    config, model_config, corpus, loaders = found
    say_unknown_words(corpus.splits)
    known_by = identified(found, execution.device, ranks.world_size)
    name = run_id(known_by.identity)
    folder = (RunFolder if ranks.first else ReadOnlyFolder)(
        config.places.results_dir, config.places.study, name
    )
    return Prepared(
        config, model_config, execution, corpus, loaders, folder, name, known_by.identity,
        known_by.configuration, known_by.code, {"prepare": time.perf_counter() - start}, ranks,
    )  # fmt: skip


# --- identity -------------------------------------------------------------------------------------

FORMER_SPEED_PASS = {"speed_warmup_steps": 3, "speed_steps": 10}
"""As what the default speed pass counts: it was this one when the first records were made."""
DEFAULT_SPEED_PASS = {name: getattr(MeasureConfig(), name) for name in FORMER_SPEED_PASS}
SCHEMA = "1"
"""The version of the identity. A change of it changes every run_id."""


class Identified(NamedTuple):
    """A config with its identity."""

    identity: dict[str, Any]
    model: GNNMoEConfig
    corpus: Corpus
    configuration: str
    """The id that all its seeds share: ``configuration_id``."""
    code: dict[str, str]
    """The hashes of today's code: ``bench.training.environment.code_hashes``."""


def config_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config by groups, ready for JSON, with paths as given."""
    return plain(dataclasses.asdict(config))


def settings_in_record(config: RunConfig) -> RecordedConfig:
    """Return the config for a record: folders and files of code by their names, without their places."""
    groups = config_dict(config)
    for name in ("data_dir", "results_dir", "checkpoint_dir", "resume_checkpoint"):
        path = getattr(config.places, name)
        groups["places"][name] = None if path is None else path.name
    model = groups["model"]
    for name in (*OF_CLASSES, "static_hyperedge_strategy"):
        place = model[name] if name in OF_CLASSES else place_of(model[name]) or ""
        if is_file(place):
            model[name] = Path(place.rpartition(":")[0]).name + model[name][len(place.rpartition(":")[0]) :]
    return RecordedConfig(**without_places(groups))


def identity(
    config: RunConfig,
    model: dict[str, Any],
    data_sha256: str,
    device_type: str,
    world_size: int = 1,
    curriculum: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that can change a number of a run, by name; ``config`` is ``settled``.

    ``model`` holds the fields that the model reads, ``curriculum`` the order of the blocks. The group
    ``places`` (names, folders, verbosity) is left out. The data count by their content.
    """
    groups = config_dict(config)
    training, measure = groups["training"], groups["measure"]
    if training["epochs"] is None and training["max_steps"] is None:
        training["max_steps"] = DEFAULT_MAX_STEPS
    for name in ("allow_failed_check", "audit", "diagnostics", "marginal", "profile", "speed"):
        del measure[name]  # they change no number
    measure |= FORMER_SPEED_PASS if measure == DEFAULT_SPEED_PASS else {}
    for name in ("min_steps_per_epoch", "strict_curriculum"):
        del training[name]  # they only refuse
    for name in [name for name in training if name.startswith("curriculum")]:
        del training[name]  # it counts by its order
    training["curriculum"] = curriculum
    training["batch_schedule"] = _schedule(config.training)
    data = {name: groups["data"][name] for name in ("num_train_samples", "num_eval_samples", "evaluate_test")}
    return {
        "model": model, "training": training, "measure": measure, "data": {**data, "sha256": data_sha256},
        "device_type": device_type, "world_size": world_size, "schema": SCHEMA,
        **_memory(config), **_execution(config, device_type),
    }  # fmt: skip


def _memory(config: RunConfig) -> dict[str, Any]:
    """Return what decides how batches are split; an empty dict if they are not split.

    The split changes the rounding. A run that searches for its micro-batch counts by the flags of the search,
    because its identity must be known before the answer. The record has the answer.
    """
    memory, training = config.memory, config.training
    shaped = memory.fit_shape or memory.control_memory
    if memory.tune_batch_size or shaped:
        asked = {name: value for name, value in dataclasses.asdict(memory).items()
                 if (name != "micro_batch_size" or memory.control_memory)
                 and (shaped or not name.startswith(("shape_", "fit_", "control_")))}  # fmt: skip
        return {"memory": {**asked, "tune_init": memory.tune_init or training.batch_size}}
    whole = memory.micro_batch_size == training.batch_size and _schedule(training) is None
    if memory.micro_batch_size is None or whole:
        return {}
    return {"memory": {"micro_batch_size": memory.micro_batch_size}}


def _execution(config: RunConfig, device_type: str) -> dict[str, Any]:
    found = config.execution.identity(device_type)
    return {"execution": found} if found else {}


def _schedule(training: TrainingConfig) -> str | None:
    """Return the batch schedule in its normal form; None if every size is ``batch_size``."""
    if training.batch_schedule is None:
        return None
    schedule = BatchSchedule.parse(training.batch_schedule).simplified(training.epochs)
    return None if schedule.sizes == ((0, training.batch_size),) else str(schedule)


def run_id(identity: dict[str, Any]) -> str:
    """Return the run_id: 12 hex digits of the hash of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def configuration_id(identity: dict[str, Any], scorer: str | None = None) -> str:
    """Return 12 hex digits that all seeds of one configuration share: the run_id without the seed.

    The order of a curriculum depends on the seed, so the curriculum counts by its ``scorer`` (see
    ``scorer_identity``).
    """
    training = {name: value for name, value in identity["training"].items() if name != "seed"}
    if training["curriculum"] is not None:
        blocks = training["curriculum"]["blocks_by_epoch"]
        training["curriculum"] = {"blocks_by_epoch": blocks, "scorer": scorer}
    return run_id({**identity, "training": training})


class Identifier:
    """Gives the identity of many configs, checked as ``prepare`` does, and loads each text once.

    ``device`` is the device of runs on other machines; this machine need not have it. None: each config's own
    device. ``world_size`` processes share each batch.
    """

    def __init__(self, device: torch.device | None = None, world_size: int = 1) -> None:
        self._device, self._world_size = device, world_size
        self._corpora: dict[str, Corpus] = {}

    def __call__(self, config: RunConfig) -> Identified:
        """Return the identity of a config.

        Raises:
            Refused: as ``checked``, and for what the device cannot do.
        """
        here = None if self._device is not None else Execution.of(config).device
        ranks = Ranks(world_size=self._world_size, local_world_size=self._world_size)
        device = self._device or here or torch.device("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each run gives its own notes
            found = checked(config, here, ranks, self._text)
        return identified(found, device, self._world_size)

    def _text(self, config: RunConfig) -> Corpus:
        key = repr((corpus_arguments(config), asked_by_name(config)))
        if key not in self._corpora:
            self._corpora[key] = load_text(config)
        return self._corpora[key]


def identified(found: Checked, device: torch.device, world_size: int = 1) -> Identified:
    """Return the identity of a config that is ``checked``."""
    config, model, corpus, loaders = found
    order, fields = order_of(loaders["train"]), coupler_identity(model)
    if model.vocab_size != corpus.vocabulary.size:  # else it follows from the data
        fields["vocab_size"] = model.vocab_size
    known = identity(config, fields, corpus.sha256, device.type, world_size, curriculum=order)
    shared = configuration_id(known, scorer_identity(config.training))
    return Identified(known, model, corpus, shared, code_hashes(model))
