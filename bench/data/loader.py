"""Batches in an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from bench.data.blocks import EvalWindows, TrainBlocks
from bench.data.corpus import Corpus
from gnnmoe.naming import unknown_name
from gnnmoe.seeds import stream_seed

_SPLIT_NAMES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class EpochBatchSampler(Sampler[list[int]]):
    """Batches of sample numbers; with ``shuffle``, in the order that (seed, epoch) determine."""

    def __init__(
        self, num_samples: int, batch_size: int, *, shuffle: bool, drop_last: bool, seed: int, epoch: int
    ) -> None:
        self.num_samples, self.batch_size = num_samples, batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order().tolist()
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def order(self) -> np.ndarray:
        """Return the sample numbers of this epoch in order, (num_samples,) int64."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        generator = np.random.default_rng(stream_seed(self.seed, f"data.order.{self.epoch}"))
        return generator.permutation(self.num_samples)


def create_loader(
    corpus: Corpus,
    split: str,
    batch_size: int,
    *,
    max_seq_length: int,
    seed: int = 0,
    epoch: int = 0,
    num_samples: int | None = None,
    stride: int | None = None,
    drop_last: bool | None = None,
    shuffle: bool | None = None,
    num_workers: int | Literal["auto"] = 0,
    pin_memory: bool | None = None,
) -> DataLoader[Any]:
    """Return batches ``{"input_ids": (B, L), "targets": (B, L)}`` int64 of a split.

    "train": ``TrainBlocks``, shuffled, full batches only; "val" or "test": ``EvalWindows``
    (``stride`` = the length by default), in stream order, whatever the seed and the epoch.
    ``num_samples``: a random subset of training blocks, nested and fixed by the seed; the first
    blocks of an evaluation. ``num_workers`` "auto" = min(4, cores // 2); ``pin_memory`` None = only
    where CUDA is available. Raises ValueError for a wrong argument and for zero batches.
    """
    if split not in _SPLIT_NAMES:
        raise ValueError(unknown_name("split", split, _SPLIT_NAMES))
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
    training = split == "train"
    blocks = _blocks(corpus, split, max_seq_length, seed, num_samples, stride)
    sampler = EpochBatchSampler(
        len(blocks),
        batch_size,
        shuffle=training if shuffle is None else shuffle,
        drop_last=training if drop_last is None else drop_last,
        seed=seed if training else 0,
        epoch=epoch if training else 0,
    )
    if not len(sampler):
        raise ValueError(
            f"batch_size {batch_size} with drop_last gives no batch: {split} has {len(blocks)} blocks "
            f"of {max_seq_length} tokens; use a batch of at most {len(blocks)}"
        )
    # Without a generator of its own, iter() would draw from torch's global one.
    generator = torch.Generator().manual_seed(stream_seed(seed, "data.workers"))
    return DataLoader(
        blocks,
        batch_sampler=sampler,
        collate_fn=_identity,  # the blocks hand out whole batches
        num_workers=min(4, (os.cpu_count() or 1) // 2) if num_workers == "auto" else num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=generator,
    )


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Give a training loader the order of ``epoch`` from its next iteration on; others stay as they are."""
    if isinstance(loader.dataset, TrainBlocks) and isinstance(loader.batch_sampler, EpochBatchSampler):
        loader.batch_sampler.epoch = epoch


def _blocks(
    corpus: Corpus, split: str, length: int, seed: int, num_samples: int | None, stride: int | None
) -> TrainBlocks | EvalWindows:
    text = corpus.splits[_SPLIT_NAMES[split]]
    if split != "train":
        return EvalWindows(text, length, length if stride is None else stride, num_samples)
    if stride is not None:
        raise ValueError("stride applies to evaluation; training blocks do not overlap")
    if num_samples is None:
        return TrainBlocks(text, length)
    return TrainBlocks.subset(text, length, num_samples, seed)


def _identity(batch: Any) -> Any:
    return batch
