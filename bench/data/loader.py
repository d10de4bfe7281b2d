"""Batches of a split, in an order that is a pure function of (seed, epoch), on one rank or on many.

Read in this order: ``create_loader`` (what a loader serves), ``EpochBatchSampler`` (which samples go into
which batch), ``validate_first_batch``.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from bench.config import BatchSchedule
from bench.data.blocks import EvalWindows, TrainBlocks, require_at_least
from bench.data.corpus import Corpus, load_corpus
from bench.data.curriculum import Curriculum
from gnnmoe.config import Refused, brief, unknown_name
from gnnmoe.head import IGNORED
from gnnmoe.seeds import stream_seed

_SPLIT_NAMES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_KEYS = ("input_ids", "targets")


@dataclass(frozen=True)
class Shard:
    """The place of this process among the processes that share the samples."""

    rank: int = 0
    world_size: int = 1


ALONE = Shard()


@dataclass(frozen=True)
class Extent:
    """How much of a loader will be served: the limit that is reached first counts, and None is no limit."""

    epochs: int | None = None
    max_steps: int | None = None
    max_batches_per_epoch: int | None = None


ENDLESS = Extent()


class SetOnce:
    """Refuses to set a public attribute a second time: a loader serves what it was created for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) and not name.startswith("_"):
            raise AttributeError(
                f"{name} of a {type(self).__name__} cannot be changed: set_epoch(loader, epoch) moves it "
                "to another epoch; for all else, make a new one with create_loader."
            )
        super().__setattr__(name, value)


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
            collate_fn=_identity,  # the blocks return whole batches
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_ctrl_c if sampler.shard.world_size == 1 else _leave_group,
            pin_memory=pin_memory,
            # Without its own generator, iter() would draw from torch's global generator.
            generator=torch.Generator().manual_seed(stream_seed(sampler.seed, "data.workers")),
        )
        self.corpus = corpus

    @property
    def dataset_obj(self) -> TrainBlocks | EvalWindows:
        """The blocks."""
        return self.dataset  # type: ignore[return-value]

    @property
    def sampler_obj(self) -> EpochBatchSampler:
        """The assignment of samples to batches; its ``served()`` returns the samples in order."""
        return self.batch_sampler  # type: ignore[return-value]


def _identity(batch: Any) -> Any:
    return batch


def _ignore_ctrl_c(_: int) -> None:
    """Leave Ctrl-C to the parent: the signal reaches all processes, and the parent may need the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave_group(worker: int) -> None:
    """Leave Ctrl-C to the parent, and torchrun's signals too: torchrun signals the whole group of a rank."""
    _ignore_ctrl_c(worker)
    os.setpgid(0, 0)


# --- making a loader ---------------------------------------------------------------------------------


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

    "train" serves ``TrainBlocks``: shuffled, full batches only, the same number on every rank. "val" and
    "test" serve ``EvalWindows``: in the order of the text, whatever the seed and the epoch, each window on
    one rank.

    Args:
        corpus: A corpus, or a folder with its text.
        split: "train", "val" or "test".
        batch_size: Samples in a batch of this rank.
        max_seq_length: Tokens in a sample.
        seed: Seed of the order and of the subset.
        epoch: The training epoch.
        start: Number of samples of ``epoch``, over all ranks, that were served before; later epochs are
            whole.
        num_samples: Training: a random subset of the blocks, nested and fixed by the seed. Evaluation: the
            first blocks.
        stride: Distance between evaluation windows; None: the length.
        drop_last: Whether to leave out an incomplete last batch; None: only in training.
        shuffle: Whether to shuffle; None: only in training.
        num_workers: Processes that load data; "auto": min(4, cores // 2).
        pin_memory: None: where CUDA is available. Give False if the batches stay on the CPU all the same.
        distributed: Take rank and world size from ``torch.distributed`` if they are not given.
        rank: Number of this process.
        world_size: Number of processes.
        curriculum: Order of difficulty, or a function from the blocks to it.
        batch_schedule: Batch size by epoch.
        min_batches: The smallest number of batches that an epoch within ``extent`` may have.
        extent: How much of the loader will be served.

    Raises:
        Refused: naming the remedy.
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

    ``start`` leaves out that many samples, over all ranks, from the beginning of the epoch. An evaluation
    loader does not change.

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
        raise Refused(f"num_workers must be 0 or more, or 'auto'; got {brief(asked)}")
    return asked


def resolve_shard(distributed: bool, rank: int | None, world_size: int | None) -> Shard:
    """Return the shard of the arguments, or of ``torch.distributed`` if ``distributed`` asks for it.

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


def _refuse_too_few(
    sampler: EpochBatchSampler,
    blocks: TrainBlocks | EvalWindows,
    split: str,
    min_batches: int,
    extent: Extent,
) -> None:
    """Refuse a batch size that leaves too few batches in the smallest epoch within ``extent``.

    Raises:
        Refused: naming the epoch, its samples, and the largest batch that is allowed.
    """
    if sampler.contiguous and sampler.shard.world_size > 1:
        return  # a rank of a small evaluation may have nothing to do
    epoch = sampler.smallest_epoch(extent)
    batches = sampler.batches_in(epoch)
    if batches >= min_batches and batches:
        return
    size, samples, world = sampler.size_in(epoch), sampler.samples_in(epoch), sampler.shard.world_size
    least = max(1, min_batches)
    most = samples // (world * least)
    asked = f"batch_size {size}" if world == 1 else f"batch_size {size} per rank"
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


# --- which samples go into which batch ---------------------------------------------------------------


def size_of(schedule: BatchSchedule, epoch: int) -> int:
    """Return the number of samples in a batch of ``epoch``."""
    return next(size for first, size in reversed(schedule.sizes) if first <= epoch)


class EpochBatchSampler(SetOnce, Sampler[list[int]]):
    """Batches of sample numbers; with ``shuffle``, in the order that (seed, epoch) determine.

    In training every rank knows the same order of all samples, and takes every ``world_size``-th sample. So
    batch k of all ranks together holds the samples k·B·world to (k + 1)·B·world of that order, for any world
    size. All ranks are equally long, and ``remainder`` counts the samples that no rank serves. With
    ``contiguous`` (evaluation) a rank takes one stretch, and no sample is left out or repeated.

    ``start`` counts the samples of the epoch, over all ranks, that were served before. Only ``move_to``
    changes the epoch, and with it the start and the batch size of the schedule.
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
        """Return the sample numbers of this rank's batches, in order, (samples,) int64."""
        share = self._share()
        return share[: self._kept(len(share), self.batch_size)]

    def move_to(self, epoch: int, start: int = 0) -> None:
        """Take the order, the curriculum's samples and the schedule's batch size of ``epoch``.

        Raises:
            Refused: a negative epoch.
            ValueError: ``start`` lies outside 0..samples of the epoch.
        """
        require_at_least("epoch", epoch, 0)
        if not 0 <= start <= self.samples_in(epoch):
            raise ValueError(
                f"start must lie in 0..{self.samples_in(epoch)}, the samples of epoch {epoch}; got {start}"
            )
        vars(self).update(epoch=epoch, start=start, batch_size=self.size_in(epoch))

    def samples_in(self, epoch: int) -> int:
        """Return the number of samples of a whole epoch, over all ranks."""
        return self.num_samples if self.curriculum is None else self.curriculum.size(epoch)

    def size_in(self, epoch: int) -> int:
        """Return the number of samples in a batch of this rank in ``epoch``."""
        return self.batch_size if self.schedule is None else size_of(self.schedule, epoch)

    def share_in(self, epoch: int) -> int:
        """Return the number of samples of a whole epoch that this rank gets, with an unused rest."""
        return self._share_size(self.samples_in(epoch), self.shard.rank)

    def batches_in(self, epoch: int) -> int:
        """Return the number of this rank's batches in a whole epoch."""
        return self._batches(self.samples_in(epoch), self.size_in(epoch))

    def smallest_epoch(self, extent: Extent = ENDLESS) -> int:
        """Return the first of the epochs with the fewest batches within ``extent``.

        At this epoch the schedule begins or changes: a curriculum never serves fewer samples than in the
        epoch before.
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
        """Return the batches of the epochs from ``first`` to before ``end``, which share one batch size."""
        grown = 0 if self.curriculum is None else self.curriculum.epochs - 1  # later epochs are all alike
        growing = range(first, max(first, min(end, grown)))
        most = extent.max_batches_per_epoch or sys.maxsize
        alike = (end - growing.stop) * min(self.batches_in(growing.stop), most)
        return alike + sum(min(self.batches_in(epoch), most) for epoch in growing)

    @property
    def remainder(self) -> int:
        """Number of samples of this epoch that no rank serves, below world size × batch size."""
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


# --- a check of the first batch, before a model trains on it -----------------------------------------


class BatchValidationError(Refused, AssertionError):
    """The first batch does not fit the model; ``check`` names the failed check."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"the first batch fails the check {check!r}: {detail}")
        self.check = check


def validate_first_batch(loader: BlockLoader, vocabulary_sha256: str | None = None) -> bool:
    """Return True if the loader's next batch is sound.

    The checks: keys, dtype, shapes, ids in range, targets that are the next inputs, the hash of the
    vocabulary against ``vocabulary_sha256`` (of a checkpoint, for example), and finite curriculum scores. The
    batch is made beside the loader: no random number is drawn, and the loader's position does not change.

    Raises:
        BatchValidationError: naming the first failed check, also under ``python -O``.
    """
    corpus = loader.corpus
    if vocabulary_sha256 not in (None, corpus.vocabulary.sha256):
        detail = f"{corpus.name} has another one than was expected; use the same data set and tokenizer"
        raise BatchValidationError("vocabulary", detail)
    curriculum = loader.sampler_obj.curriculum
    if curriculum is not None and not np.isfinite(curriculum.scores).all():
        raise BatchValidationError(
            "scores", "curriculum scores are not all finite; make the curriculum again"
        )
    numbers = next(iter(loader.sampler_obj), [])
    if not numbers:
        raise BatchValidationError("shape", "there is no batch in this epoch; use a smaller batch")
    batch = loader.dataset_obj.__getitems__(numbers)
    _check_form(batch, (len(numbers), loader.dataset_obj.length))
    _check_ids(batch, corpus.vocabulary.size)
    _check_shift(batch["input_ids"], batch["targets"])
    return True


def _check_form(batch: dict[str, Tensor], shape: tuple[int, int]) -> None:
    if set(batch) != set(_KEYS):
        detail = f"{', '.join(sorted(batch)) or 'none'}; {' and '.join(_KEYS)} are expected"
        raise BatchValidationError("keys", detail)
    for name in _KEYS:
        tensor = batch[name]
        if tensor.dtype != torch.int64:
            raise BatchValidationError("dtype", f"{name} is {tensor.dtype}, torch.int64 is expected")
        if tuple(tensor.shape) != shape:
            detail = f"{name} is {tuple(tensor.shape)}, {shape} (batch, length) is expected"
            raise BatchValidationError("shape", detail)


def _check_ids(batch: dict[str, Tensor], vocabulary: int) -> None:
    for name in _KEYS:
        ids = batch[name][batch[name] != IGNORED] if name == "targets" else batch[name]
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if len(outside):
            detail = (
                f"{len(outside)} of the {name} lie outside 0..{vocabulary - 1}, first {int(outside[0])}; "
                "the ids belong to another vocabulary"
            )
            raise BatchValidationError("range", detail)


def _check_shift(inputs: Tensor, targets: Tensor) -> None:
    scored = targets != IGNORED
    if not scored.any(dim=1).all():
        raise BatchValidationError("shift", "a sample has no target to score")
    # Past the last target of a text the inputs are padding, so both neighbours must be scored.
    both = scored[:, :-1] & scored[:, 1:]
    wrong = int((targets[:, :-1] != inputs[:, 1:])[both].sum())
    if wrong:
        detail = (
            f"{wrong} of {int(both.sum())} targets are not the next input; targets are the inputs one later: "
            "targets[:, :-1] == input_ids[:, 1:]"
        )
        raise BatchValidationError("shift", detail)
