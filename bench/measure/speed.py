"""Speed and memory, in a pass of their own on a copy of the model.

Nothing inside a timed step reads a number back, logs or evaluates.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from bench.config import MeasureConfig, TrainingConfig
from bench.measure.memory import measure_memory
from bench.training.step import Batch, make_optimizer, real_targets, to_device, training_step
from gnnmoe.model import GNNMoEModel


def measure_speed(
    model: GNNMoEModel,
    batches: Sequence[Batch],
    training: TrainingConfig,
    measure: MeasureConfig,
    device: torch.device,
    micro_batch_size: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time full training steps on a copy of ``model``; return the record's ``speed`` and ``memory``.

    The batches are used in turn, in micro-batches where a size is given. All step times are kept;
    tokens are the targets that count.
    """
    copied = copy.deepcopy(model).train()
    optimizer = make_optimizer(copied, training)
    on_device = [to_device(batch, device) for batch in batches]
    tokens = [real_targets(batch) for batch in batches]

    def step(number: int) -> None:
        batch = on_device[number % len(batches)]
        training_step(copied, batch, optimizer, training.max_grad_norm, micro_batch_size)

    for number in range(measure.speed_warmup_steps):
        step(number)
    numbers = [measure.speed_warmup_steps + k for k in range(measure.speed_steps)]
    seconds = _time_steps(step, numbers, device)
    speed = {
        "step_seconds": seconds,
        "step_tokens": [tokens[number % len(batches)] for number in numbers],
        "warmup_steps": measure.speed_warmup_steps,
        "steady": False,
        "remark": "not steady: a fixed, short warm-up",
    }
    memory = measure_memory(lambda: step(0), (copied, optimizer, on_device), device)
    return speed, memory


def _time_steps(step: Any, numbers: Sequence[int], device: torch.device) -> list[float]:
    """Return the seconds of each step: events on CUDA with one wait at the end, else a clock."""
    if device.type != "cuda":
        seconds = []
        for number in numbers:
            start = time.perf_counter()
            step(number)
            if device.type == "mps":
                torch.mps.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(numbers) + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for number, event in zip(numbers, events[1:], strict=True):
        step(number)
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1000.0 for before, after in pairwise(events)]
