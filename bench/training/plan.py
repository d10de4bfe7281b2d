"""What a training will do, worked out before it begins: epochs, batches, samples, targets, steps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from bench.config import DEFAULT_MAX_STEPS, TrainingConfig
from bench.data.loader import BlockLoader


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch serves, to all ranks together."""

    epoch: int
    batch_size: int
    batches: int
    samples: int
    tokens: int
    cut: bool = False
    """Whether the training leaves some of the loader's batches out."""


class TrainingPlan:
    """The epochs of a training in order; a curriculum and a batch schedule make them differ."""

    def __init__(self, loader: BlockLoader, config: TrainingConfig) -> None:
        self._sampler, self._length = loader.sampler_obj, loader.dataset_obj.length
        self._most = config.max_batches_per_epoch
        steps = config.max_steps
        if steps is None and config.epochs is None:
            steps = DEFAULT_MAX_STEPS
        self._ends: list[int] = []  # steps done at the end of each epoch
        while (config.epochs is None or len(self._ends) < config.epochs) and (
            steps is None or not self._ends or self._ends[-1] < steps
        ):
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + self.batches_in(len(self._ends)))
        self.total_steps = self._ends[-1] if steps is None else min(steps, self._ends[-1])

    def batches_in(self, epoch: int) -> int:
        """Return the batches of a whole epoch."""
        batches = self._sampler.batches_in(epoch)
        return batches if self._most is None else min(batches, self._most)

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch in which step 0, 1, … falls, and how many of its batches come before it."""
        epoch = bisect_right(self._ends, step)
        return epoch, step - self._before(epoch)

    def epoch(self, number: int) -> EpochPlan:
        """Return the plan of an epoch; the last one ends with the training."""
        batches = min(self.batches_in(number), self.total_steps - self._before(number))
        size, world = self._sampler.size_in(number), self._sampler.shard.world_size
        samples = min(batches * size, self._sampler.share_in(number)) * world  # ranks have equal shares
        cut = batches < self._sampler.batches_in(number)
        return EpochPlan(number, size * world, batches, samples, samples * self._length, cut)

    def batch_sizes(self) -> list[int]:
        """Return the batch sizes of all epochs on this rank, each once, in order."""
        return list(dict.fromkeys(self._sampler.size_in(epoch) for epoch in range(len(self._ends))))

    def epochs(self) -> float:
        """Return how many epochs there are, the last perhaps in part."""
        epoch, before = self.place(self.total_steps - 1)
        return epoch + (before + 1) / self.batches_in(epoch)

    def _before(self, epoch: int) -> int:
        return self._ends[epoch - 1] if epoch else 0
