"""Full training steps made to be measured, on a model of their own; and what a planned training will take."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.config import RunConfig, TrainingConfig
from bench.measure.memory import predict_peak
from bench.measure.rates import paired_ratios
from bench.measure.timing import time_in_turn, time_steps
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, Execution, make_optimizer, real_targets, training_step
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed

TRAINING = 3
"""FLOPs of forward and backward over those of the forward: each product has two in the backward."""
WARMUP_STEPS = 2  # the first step makes the optimizer's state, the second finds the caches filled
STEPS, ROUNDS = 3, 9


class TrainingSteps:
    """A model that trains in order to be measured, with an optimizer of its own, on batches in turn.

    On several ranks, ``batches`` are the parts of this rank.
    """

    def __init__(
        self,
        model: GNNMoEModel,
        batches: Sequence[Batch],
        training: TrainingConfig,
        micro_batch_size: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.batches, self.training = model.train(), list(batches), training
        self.ranks, self._parallel = ranks, ranks.parallel(model)
        self.optimizer = make_optimizer(model, training)
        self.micro_batch_size = micro_batch_size
        self._tokens = ranks.totals([real_targets(batch) for batch in batches])

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """Train on batch ``number`` (modulo), in micro-batches if a size is given; return loss and norm."""
        batch, norm = self.batches[number % len(self.batches)], self.training.max_grad_norm
        rows, ranks = self.micro_batch_size, self.ranks
        return training_step(self._parallel, batch, self.optimizer, norm, rows, None, ranks)

    def tokens(self, number: int) -> int:
        """Return how many targets count in batch ``number``, over all ranks."""
        return self._tokens[number % len(self._tokens)]

    def forget(self) -> None:
        """Drop the gradients and the optimizer's state, as before the first step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


def random_batch(
    model: GNNMoEConfig, rows: int, device: torch.device, generator: torch.Generator | None = None
) -> Batch:
    """Return a batch (rows, max_seq_length) of random tokens, which cost the same as real tokens."""
    generator = generator or torch.Generator().manual_seed(stream_seed(0, "tune"))
    shape = rows, model.max_seq_length + 1
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


@torch.no_grad()
def training_flops_per_token(model: GNNMoEModel) -> float:
    """Return the FLOPs of forward and backward for each token of one sequence of full length.

    They are three times those of a forward, which ``torch.utils.flop_counter`` counts on a copy on the CPU.
    The copy has plain logits and plain attention, since the counter does not know the chunked head and the
    fused attention. Recomputation in the backward does not count. Attention counts whole, as is usual,
    although half of it is masked.
    """
    copied = copy.deepcopy(model).cpu().eval()
    length = copied.config.max_seq_length
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copied(torch.zeros(1, length, dtype=torch.int64))
    return TRAINING * counter.get_total_flops() / length


@dataclass(frozen=True)
class Training:
    """A planned training: its model, how and with which batches it is trained, and on which device."""

    model: GNNMoEConfig
    config: RunConfig
    device: torch.device

    @property
    def micro_batch_size(self) -> int:
        """Rows that run at once, according to the flags."""
        return self.config.memory.micro_batch_size or self.config.training.batch_size

    def peak_bytes(self) -> int:
        """Return the predicted peak of allocated memory in a training step, in bytes.

        Raises:
            CannotPredict: the coupler's operations depend on the numbers in its tensors.
        """
        training = self.config.training
        return predict_peak(
            self.model,
            training.batch_size,
            self.model.max_seq_length,
            training,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
            execution=self.config.execution,
        )

    def steps(self) -> TrainingSteps:
        """Return full training steps of a new model on a batch of random tokens."""
        execution, training = Execution(self.config.execution, self.device), self.config.training
        model = execution.build(self.model, training.seed)
        execution.compile(model)
        batch = random_batch(self.model, training.batch_size, self.device)
        return TrainingSteps(model, [batch], training, self.micro_batch_size)

    def step_seconds(self) -> float:
        """Return the median of a few training steps, which run now."""
        return time_steps(self.steps().step, device=self.device, warmup=WARMUP_STEPS, steps=STEPS).median


def step_time_ratio(ours: Training, theirs: Training) -> float:
    """Return our step time over theirs: the median ratio of a few rounds, which run now, in turn."""
    steps = {"ours": ours.steps().step, "theirs": theirs.steps().step}
    times = time_in_turn(steps, device=ours.device, warmup=WARMUP_STEPS, rounds=ROUNDS)
    return statistics.median(paired_ratios(times["ours"].seconds, times["theirs"].seconds))
