"""What stands around the steps of a run whose shape was found or is controlled: built from its flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.measure.activation import require_batch_applied
from bench.measure.budget import MemoryBudget, training_state_bytes
from bench.measure.meters import meter_for
from bench.memory_checks import bounds
from bench.prepare import Prepared
from bench.training.batch_size import memory_limit
from bench.training.controlled import Peak, StepControl
from bench.training.controller import Controller, Decision
from bench.training.loop import Trainer
from bench.training.micro_batches import divisors
from bench.training.shape import Shape, ladder
from bench.training.step import Batch
from bench.tuning import micro_batch_size


def control_for(
    prepared: Prepared,
    trainer: Trainer,
    tuned: dict[str, Any] | None,
    announce: Callable[[Decision], object],
) -> StepControl | None:
    """Return the control of a run: it holds every step to the shape found, and changes it where asked.

    None where no shape was found and none is controlled.

    Raises:
        ParametersNotApplied: a larger batch takes no more memory.
    """
    shapes = shapes_of(prepared, trainer.recovering.unit, tuned)
    if shapes is None:
        return None
    memory, length = prepared.config.memory, prepared.model_config.max_seq_length
    rows, most = micro_batch_size(prepared.config, tuned), shapes[-1].rows
    if memory.control_memory:
        require_batch_applied(trainer.model, length, prepared.device)
    budget = MemoryBudget.parse(memory.memory_budget or "device").resolve(
        prepared.device, prepared.ranks.sharing(prepared.device)
    )
    controller = Controller(
        shapes, Shape(min(rows or most, most), length),
        limit_bytes=memory_limit(budget, memory.memory_target),
        fixed_bytes=_always_held(trainer), adapt=memory.control_memory,
    )  # fmt: skip
    return StepControl(controller, trainer.model, announce, _peak(trainer) if memory.control_memory else None)


def shapes_of(prepared: Prepared, unit: int, tuned: dict[str, Any] | None) -> list[Shape] | None:
    """Return the shapes between which the control of a run may move; None where it has no control.

    ``unit``: rows of which every batch of a rank is a multiple.
    """
    memory, length = prepared.config.memory, prepared.model_config.max_seq_length
    adapt = memory.control_memory
    if not adapt and (tuned is None or micro_batch_size(prepared.config, tuned) is None):
        return None
    pieces = divisors(unit)
    if memory.tune_max_batch_size is not None:
        pieces = [piece for piece in pieces if piece <= memory.tune_max_batch_size]
    lengths = [length]
    if adapt:
        lengths = [part for part in divisors(length) if part == length or part >= bounds(prepared.config)[0]]
    return ladder(lengths, pieces)


def _always_held(trainer: Trainer) -> int:
    """Return what a step holds from its beginning to its end: parameters, buffers, optimizer state."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return training_state_bytes(trainer.model) - sum(p.numel() * p.element_size() for p in trained)


def _peak(trainer: Trainer) -> Peak:
    meter = meter_for(trainer.device)

    def peak(step: Callable[[], object], batch: Batch) -> int:
        reading = meter.measure(step, (trainer.model, trainer.optimizer, [batch]))
        return trainer.ranks.largest(reading.judged_bytes)  # so that all ranks decide the same

    return peak
