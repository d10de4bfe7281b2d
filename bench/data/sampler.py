"""Which samples go into which batch: a pure function of (seed, epoch), alone or on each of many ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import Sampler

from bench.config import BatchSchedule
from bench.data.blocks import require_at_least
from bench.data.curriculum import Curriculum
from gnnmoe.seeds import stream_seed


class SetOnce:
    """Refuses to set a public attribute a second time: what a loader serves is what it was made for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) and not name.startswith("_"):
            raise AttributeError(
                f"{name} of a {type(self).__name__} cannot be changed: set_epoch(loader, epoch) moves it "
                "to another epoch; for all else, make a new one with create_loader."
            )
        super().__setattr__(name, value)


@dataclass(frozen=True)
class Shard:
    """This process among those that share the samples."""

    rank: int = 0
    world_size: int = 1


ALONE = Shard()


@dataclass(frozen=True)
class Extent:
    """How much of a loader will be served: what ends first, None where it sets no end."""

    epochs: int | None = None
    max_steps: int | None = None
    max_batches_per_epoch: int | None = None


ENDLESS = Extent()


def resolve_shard(distributed: bool, rank: int | None, world_size: int | None) -> Shard:
    """Return the shard that the arguments name, else that of ``torch.distributed`` where asked for.

    Raises:
        ValueError: one argument without the other, a rank outside the world, or no process group.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size go together; got rank {rank} and world_size {world_size}")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1; got rank {rank} of {world_size}")
        return Shard(rank, world_size)
    if not distributed:
        return ALONE
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "distributed loading needs to know its rank: call torch.distributed.init_process_group first, "
            "or pass rank and world_size"
        )
    return Shard(torch.distributed.get_rank(), torch.distributed.get_world_size())


def size_of(schedule: BatchSchedule, epoch: int) -> int:
    """Return the number of samples in a batch of ``epoch``."""
    return next(size for first, size in reversed(schedule.sizes) if first <= epoch)


class EpochBatchSampler(SetOnce, Sampler[list[int]]):
    """Batches of sample numbers; with ``shuffle``, in the order that (seed, epoch) determine.

    Training: every rank knows the same order over all samples and takes every ``world_size``-th, so
    batch k of all ranks together holds the samples k·B·world to (k + 1)·B·world of that order, at
    any world size; ranks are equally long, and ``remainder`` counts what none of them serves.
    ``contiguous`` (evaluation): a rank takes one stretch, and nothing is left out or repeated.

    ``start``: the samples of the epoch, over all ranks, that were served before. Only ``move_to``
    changes the epoch, and with it the start and the schedule's batch size.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        epoch: int,
        shard: Shard = ALONE,
        contiguous: bool = False,
        curriculum: Curriculum | None = None,
        schedule: BatchSchedule | None = None,
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.seed, self.epoch = seed, epoch
        self.shard, self.contiguous = shard, contiguous
        self.curriculum, self.schedule = curriculum, schedule
        self.start = 0

    def __len__(self) -> int:
        return self._batches(self.samples_in(self.epoch) - self.start, self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        samples, size = self.served().tolist(), self.batch_size
        for first in range(0, len(samples), size):
            yield samples[first : first + size]

    def order(self) -> np.ndarray:
        """Return the sample numbers of this epoch over all ranks, in order, (samples,) int64."""
        size = self.samples_in(self.epoch)
        order = np.arange(size)
        if self.shuffle:
            generator = np.random.default_rng(stream_seed(self.seed, f"data.order.{self.epoch}"))
            order = generator.permutation(size)
        return order if self.curriculum is None else self.curriculum.subset(self.epoch)[order]

    def served(self) -> np.ndarray:
        """Return the sample numbers that this rank's batches hold, in order, (samples,) int64."""
        share = self._share()
        return share[: self._kept(len(share), self.batch_size)]

    def move_to(self, epoch: int, start: int = 0) -> None:
        """Take the order, the curriculum's samples and the schedule's batch size of ``epoch``.

        Raises:
            ValueError: a negative epoch, or a ``start`` outside 0..samples of the epoch.
        """
        require_at_least("epoch", epoch, 0)
        if not 0 <= start <= self.samples_in(epoch):
            raise ValueError(
                f"start must lie in 0..{self.samples_in(epoch)}, the samples of epoch {epoch}; got {start}"
            )
        vars(self).update(epoch=epoch, start=start, batch_size=self.size_in(epoch))

    def samples_in(self, epoch: int) -> int:
        """Return the samples of a whole epoch, over all ranks."""
        return self.num_samples if self.curriculum is None else self.curriculum.size(epoch)

    def size_in(self, epoch: int) -> int:
        """Return the samples a batch of this rank in ``epoch``."""
        return self.batch_size if self.schedule is None else size_of(self.schedule, epoch)

    def share_in(self, epoch: int) -> int:
        """Return the samples of a whole epoch that fall to this rank, an unused rest included."""
        return self._share_size(self.samples_in(epoch), self.shard.rank)

    def batches_in(self, epoch: int) -> int:
        """Return this rank's batches in a whole epoch."""
        return self._batches(self.samples_in(epoch), self.size_in(epoch))

    def smallest_epoch(self, extent: Extent = ENDLESS) -> int:
        """Return the epoch with the fewest batches within ``extent``, the first of these.

        It is one at which the schedule begins or changes: a curriculum never serves fewer samples
        than in the epoch before.
        """
        return min(self._changes_within(extent), key=self.batches_in)

    def _changes_within(self, extent: Extent) -> Iterator[int]:
        steps = 0
        changes = [0] if self.schedule is None else [epoch for epoch, _ in self.schedule.sizes]
        for change, following in zip_longest(changes, changes[1:]):
            yield change
            if following is None or following >= (extent.epochs or math.inf):
                return
            if extent.max_steps is not None:
                steps += self._steps_between(change, following, extent)
                if steps >= extent.max_steps:
                    return

    def _steps_between(self, first: int, end: int, extent: Extent) -> int:
        """Return the batches of the epochs from ``first`` on and before ``end``; one size holds in them."""
        grown = 0 if self.curriculum is None else self.curriculum.epochs - 1  # from here on all are alike
        growing = range(first, max(first, min(end, grown)))
        most = extent.max_batches_per_epoch or sys.maxsize
        alike = (end - growing.stop) * min(self.batches_in(growing.stop), most)
        return alike + sum(min(self.batches_in(epoch), most) for epoch in growing)

    @property
    def remainder(self) -> int:
        """Samples of this epoch that no rank serves; below world size × batch size."""
        samples = self.samples_in(self.epoch) - self.start
        shares = (self._share_size(samples, rank) for rank in range(self.shard.world_size))
        return samples - sum(self._kept(share, self.batch_size) for share in shares)

    def _share(self) -> np.ndarray:
        order, rank = self.order()[self.start :], self.shard.rank
        if not self.contiguous:
            return order[rank :: self.shard.world_size][: self._share_size(len(order), rank)]
        ends = np.cumsum([0] + [self._share_size(len(order), number) for number in range(rank + 1)])
        return order[ends[-2] : ends[-1]]

    def _share_size(self, samples: int, rank: int) -> int:
        even, rest = divmod(samples, self.shard.world_size)
        return even + (self.contiguous and rank < rest)

    def _kept(self, share: int, batch_size: int) -> int:
        return share - share % batch_size if self.drop_last else share

    def _batches(self, samples: int, batch_size: int) -> int:
        share = self._share_size(samples, self.shard.rank)
        return -(-self._kept(share, batch_size) // batch_size)
