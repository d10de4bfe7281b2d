"""The batch-size search of a run: from its flags to the micro-batch; in a child process on CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import gcd
from typing import TYPE_CHECKING, Any

import torch

from bench.config import RunConfig, TrainingConfig
from bench.data.schedule import BatchSchedule
from bench.measure.budget import MemoryBudget
from bench.measure.environment import device_name
from bench.measure.search_cache import cached_search
from bench.measure.search_process import OnTrial, Request, SearchFailed, agreed, search_here, search_in_child
from bench.measure.trials import TrialSetup
from bench.record import Requested
from bench.training.batch_size import NoFeasibleBatch, SearchResult, Trial, largest_allowed, memory_limit
from bench.training.micro_batches import divisors
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel

if TYPE_CHECKING:
    from bench.prepare import Prepared

FAILURES = (NoFeasibleBatch, SearchFailed)
OF_THE_OPTIMIZER = ("learning_rate", "adam_betas", "weight_decay", "max_grad_norm")


def batch_sizes(training: TrainingConfig) -> list[int]:
    """Return the batch sizes of a training: one, or those of its schedule."""
    if training.batch_schedule is None:
        return [training.batch_size]
    return [
        size for _, size in BatchSchedule.parse(training.batch_schedule).simplified(training.epochs).sizes
    ]


def request_for(prepared: Prepared, *, any_size: bool = False, init: int | None = None) -> Request:
    """Return the search of a prepared run; ``init`` overrides its config's.

    For its training, micro-batches that divide its batch; with ``any_size``, all sizes that leave
    ``min_steps_per_epoch`` updates in the smallest epoch.

    Raises:
        Refused: no size would do.
    """
    memory, training = prepared.config.memory, prepared.config.training
    sampler, setup, budget = prepared.loaders["train"].sampler_obj, *trials_of(prepared)
    world, piece = sampler.shard.world_size, gcd(*batch_sizes(training)) // sampler.shard.world_size
    # A curriculum never serves fewer blocks than in its first epoch.
    cap = largest_allowed(
        memory.tune_max_batch_size, sampler.samples_in(0), training.min_steps_per_epoch, world
    )
    return Request(
        setup, budget, memory.tune_mode, init or memory.tune_init or piece, memory.tune_max_trials,
        memory.tune_max_seconds, cap if any_size else min(cap, piece),
        None if any_size else tuple(divisors(piece)),
    )  # fmt: skip


def trials_of(prepared: Prepared) -> tuple[TrialSetup, int]:
    """Return what all trials of a prepared run have in common, and its memory budget in bytes."""
    memory, training = prepared.config.memory, prepared.config.training
    ranks, device = prepared.ranks, prepared.device
    budget = MemoryBudget.parse(memory.memory_budget or "device").resolve(device, ranks.sharing(device))
    limit = memory_limit(budget, memory.memory_target)
    if not ranks.alone:  # a trial has none
        limit -= exchange_bytes(prepared.model_config)
    optimizer = {name: getattr(training, name) for name in OF_THE_OPTIMIZER}
    return TrialSetup(
        model=prepared.model_config, training=replace(TrainingConfig(), **optimizer),
        batch_size=max(batch_sizes(training)) // ranks.world_size,
        limit_bytes=limit, device=str(device),
        execution=prepared.config.execution,
    ), budget  # fmt: skip


def exchange_bytes(model: GNNMoEConfig) -> int:
    """Return the bytes in which a rank sums its gradients with the others': as many as they take."""
    with torch.device("meta"):
        return sum(p.numel() * p.element_size() for p in GNNMoEModel(model, seed=0).parameters())


def tune(
    prepared: Prepared,
    *,
    on_trial: OnTrial,
    say: Callable[[str], object],
    any_size: bool = False,
    init: int | None = None,
) -> dict[str, Any]:
    """Search, or take the answer of an earlier search, and agree with the other ranks; return the record.

    Raises:
        NoFeasibleBatch: nothing fits.
        SearchFailed: the search broke off, or nothing fits on another rank.
    """
    request, start = request_for(prepared, any_size=any_size, init=init), time.perf_counter()
    find = search_in_child if prepared.device.type == "cuda" else search_here
    result, failure, kept = None, None, False
    try:
        result, kept = cached_search(request, lambda: find(request, on_trial), say, keep=prepared.ranks.first)
    except FAILURES as error:
        failure = error
    size = agreed(result.size if result else None, failure, prepared.device)
    assert result is not None, "without one there is a failure"
    return {
        "status": "ok", "micro_batch_size": size, "from_cache": kept,
        "seconds": time.perf_counter() - start, **_about(request, prepared), **_found(result),
    }  # fmt: skip


def find_micro_batch(
    prepared: Prepared, earlier: dict[str, Any] | None, say: Callable[[str], object]
) -> tuple[dict[str, Any], Exception | None]:
    """Return the record of a run's search and, where it failed, why; ``earlier`` is one that was done."""

    def shown(trial: Trial) -> None:
        say(f"  {trial.size} at once: {trial.failure or 'fits'}")

    failure, found = None, earlier
    if found is None:
        try:
            found = tune(prepared, on_trial=shown, say=say)
        except FAILURES as error:
            found, failure = _failed(prepared, error), error
    if found["status"] == "ok":
        say(f"  micro-batch {found['micro_batch_size']} of a batch of {found['batch_size']}")
    elif prepared.config.memory.tune_fallback:
        say(f"WARNING: the search failed, so the configured batch is used: {found['error']}")
    return found, failure


def _failed(prepared: Prepared, error: Exception) -> dict[str, Any]:
    trials = [asdict(trial) for trial in error.trials] if isinstance(error, NoFeasibleBatch) else []
    return {
        "status": "failed", "micro_batch_size": None, "error": f"{type(error).__name__}: {error}",
        "trials": trials, **_about(request_for(prepared), prepared),
    }  # fmt: skip


def requested(config: RunConfig) -> Requested:
    """Return the sizes asked for; what a search may change stands beside it, in ``tuned`` and ``used``."""
    memory = config.memory
    asked = Requested(batch_size=config.training.batch_size, max_seq_length=config.model.max_seq_length,
                      micro_batch_size=memory.micro_batch_size)  # fmt: skip
    if memory.tune_batch_size or memory.fit_shape or memory.control_memory:
        asked.memory_budget, asked.memory_target = memory.memory_budget, memory.memory_target
    return asked


def micro_batch_size(config: RunConfig, tuned: dict[str, Any] | None) -> int | None:
    """Return the rows to run at once: those found, else those asked for; None: whole batches."""
    found = tuned["micro_batch_size"] if tuned else None
    return config.memory.micro_batch_size if found is None else found


def _found(result: SearchResult) -> dict[str, Any]:
    record = result.to_record()
    return {"largest": record.pop("size"), **record}


def _about(request: Request, prepared: Prepared) -> dict[str, Any]:
    return {
        "budget_bytes": request.budget_bytes, "target": prepared.config.memory.memory_target,
        "limit_bytes": request.setup.limit_bytes, "init_val": request.init_val,
        "batch_size": request.setup.batch_size, "length": request.setup.model.max_seq_length,
        "device_name": device_name(prepared.device),
    }  # fmt: skip
