"""What a record holds. Units are in the names; a quantity that was not measured is null with a reason."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.config import DEFAULT_MAX_STEPS, RunConfig, TrainingConfig, plain
from bench.measure.quantity import not_measured
from bench.schedule import BatchSchedule
from gnnmoe.config import GNNMoEConfig

SCHEMA_VERSION = "1.0"  # the part before the point counts for a run's identity: numbers changed meaning
STATUSES = ("ok", "oom", "diverged", "timeout", "crashed", "gate_failed", "interrupted")
KEYS = (
    "schema_version", "run_id", "configuration", "study", "run_name", "status", "error", "command", "config",
    "seed", "environment", "data", "time", "parameters", "flops", "requested", "tuned", "used", "quality",
    "speed", "memory", "gate", "communication",
)  # fmt: skip

Record = dict[str, Any]


class Identified(NamedTuple):
    """What makes a config the run that it is."""

    identity: dict[str, Any]
    model: GNNMoEConfig
    corpus: Any
    configuration: str
    """What all its seeds share: ``configuration_id``."""
    code: dict[str, str]
    """The hashes of the code that would run: ``bench.measure.code.code_hashes``."""


def new_record(**known: Any) -> Record:
    """Return a record with every key: what is ``known``, and "not reached" for the rest.

    Raises:
        KeyError: a name that is no key of a record.
    """
    unknown = set(known) - set(KEYS)
    if unknown:
        raise KeyError(f"no keys of a record: {sorted(unknown)}")
    record: Record = {key: not_measured("the run did not get this far") for key in KEYS}
    return {**record, "schema_version": SCHEMA_VERSION, "run_name": None, "error": None, **known}


def time_of(parts: Sequence[Record]) -> Record:
    """Return a record's ``time`` from the parts in which the run was run, one for each process.

    A part has its ``command``, ``start`` and ``end`` (UTC; end None: the part was killed, or still runs),
    ``seconds`` by phase and in total, and ``resumed_at_step`` (None: it started at the beginning). Of the
    run, ``seconds`` are the sums over the parts, ``start`` is the first part's, all else the last part's.
    """
    seconds: dict[str, float] = {}
    for part in parts:
        for phase, spent in part["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return {
        "start": parts[0]["start"], "end": parts[-1]["end"], "seconds": seconds,
        "resumed_at_step": parts[-1]["resumed_at_step"], "parts": list(parts),
    }  # fmt: skip


def config_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config by groups, ready for JSON; paths as they were given."""
    return plain(dataclasses.asdict(config))


def identity(
    config: RunConfig,
    model: dict[str, Any],
    data_sha256: str,
    device_type: str,
    world_size: int = 1,
    curriculum: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that can change one of a run's numbers, by name.

    ``model`` holds the fields that the model reads, ``curriculum`` the order that it gives. The group
    ``places`` (names, folders, verbosity) is left out; the data count by their content.
    """
    groups = config_dict(config)
    training, measure = groups["training"], groups["measure"]
    if training["epochs"] is None and training["max_steps"] is None:
        training["max_steps"] = DEFAULT_MAX_STEPS
    for name in ("allow_failed_gate", "audit", "marginal", "profile"):
        del measure[name]  # what to do about a verdict, and what to measure besides: they change nothing
    for name in ("min_steps_per_epoch", "strict_curriculum"):
        del training[name]  # they refuse, and change nothing
    for name in [name for name in training if name.startswith("curriculum")]:
        del training[name]  # it counts by the order it gives
    training["curriculum"] = curriculum
    training["batch_schedule"] = _schedule(config.training)
    data = {name: groups["data"][name] for name in ("num_train_samples", "num_eval_samples", "evaluate_test")}
    return {
        "model": model, "training": training, "measure": measure, "data": {**data, "sha256": data_sha256},
        "device_type": device_type, "world_size": world_size, "schema": SCHEMA_VERSION.split(".")[0],
        **_memory(config), **_execution(config, device_type),
    }  # fmt: skip


def _memory(config: RunConfig) -> dict[str, Any]:
    """Return what decides how batches are split, which moves the last digits; nothing where they are whole.

    A run that searches has its identity before the answer is known: it counts by what it asks of the
    search. The answer also depends on the device, and stands in the record.
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
    """Return the batch sizes by epoch in one spelling, None where they are all ``batch_size``."""
    if training.batch_schedule is None:
        return None
    schedule = BatchSchedule.parse(training.batch_schedule).simplified(training.epochs)
    return None if schedule.sizes == ((0, training.batch_size),) else str(schedule)


def run_id(identity: dict[str, Any]) -> str:
    """Return 12 hex digits that name a run by its identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def configuration_id(identity: dict[str, Any], scorer: str | None = None) -> str:
    """Return 12 hex digits that all seeds of one configuration share: the run_id without the seed.

    A curriculum orders other blocks at another seed, so it counts by its ``scorer`` (see
    ``bench.loaders.scorer_identity``) and not by the order it gives.
    """
    training = {name: value for name, value in identity["training"].items() if name != "seed"}
    if training["curriculum"] is not None:
        blocks = training["curriculum"]["blocks_by_epoch"]
        training["curriculum"] = {"blocks_by_epoch": blocks, "scorer": scorer}
    return run_id({**identity, "training": training})
