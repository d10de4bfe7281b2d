"""What the coupler alone costs: the run's model and the same one with the mean coupler, timed in turn."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.config import MeasureConfig
from bench.measure.flops import training_flops_per_token
from bench.measure.protocol import time_in_turn
from bench.measure.speed import TrainingSteps, on_host, peak_memory, warmup_of, warmup_record
from bench.record import Marginal, Memory, NotMeasured, is_measured, not_measured
from bench.training.step import Execution

REFERENCE = "mean"


def marginal_cost(
    steps: TrainingSteps,
    memory: Memory,
    measure: MeasureConfig,
    execution: Execution,
    device: torch.device,
    seed: int,
) -> Marginal | NotMeasured:
    """Return the record's ``speed.marginal``: both models' step times by round, and what ours has more.

    ``memory`` is that of our steps; its peak less the reference's is ``peak_allocated_bytes``, and
    ``training_flops_per_token`` and ``parameters`` are differences too. Null where the run's own
    coupler is the reference, or one with another number of blocks, such as ``dense``. Ours is off the
    device while the memory of the reference is measured.
    """
    config = steps.model.config
    if config.coupler_type == REFERENCE:
        return not_measured(f"the coupler is {REFERENCE} itself")
    if steps.model.layers[0].coupler.expert_shape()[0] != config.num_experts:  # pyright: ignore
        return not_measured(f"{config.coupler_type} has other blocks, not a coupler more: compare the runs")
    model = execution.build(replace(config, coupler_type=REFERENCE, coupler_options={}), seed)
    execution.compile(model)
    theirs = TrainingSteps(model, steps.batches, steps.training, steps.micro_batch_size, steps.ranks)
    times = time_in_turn(
        {"ours": steps.step, REFERENCE: theirs.step},
        device=device, warmup=warmup_of(measure), rounds=measure.speed_steps, agree=steps.ranks.largest,
    )  # fmt: skip
    _, times = steps.ranks.worst(times, key=lambda times: sum(times["ours"].seconds))
    steps.forget()
    with on_host(steps.model, device):
        peak, reference_peak = memory.peak_allocated_bytes, peak_memory(theirs, device).peak_allocated_bytes
    more = not_measured("no meter of allocated bytes")
    if is_measured(peak) and is_measured(reference_peak):
        more = peak - reference_peak
    return Marginal(
        reference=REFERENCE,
        step_seconds=times["ours"].seconds,
        reference_step_seconds=times[REFERENCE].seconds,
        reference_warmup=warmup_record(times[REFERENCE]),
        steady=all(found.steady for found in times.values()),
        peak_allocated_bytes=more,
        training_flops_per_token=training_flops_per_token(steps.model) - training_flops_per_token(model),
        parameters=steps.model.parameter_counts()["total"] - model.parameter_counts()["total"],
    )
