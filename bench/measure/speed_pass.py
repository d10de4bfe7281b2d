"""The speed pass of a run: time, memory, and where asked for a profile and the coupler's own cost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from bench.config import RunConfig
from bench.device import Attempted, at_once, attempt
from bench.measure.flops import training_flops_per_token
from bench.measure.marginal import marginal_cost
from bench.measure.profile import TRACE, profile_steps, steps_of_a_profile
from bench.measure.protocol import matrix_rate
from bench.measure.rates import over_the_rate, utilisation
from bench.measure.speed import TrainingSteps, fetched, measure_speed, on_host, peak_memory
from bench.record import Marginal, Memory, NotMeasured, Speed, is_measured, not_measured
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, Execution
from gnnmoe.model import GNNMoEModel

T = TypeVar("T")


@dataclass(frozen=True)
class SpeedPass:
    """What is measured at the end of a run, on a copy of its model and batches of its data."""

    config: RunConfig
    device: torch.device
    folder: Path
    """The run's, where a profile goes."""
    say: Callable[[str], object]
    """Prints a line."""
    ranks: Ranks = ALONE
    """The processes that take each step together."""

    @property
    def execution(self) -> Execution:
        """How the run computes its models."""
        return Execution(self.config.execution, self.device)

    def run(
        self,
        model: GNNMoEModel,
        loader: Iterable[Batch],
        as_run: Callable[[Batch], Batch],
        micro_batch_size: int | None,
    ) -> tuple[Speed | NotMeasured, Memory | NotMeasured]:
        """Return the record's ``speed`` and ``memory``; a run is no worse where memory runs out here.

        The model itself waits on the host, so that the copy has the device as a training has it.
        """
        batches, seconds = fetched(loader, self.config.measure.speed_steps, as_run, self.device)
        with on_host(model, self.device):
            return self._all(model, batches, seconds, micro_batch_size)

    def _all(
        self, model: GNNMoEModel, batches: list[Batch], fetch_seconds: list[float], rows: int | None
    ) -> tuple[Speed | NotMeasured, Memory | NotMeasured]:
        measure = self.config.measure
        outcome = self._attempt(lambda: self._measure(model, batches, rows))
        if outcome.value is None:
            self.say("note: the speed pass ran out of memory; speed and memory are not measured")
            nothing = not_measured(f"the speed pass ran out of memory: {outcome.failure}")
            return nothing, nothing
        steps, speed, memory = outcome.value
        speed.fetch_seconds = fetch_seconds
        if measure.marginal:
            speed.marginal = self._marginal(steps, memory)
        if measure.profile:  # last: what traces kernels may slow down all that follows
            self._profile(steps)
        return speed, memory

    def _attempt(self, function: Callable[[], T]) -> Attempted[T]:
        return attempt(function) if self.ranks.alone else at_once(function)

    def _measure(
        self, model: GNNMoEModel, batches: list[Batch], rows: int | None
    ) -> tuple[TrainingSteps, Speed, Memory]:
        copied = copy.deepcopy(model).to(self.device)
        self.execution.compile(copied)
        steps = TrainingSteps(copied, batches, self.config.training, rows, self.ranks)
        speed = measure_speed(steps, self.config.measure, self.device)
        memory = self._memory(steps)
        steps.forget()
        speed.matrix_flops_per_second, speed.compile_seconds = self._matrix_rate(), self._compiling(speed)
        self._remark_on_utilisation(speed, copied)
        return steps, speed, memory

    def _memory(self, steps: TrainingSteps) -> Memory:
        """Return the record's ``memory``; of a compiled step, what a meter can see of it."""
        memory, execution = peak_memory(steps, self.device), self.config.execution
        if not execution.compile:
            return memory
        if self.device.type != "cuda":
            memory.remark = "of the step as it is uncompiled, since only that has tensors to track"
            return memory
        if execution.compile_mode != "reduce-overhead":
            return memory
        unseen = not_measured("CUDA graphs keep their tensors in a pool that counts as reserved only")
        if is_measured(memory.by_phase):
            memory.by_phase |= {"first_step": unseen, "steady": unseen}
        memory.peak_allocated_bytes = memory.by_part = unseen
        return memory

    def _matrix_rate(self) -> float | NotMeasured:
        if self.device.type != "cuda":
            return not_measured("a run measures it on CUDA only; python -m bench.speed does everywhere")
        rate = matrix_rate(self.device, self.execution.autocast_dtype or torch.float32)
        return sum(self.ranks.gather(rate))

    def _remark_on_utilisation(self, speed: Speed, model: GNNMoEModel) -> None:
        rate = speed.matrix_flops_per_second
        if not is_measured(rate):
            return
        remark = over_the_rate(utilisation(speed.tokens_per_second * training_flops_per_token(model), rate))
        if remark:
            self.say(f"note: {remark}")

    def _compiling(self, speed: Speed) -> float | NotMeasured:
        """Return what the warm-up took beyond as many median steps: compiling, where it was asked for."""
        if not self.config.execution.compile:
            return not_measured("not compiled")
        median = speed.median_step_seconds
        return sum(max(0.0, seconds - median) for seconds in speed.warmup_seconds or ())

    def _profile(self, steps: TrainingSteps) -> None:
        if not self.ranks.first:
            for number in range(steps_of_a_profile(self.device)):
                steps.step(number)
            return
        outcome = self._attempt(lambda: profile_steps(steps.step, self.folder, self.device))
        if outcome.value is None:
            self.say("note: the profile ran out of memory")
            return
        self.say(f"costliest operations of a step (all of them in {TRACE} beside the record):")
        for found in outcome.value:
            self.say(f"  {found.share:6.1%}  {found.calls:5,} ×  {found.name}")

    def _marginal(self, steps: TrainingSteps, memory: Memory) -> Marginal | NotMeasured:
        config = self.config
        seed, measure = config.training.seed, config.measure
        outcome = self._attempt(
            lambda: marginal_cost(steps, memory, measure, self.execution, self.device, seed)
        )
        return outcome.value or not_measured(f"ran out of memory beside the mean coupler: {outcome.failure}")
