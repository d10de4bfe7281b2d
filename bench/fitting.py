"""The fit of a run's length and micro-batch: from its flags to the run at the length found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import gcd
from typing import TYPE_CHECKING, Any

from bench.loaders import make_loaders, validate_first_batches
from bench.measure.environment import device_name
from bench.measure.fit_process import FitRequest, fit_here, fit_in_child
from bench.measure.search_process import agreed
from bench.memory_checks import bounds
from bench.training.batch_size import NoFeasibleBatch
from bench.training.micro_batches import divisors
from bench.training.shape import ladder, lengths_between
from bench.tuning import FAILURES, batch_sizes, trials_of
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from bench.prepare import Prepared

Say = Callable[[str], object]


def request_for(prepared: Prepared, say: Say) -> FitRequest:
    """Return the fit of a prepared run: all lengths that leave enough updates, all micro-batches.

    Raises:
        Refused: no length would do.
    """
    memory, training = prepared.config.memory, prepared.config.training
    sizes, world = batch_sizes(training), prepared.loaders["train"].sampler_obj.shard.world_size
    wanted = lengths_between(*bounds(prepared.config), memory.shape_length_step)
    lengths = [length for length in wanted if _enough_data(prepared, length, max(sizes))]
    if not lengths:
        raise Refused(f"the data are too few for {training.min_steps_per_epoch} updates at any length.")
    if lengths[-1] < wanted[-1]:
        say(f"  no length above {lengths[-1]}: the data would give too few updates an epoch")
    setup, budget = trials_of(prepared)
    most = memory.tune_max_batch_size or max(sizes)
    rows = [part for part in divisors(gcd(*sizes) // world) if part <= most]
    shapes = ladder(lengths, rows)
    return FitRequest(setup, budget, tuple(shapes), memory.tune_max_trials, memory.tune_max_seconds)


def find_shape(
    prepared: Prepared, earlier: dict[str, Any] | None, say: Say
) -> tuple[dict[str, Any], Exception | None]:
    """Return the record of a run's fit and, where it failed, why; ``earlier`` is one that was done.

    Raises:
        ParametersNotApplied: a larger batch takes no more memory.
    """
    if earlier is not None:
        return earlier, None
    try:
        return _find_shape(prepared, say), None
    except FAILURES as error:
        if prepared.config.memory.tune_fallback:
            say(f"WARNING: the fit failed, so what is configured is used: {error}")
        trials = error.trials if isinstance(error, NoFeasibleBatch) else ()
        return {
            "status": "failed", "method": "fit_shape", "micro_batch_size": None,
            "length": prepared.model_config.max_seq_length, "error": f"{type(error).__name__}: {error}",
            "trials": [asdict(trial) for trial in trials],
        }, error  # fmt: skip


def _find_shape(prepared: Prepared, say: Say) -> dict[str, Any]:
    start, request = time.perf_counter(), request_for(prepared, say)
    found, failure = None, None
    try:
        find = fit_in_child if prepared.device.type == "cuda" else fit_here
        found = find(request, lambda t: say(f"  {t.shape} at once: {t.trial.failure or 'fits'}"))
    except FAILURES as error:
        failure = error
    place = agreed(1 + request.shapes.index(found.shape) if found else None, failure, prepared.device)
    assert found is not None, "without one there is a failure"
    shape = request.shapes[place - 1]
    say(f"  {shape} at once, {request.setup.batch_size} an update")
    return {
        "status": "ok", "method": "fit_shape", **found.to_record(), "from_cache": False,
        "length": shape.length, "micro_batch_size": shape.rows,
        "batch_size": request.setup.batch_size, "cap": request.shapes[-1].rows,
        "longest": request.shapes[-1].length, "shortest": request.shapes[0].length,
        "budget_bytes": request.budget_bytes, "target": prepared.config.memory.memory_target,
        "device_name": device_name(prepared.device), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def at_length(prepared: Prepared, length: int) -> Prepared:
    """Return the run with another length throughout: model, training blocks and evaluation windows."""
    if length == prepared.model_config.max_seq_length:
        return prepared
    config = replace(prepared.config, model=replace(prepared.config.model, max_seq_length=length))
    loaders = make_loaders(config, prepared.corpus, prepared.device, prepared.ranks)
    validate_first_batches(loaders)
    model_config = replace(prepared.model_config, max_seq_length=length)
    return replace(prepared, config=config, model_config=model_config, loaders=loaders)


def identity_at_length(prepared: Prepared) -> dict[str, Any]:
    """Return the run's identity with the length that its model has: what its weights are loaded by.

    For the checkpoint of a finished run only: --resume compares what was asked for, and so does the run_id.
    """
    model = {**prepared.identity["model"], "max_seq_length": prepared.model_config.max_seq_length}
    return {**prepared.identity, "model": model}


def _enough_data(prepared: Prepared, length: int, batch_size: int) -> bool:
    splits = prepared.corpus.splits
    blocks = splits["train"].num_tokens // length
    blocks = min(blocks, prepared.config.data.num_train_samples or blocks)
    evaluated = [splits["validation"]] + [splits["test"]] * prepared.config.data.evaluate_test
    enough = blocks // batch_size >= prepared.config.training.min_steps_per_epoch
    return enough and all(split.num_tokens >= length for split in evaluated)
