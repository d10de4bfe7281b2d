"""What a training will take, before it runs: its peak memory by prediction, its time by a few steps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from bench.config import RunConfig
from bench.measure.predict import predict_peak
from bench.measure.protocol import Warmup, time_in_turn, time_steps
from bench.measure.rates import paired_ratios
from bench.measure.speed import TrainingSteps, random_batch
from bench.training.step import Execution
from gnnmoe.config import GNNMoEConfig

WARM_UP = Warmup.fixed(2)  # the first step makes the optimizer's state, the second finds the caches filled
STEPS, ROUNDS = 3, 9


@dataclass(frozen=True)
class Training:
    """A training that may be: its model, how and on what batches it is trained, and where."""

    model: GNNMoEConfig
    config: RunConfig
    device: torch.device

    @property
    def micro_batch_size(self) -> int:
        """Rows that are run at once, as far as the flags say."""
        return self.config.memory.micro_batch_size or self.config.training.batch_size

    def peak_bytes(self) -> int:
        """Return the predicted peak of allocated memory in a training step, in bytes.

        Raises:
            CannotPredict: the coupler's operations depend on the numbers in its tensors.
        """
        training, length = self.config.training, self.model.max_seq_length
        return predict_peak(
            self.model, training.batch_size, length, training,
            micro_batch_size=self.micro_batch_size, device=self.device, execution=self.config.execution,
        )  # fmt: skip

    def steps(self) -> TrainingSteps:
        """Return full training steps of a new model on a batch of any tokens."""
        execution, training = Execution(self.config.execution, self.device), self.config.training
        model = execution.build(self.model, training.seed)
        execution.compile(model)
        batch = random_batch(self.model, training.batch_size, self.device)
        return TrainingSteps(model, [batch], training, self.micro_batch_size)

    def step_seconds(self) -> float:
        """Return the median of a few training steps, run now."""
        return time_steps(self.steps().step, device=self.device, warmup=WARM_UP, steps=STEPS).median


def step_time_ratio(ours: Training, theirs: Training) -> float:
    """Return our step time over theirs: the median ratio of a few rounds, both run now, in turn."""
    times = time_in_turn(
        {"ours": ours.steps().step, "theirs": theirs.steps().step},
        device=ours.device, warmup=WARM_UP, rounds=ROUNDS,
    )  # fmt: skip
    return statistics.median(paired_ratios(times["ours"].seconds, times["theirs"].seconds))
