"""The fit of a run's length and micro-batch: from its flags to the shape; in a child process on CUDA."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import gcd
from typing import TYPE_CHECKING, Any

import torch

from bench.config import RunConfig, TrainingConfig, check_positive
from bench.data.validation import validate_first_batch
from bench.measure.activation import require_batch_applied
from bench.measure.budget import MemoryBudget, device_memory_bytes
from bench.measure.environment import device_name
from bench.measure.predict import CannotPredict, predict_peak
from bench.measure.preserve import preserved
from bench.measure.trials import Trials, TrialSetup, fits_all_ranks
from bench.training.batch_size import NoFeasibleBatch, Trial, memory_limit
from bench.training.fit import Fit, fit
from bench.training.micro_batches import divisors
from bench.training.shape import Shape, ladder, lengths_between
from bench.tuning import OF_THE_OPTIMIZER, batch_sizes, refuse_small_budget, refuse_wrong_memory
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel

if TYPE_CHECKING:
    from bench.prepare import Prepared

Say = Callable[[str], object]


@dataclass(frozen=True)
class FitRequest:
    """A fit to be done; plain data, so that it can go to another process."""

    setup: TrialSetup
    budget_bytes: int
    shapes: tuple[Shape, ...]
    max_trials: int
    max_seconds: float


def refuse_wrong_sizes(config: RunConfig, model: GNNMoEConfig, device: torch.device) -> None:
    """Refuse what cannot be done about batch, length and memory, before anything is.

    Raises:
        ValueError: saying what was wrong and what would do.
    """
    refuse_wrong_memory(config, model, device)
    memory, full = config.memory, config.model.max_seq_length
    check_positive(memory, "shape_min_length", "shape_max_length", "shape_length_step")
    if not (memory.fit_shape or memory.control_memory):
        if memory.shape_min_length is not None or memory.shape_max_length is not None:
            raise ValueError("shape_min_length and shape_max_length do nothing without --fit-shape or "
                             "--control-memory: add one, or drop them.")  # fmt: skip
        return
    if memory.fit_shape and (memory.tune_batch_size or memory.micro_batch_size is not None):
        raise ValueError("fit_shape finds the micro-batch: drop tune_batch_size and micro_batch_size, or it.")
    if memory.fit_shape and config.training.curriculum is not None:
        raise ValueError("a curriculum orders blocks of one length: drop --fit-shape or --curriculum.")
    if memory.shape_max_length is not None and not memory.fit_shape:
        raise ValueError("shape_max_length is for --fit-shape: in training no sequence is longer than "
                         "max_seq_length; drop it.")  # fmt: skip
    shortest, longest = bounds(config)
    if not 1 <= shortest <= full <= longest:
        raise ValueError(
            f"shape_min_length {shortest}, max_seq_length {full} and shape_max_length {longest} must rise."
        )
    refuse_small_budget(memory, model, device)


def bounds(config: RunConfig) -> tuple[int, int]:
    """Return the shortest and the longest length of a run that may change it."""
    memory, full = config.memory, config.model.max_seq_length
    shortest = max(1, full // 4) if memory.shape_min_length is None else memory.shape_min_length
    return shortest, full if memory.shape_max_length is None else memory.shape_max_length


def request_for(prepared: Prepared, say: Say) -> FitRequest:
    """Return the fit of a prepared run: all lengths that leave enough updates, all micro-batches.

    Raises:
        ValueError: no length would do.
    """
    memory, training = prepared.config.memory, prepared.config.training
    sizes, world = batch_sizes(training), prepared.loaders["train"].sampler_obj.shard.world_size
    wanted = lengths_between(*bounds(prepared.config), memory.shape_length_step)
    lengths = [length for length in wanted if _enough_data(prepared, length, max(sizes))]
    if not lengths:
        raise ValueError(f"the data are too few for {training.min_steps_per_epoch} updates at any length.")
    if lengths[-1] < wanted[-1]:
        say(f"  no length above {lengths[-1]}: the data would give too few updates an epoch")
    budget = MemoryBudget.parse(memory.memory_budget or "device").resolve(prepared.device)
    setup = TrialSetup(
        model=prepared.model_config,
        training=replace(TrainingConfig(), **{name: getattr(training, name) for name in OF_THE_OPTIMIZER}),
        batch_size=max(sizes) // world, limit_bytes=memory_limit(budget, memory.memory_target),
        device=str(prepared.device),
    )  # fmt: skip
    most = memory.tune_max_batch_size or max(sizes)
    rows = [part for part in divisors(gcd(*sizes) // world) if part <= most]
    shapes = ladder(lengths, rows)
    return FitRequest(setup, budget, tuple(shapes), memory.tune_max_trials, memory.tune_max_seconds)


def fit_here(request: FitRequest, on_trial: Callable[[Shape, Trial], object] | None = None) -> Fit:
    """Fit in this process; ``on_trial`` is told of each trial.

    Raises:
        NoFeasibleBatch: nothing fits.
        ParametersNotApplied: a larger batch takes no more memory.
    """
    setup, of_length = request.setup, {}

    def trials(shape: Shape) -> Trials:
        if shape.length not in of_length:
            model = replace(setup.model, max_seq_length=shape.length)
            of_length[shape.length] = Trials(replace(setup, model=model))
        return of_length[shape.length]

    @cache
    def predict(shape: Shape) -> int | None:
        there = trials(shape)
        try:
            return predict_peak(
                there.setup.model, shape.rows * there.pieces(shape.rows), shape.length, setup.training,
                micro_batch_size=shape.rows, device=torch.device(setup.device),
            )  # fmt: skip
        except CannotPredict:
            return None

    def run(shape: Shape) -> Trial:
        trial = trials(shape)(shape.rows)
        if on_trial is not None:
            on_trial(shape, trial)
        return trial

    found = fit(
        predict, run, request.shapes, limit_bytes=setup.limit_bytes,
        max_trials=request.max_trials, max_seconds=request.max_seconds,
    )  # fmt: skip
    _require_applied(trials(request.shapes[0]).setup)
    return found


def fit_in_child(request: FitRequest) -> Fit:
    """Fit in a process of its own, whose allocator gets no more than the budget; raises as ``fit_here``."""
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    with ProcessPoolExecutor(1, context, _limit_memory, (request.setup.device, request.budget_bytes)) as pool:
        return pool.submit(fit_here, request).result()


def find_shape(
    prepared: Prepared, earlier: dict[str, Any] | None, say: Say
) -> tuple[dict[str, Any], NoFeasibleBatch | None]:
    """Return the record of a run's fit and, where nothing fits, why; ``earlier`` is one that was done.

    Raises:
        ParametersNotApplied: a larger batch takes no more memory.
    """
    if earlier is not None:
        return earlier, None
    try:
        return _find_shape(prepared, say), None
    except NoFeasibleBatch as error:
        if prepared.config.memory.tune_fallback:
            say(f"WARNING: nothing fits, so what is configured is used: {error}")
        return {
            "status": "failed", "method": "fit_shape", "micro_batch_size": None,
            "length": prepared.model_config.max_seq_length, "error": f"{type(error).__name__}: {error}",
            "trials": [asdict(trial) for trial in error.trials],
        }, error  # fmt: skip


def _find_shape(prepared: Prepared, say: Say) -> dict[str, Any]:
    start, request = time.perf_counter(), request_for(prepared, say)

    def shown(shape: Shape, trial: Trial) -> None:
        say(f"  {shape} at once: {trial.failure or 'fits'}")

    if prepared.device.type == "cuda":
        found = fit_in_child(request)
        for tried in found.tries:
            shown(tried.shape, tried.trial)
    else:
        found = fit_here(request, shown)
    place = fits_all_ranks(1 + request.shapes.index(found.shape), prepared.device)  # the one collective
    assert place is not None, "a rank on which nothing fits has raised"
    agreed = request.shapes[place - 1]
    say(f"  {agreed} at once, {request.setup.batch_size} an update")
    return {
        "status": "ok", "method": "fit_shape", **found.to_record(), "from_cache": False,
        "length": agreed.length, "micro_batch_size": agreed.rows,
        "batch_size": request.setup.batch_size, "cap": request.shapes[-1].rows,
        "longest": request.shapes[-1].length, "shortest": request.shapes[0].length,
        "budget_bytes": request.budget_bytes, "target": prepared.config.memory.memory_target,
        "device_name": device_name(prepared.device), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def at_length(prepared: Prepared, length: int) -> Prepared:
    """Return the run with another length throughout: model, training blocks and evaluation windows."""
    from bench.prepare import make_loaders

    if length == prepared.model_config.max_seq_length:
        return prepared
    config = replace(prepared.config, model=replace(prepared.config.model, max_seq_length=length))
    loaders = make_loaders(config, prepared.corpus, prepared.device)
    for loader in loaders.values():
        validate_first_batch(loader)
    model_config = replace(prepared.model_config, max_seq_length=length)
    return replace(prepared, config=config, model_config=model_config, loaders=loaders)


def _enough_data(prepared: Prepared, length: int, batch_size: int) -> bool:
    splits = prepared.corpus.splits
    blocks = splits["train"].num_tokens // length
    blocks = min(blocks, prepared.config.data.num_train_samples or blocks)
    evaluated = [splits["validation"]] + [splits["test"]] * prepared.config.data.evaluate_test
    enough = blocks // batch_size >= prepared.config.training.min_steps_per_epoch
    return enough and all(split.num_tokens >= length for split in evaluated)


def _require_applied(setup: TrialSetup) -> None:
    device, length = torch.device(setup.device), setup.model.max_seq_length
    with preserved():
        model = GNNMoEModel(setup.model, seed=0).to(device).train()
        require_batch_applied(model, length, device)


def _limit_memory(device: str, budget_bytes: int) -> None:
    warnings.simplefilter("ignore")  # the parent has said what there is to say of the coupler
    share = budget_bytes / device_memory_bytes(torch.device(device))
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), torch.device(device))
