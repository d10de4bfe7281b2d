"""Batches of a split in an order that is a pure function of (seed, epoch)."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from bench.config import BatchSchedule
from bench.data.blocks import EvalWindows, TrainBlocks, require_at_least
from bench.data.corpus import Corpus, load_corpus
from bench.data.curriculum import Curriculum
from bench.data.sampler import ENDLESS, EpochBatchSampler, Extent, SetOnce, resolve_shard
from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name
from gnnmoe.seeds import stream_seed

_SPLIT_NAMES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class BlockLoader(SetOnce, DataLoader[Any]):
    """A plain torch loader of blocks that knows its corpus; only ``set_epoch`` changes it."""

    def __init__(
        self,
        corpus: Corpus,
        blocks: TrainBlocks | EvalWindows,
        sampler: EpochBatchSampler,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__(
            blocks,
            batch_sampler=sampler,
            collate_fn=_identity,  # the blocks hand out whole batches
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_ctrl_c if sampler.shard.world_size == 1 else _leave_group,
            pin_memory=pin_memory,
            # Without a generator of its own, iter() would draw from torch's global one.
            generator=torch.Generator().manual_seed(stream_seed(sampler.seed, "data.workers")),
        )
        self.corpus = corpus

    @property
    def dataset_obj(self) -> TrainBlocks | EvalWindows:
        """The blocks."""
        return self.dataset  # type: ignore[return-value]

    @property
    def sampler_obj(self) -> EpochBatchSampler:
        """Which samples go into which batch; its ``served()`` names them in order."""
        return self.batch_sampler  # type: ignore[return-value]


def create_loader(
    corpus: Corpus | Path | str,
    split: str,
    batch_size: int,
    *,
    max_seq_length: int = 128,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    num_samples: int | None = None,
    stride: int | None = None,
    drop_last: bool | None = None,
    shuffle: bool | None = None,
    num_workers: int | Literal["auto"] = 0,
    pin_memory: bool | None = None,
    distributed: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    curriculum: Curriculum | Callable[[TrainBlocks], Curriculum] | None = None,
    batch_schedule: BatchSchedule | str | None = None,
    min_batches: int = 1,
    extent: Extent = ENDLESS,
) -> BlockLoader:
    """Return batches ``{"input_ids": (B, L), "targets": (B, L)}`` int64 of a split of a corpus or folder.

    "train": ``TrainBlocks``, shuffled, full batches only, the same number on every rank; "val" or
    "test": ``EvalWindows`` (``stride`` = the length by default), in stream order, whatever the seed
    and the epoch, each on one rank. ``num_samples``: a random subset of training blocks, nested and
    fixed by the seed; the first blocks of an evaluation. ``start``: the samples of the training ``epoch``,
    over all ranks, that were served before; later epochs are whole. ``curriculum``: also a function of the
    blocks. ``min_batches``: the fewest that an epoch within ``extent`` may have. ``num_workers``
    "auto" = min(4, cores // 2); ``pin_memory`` None = only where CUDA is available, so give False
    where the batches stay on the CPU all the same. ``distributed``: rank and world size come from
    ``torch.distributed`` where not given. Raises Refused with the remedy.
    """
    training = _require_split(corpus, split) == "train"
    if isinstance(corpus, Path | str):
        corpus = load_corpus(data_dir=Path(corpus), source="folder")
    blocks = _blocks(corpus, split, max_seq_length, seed, num_samples, stride)
    if not training and not (curriculum is None and batch_schedule is None):
        raise ValueError(f"curriculum and batch_schedule apply to training; drop them for split {split!r}")
    sampler = EpochBatchSampler(
        len(blocks),
        require_at_least("batch_size", batch_size, 1),
        shuffle=training if shuffle is None else shuffle,
        drop_last=training if drop_last is None else drop_last,
        seed=seed if training else 0,
        epoch=0,
        shard=resolve_shard(distributed, rank, world_size),
        contiguous=not training,
        curriculum=_curriculum(curriculum, blocks),
        schedule=_schedule(batch_schedule, batch_size),
    )
    if training:
        sampler.move_to(epoch, start)
    elif start:
        raise ValueError("start applies to training; an evaluation begins anew")
    _refuse_too_few(sampler, blocks, split, min_batches, extent)
    if blocks.note:
        warnings.warn(blocks.note, stacklevel=2)
    pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
    return BlockLoader(corpus, blocks, sampler, _workers(num_workers), pin_memory)


def set_epoch(loader: BlockLoader, epoch: int, start: int = 0) -> None:
    """Give a training loader the order, curriculum and batch size of ``epoch`` from its next iteration on.

    ``start`` leaves out that many samples, over all ranks, from the beginning of the epoch. An
    evaluation stays as it is.

    Raises:
        ValueError: as ``EpochBatchSampler.move_to``.
    """
    if isinstance(loader.dataset, TrainBlocks):
        loader.sampler_obj.move_to(epoch, start)


def _require_split(corpus: Corpus | Path | str, split: str) -> str:
    if split in _SPLIT_NAMES:
        return _SPLIT_NAMES[split]
    message = unknown_name("split", split, _SPLIT_NAMES)
    if isinstance(corpus, Corpus):
        raise Refused(f"{message} The corpus {corpus.name} holds {', '.join(corpus.splits)}.")
    folder = Path(corpus)
    names = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    raise Refused(f"{message} The folder {folder} holds {', '.join(names) or 'nothing'}.")


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


def _curriculum(
    asked: Curriculum | Callable[[TrainBlocks], Curriculum] | None, blocks: TrainBlocks | EvalWindows
) -> Curriculum | None:
    if asked is None or isinstance(blocks, EvalWindows):
        return None
    made = asked if isinstance(asked, Curriculum) else asked(blocks)
    if len(made.scores) != len(blocks):
        raise ValueError(
            f"the curriculum has {len(made.scores):,} scores for {len(blocks):,} blocks; score exactly the "
            "blocks that are served (a function of the blocks may be passed as curriculum)"
        )
    return made


def _schedule(asked: BatchSchedule | str | None, batch_size: int) -> BatchSchedule | None:
    if asked is None:
        return None
    schedule = BatchSchedule.parse(asked) if isinstance(asked, str) else asked
    first = schedule.sizes[0][1]
    if first != batch_size:
        raise Refused(
            f"batch_size is {batch_size}, but the batch schedule {schedule} begins with {first}; "
            f"give batch_size {first}"
        )
    return schedule


def _workers(asked: int | str) -> int:
    if asked == "auto":
        return min(4, (os.cpu_count() or 1) // 2)
    if not isinstance(asked, int) or asked < 0:
        raise Refused(f"num_workers must be 0 or more, or 'auto'; got {asked!r}")
    return asked


def _refuse_too_few(
    sampler: EpochBatchSampler,
    blocks: TrainBlocks | EvalWindows,
    split: str,
    min_batches: int,
    extent: Extent,
) -> None:
    """Refuse batches so large that an epoch has hardly any, in the smallest epoch there will be.

    Raises:
        Refused: naming the epoch, its samples, and the largest batch that would do.
    """
    if sampler.contiguous and sampler.shard.world_size > 1:
        return  # a rank of a small evaluation may have nothing to do
    epoch = sampler.smallest_epoch(extent)
    batches = sampler.batches_in(epoch)
    if batches >= min_batches and batches:
        return
    size = sampler.size_in(epoch)
    samples, world = sampler.samples_in(epoch), sampler.shard.world_size
    least = max(1, min_batches)
    most = samples // (world * least)
    asked = f"batch_size {size}" if world == 1 else f"batch_size {size} a rank"
    asked += " with drop_last" * sampler.drop_last
    where = f"epoch {epoch}" if world == 1 else f"epoch {epoch} on each of {world} ranks"
    count = f"only {batches} batch{'es' * (batches > 1)}" if batches else "no batch"
    whole = f"{most}" if world == 1 else f"{most * world} over all ranks"
    remedy = f"use a batch of at most {whole}" if most else "use more data or shorter blocks"
    if least > 1:
        remedy = f"{least} are needed: {remedy}, or lower min_steps_per_epoch"
    raise Refused(
        f"{asked} gives {count} in {where}, which serves {samples} {split} blocks of "
        f"{blocks.length} tokens; {remedy}"
    )


def _ignore_ctrl_c(_: int) -> None:
    """Leave Ctrl-C to the parent: it reaches all processes, and the parent may still need the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave_group(worker: int) -> None:
    """Leave Ctrl-C to the parent, and torchrun's signals too, which go to the whole group of a rank."""
    _ignore_ctrl_c(worker)
    os.setpgid(0, 0)


def _identity(batch: Any) -> Any:
    return batch
