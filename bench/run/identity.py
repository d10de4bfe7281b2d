"""The identity of a run: everything that can change one of its numbers, and its hash, the run_id."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.config import DEFAULT_MAX_STEPS, BatchSchedule, RunConfig, TrainingConfig, plain
from bench.data.corpus import Corpus
from bench.files import without_places
from bench.record import RecordedConfig
from bench.training.code import code_hashes
from bench.training.loaders import (
    asked_by_name,
    corpus_arguments,
    load_text,
    make_loaders,
    model_for,
    order_of,
    refuse_curriculum_without_epochs,
    scorer_identity,
)
from bench.training.step import Execution
from bench.tune.find import refuse_uneven_pieces, refuse_wrong_flags
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.registry import coupler_identity, is_file

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
    """The hashes of today's code: ``bench.training.code.code_hashes``."""


def config_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config by groups, ready for JSON, with paths as given."""
    return plain(dataclasses.asdict(config))


def settings_in_record(config: RunConfig) -> RecordedConfig:
    """Return the config for a record: folders and a coupler's file by their names, without their places."""
    groups = config_dict(config)
    for name in ("data_dir", "results_dir", "checkpoint_dir", "resume_checkpoint"):
        path = getattr(config.places, name)
        groups["places"][name] = None if path is None else path.name
    if is_file(config.model.coupler_type):
        path, _, name = config.model.coupler_type.rpartition(":")
        groups["model"]["coupler_type"] = f"{Path(path).name}:{name}"
    return RecordedConfig(**without_places(groups))


def identity(
    config: RunConfig,
    model: dict[str, Any],
    data_sha256: str,
    device_type: str,
    world_size: int = 1,
    curriculum: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that can change a number of a run, by name.

    ``model`` holds the fields that the model reads, ``curriculum`` the order of the blocks. The group
    ``places`` (names, folders, verbosity) is left out. The data count by their content.
    """
    groups = config_dict(config)
    training, measure = groups["training"], groups["measure"]
    if training["epochs"] is None and training["max_steps"] is None:
        training["max_steps"] = DEFAULT_MAX_STEPS
    for name in ("allow_failed_check", "audit", "marginal", "profile"):
        del measure[name]  # they change no number
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
    """Gives the identity of many configs, as ``prepare`` does, and loads each text once.

    ``device`` is the device of runs on other machines; this machine need not have it. None: each config's own
    device. ``world_size`` processes share each batch.
    """

    def __init__(self, device: torch.device | None = None, world_size: int = 1) -> None:
        self._device, self._world_size = device, world_size
        self._corpora: dict[str, Corpus] = {}

    def __call__(self, config: RunConfig) -> Identified:
        """Return the identity of a config.

        Raises:
            Refused: as ``prepare``, for everything that can be seen without building the model.
        """
        refuse_wrong_flags(config.memory)
        refuse_curriculum_without_epochs(config.training)
        refuse_uneven_pieces(config.training.batch_sizes, 1, self._world_size)
        key = repr((corpus_arguments(config), asked_by_name(config)))
        if key not in self._corpora:
            self._corpora[key] = load_text(config)
        corpus, device = self._corpora[key], self._device or Execution.of(config).device
        model, order = model_for(config, corpus), None
        if config.training.curriculum is not None:
            here = device if self._device is None else torch.device("cpu")
            order = order_of(make_loaders(config, corpus, here)["train"])
        return identified(config, model, corpus, device, order, self._world_size)


def identified(
    config: RunConfig,
    model: GNNMoEConfig,
    corpus: Corpus,
    device: torch.device,
    order: dict[str, Any] | None,
    world_size: int = 1,
) -> Identified:
    """Return the identity of a config; ``order`` is the result of ``order_of``."""
    fields = coupler_identity(model)
    if model.vocab_size != corpus.vocabulary.size:  # else it follows from the data
        fields["vocab_size"] = model.vocab_size
    found = identity(config, fields, corpus.sha256, device.type, world_size, curriculum=order)
    shared = configuration_id(found, scorer_identity(config.training))
    return Identified(found, model, corpus, shared, code_hashes(model))
