"""A loader that is what it was when it was made, or says who changed it."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch.utils.data import DataLoader

from bench.data.blocks import EvalWindows, TrainBlocks, require_at_least
from bench.data.corpus import Corpus
from bench.data.sampler import EpochBatchSampler, caller
from gnnmoe.seeds import stream_seed

_SETTERS = {"batch_size": "set_batch_size", "epoch": "set_epoch"}


class LoaderChangedError(RuntimeError):
    """A loader is not what it was when it was made or last changed through a setter of this module."""


class BlockLoader(DataLoader[Any]):
    """A plain torch loader of blocks that knows its corpus, who made it and who changed it.

    ``changes`` lists, one a line, who made it and every later change through ``set_epoch``,
    ``set_batch_size`` and ``resume_loader``. Iteration begins with ``check_unchanged``.
    """

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
        self.changes: list[str] = []
        self.agree("made")

    @property
    def dataset_obj(self) -> TrainBlocks | EvalWindows:
        """The blocks."""
        return self.dataset  # type: ignore[return-value]

    @property
    def sampler_obj(self) -> EpochBatchSampler:
        """Which samples go into which batch; its ``served()`` names them in order."""
        return self.batch_sampler  # type: ignore[return-value]

    def __iter__(self) -> Any:
        check_unchanged(self)
        return super().__iter__()

    def agree(self, how: str) -> None:
        """Take the loader as it is now for what it should be; ``how`` and the caller are remembered."""
        state = self.state()
        if not self.changes or state != self._agreed:
            batches = f"{state['batches']} batches of {state['batch_size']}"
            self.changes.append(f"{how} by {caller()} ({batches}, epoch {state['epoch']})")
        self._agreed = state

    def differences(self) -> list[str]:
        """Return one sentence for each thing that nobody agreed on."""
        state = self.state()
        return [
            f"{name} was {self._agreed[name]} and is {value}, set by {self._setter_of(name)}"
            for name, value in state.items()
            if value != self._agreed[name]
        ]

    def state(self) -> dict[str, Any]:
        """Return what decides the batches."""
        sampler = self.batch_sampler
        names = ("batch_size", "drop_last", "epoch", "num_samples", "seed", "shard", "shuffle", "start")
        return {name: getattr(sampler, name, None) for name in names} | {
            "batches": len(self), "blocks": len(self.dataset_obj),
            "sampler": _which(sampler), "dataset": _which(self.dataset),
            "curriculum": _which(getattr(sampler, "curriculum", None)),
            "schedule": str(getattr(sampler, "schedule", None)),
        }  # fmt: skip

    def _setter_of(self, name: str) -> str:
        sampler, known = self.batch_sampler, None
        if isinstance(sampler, EpochBatchSampler) and name in vars(sampler):
            known = sampler.set_by(name)
        return f"{known or 'unknown'}, not through {_SETTERS.get(name, 'create_loader')}"


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Give a training loader the order, curriculum and batch size of ``epoch`` from its next iteration on.

    An evaluation stays as it is. Raises ``LoaderChangedError`` as ``check_unchanged`` does.
    """
    loader = check_unchanged(loader)
    if isinstance(loader.dataset, TrainBlocks):
        loader.sampler_obj.move_to(require_at_least("epoch", epoch, 0))
        loader.agree(f"set_epoch({epoch})")


def set_batch_size(loader: DataLoader[Any], batch_size: int) -> None:
    """Give a loader another batch size from the next batch on, with workers from the next one asked for.

    Raises ValueError where a schedule sets the sizes or no batch would be left, and
    ``LoaderChangedError`` as ``check_unchanged`` does.
    """
    loader = check_unchanged(loader)
    sampler, before = loader.sampler_obj, loader.sampler_obj.batch_size
    if sampler.schedule is not None:
        raise ValueError(
            f"the batch schedule {sampler.schedule} sets the batch size; make a loader without it"
        )
    sampler.batch_size = require_at_least("batch_size", batch_size, 1)
    if sampler.drop_last and not sampler.batches_in(sampler.epoch):
        sampler.batch_size = before
        raise ValueError(
            f"batch_size {batch_size} with drop_last gives no batch of "
            f"{sampler.samples_in(sampler.epoch):,} samples on {sampler.shard.world_size} ranks"
        )
    loader.agree(f"set_batch_size({batch_size})")


def check_unchanged(loader: DataLoader[Any]) -> BlockLoader:
    """Return the loader if it still is what was made and agreed on.

    Raises:
        LoaderChangedError: naming what changed, who changed it and who made it.
    """
    if not isinstance(loader, BlockLoader):
        raise LoaderChangedError(
            f"a {type(loader).__name__} stands where create_loader's was expected; something wrapped or "
            "replaced it, so that its batches cannot be vouched for; pass on what create_loader returned"
        )
    found = loader.differences()
    if found:
        raise LoaderChangedError(
            f"the loader was changed behind its back: {'; '.join(found)}. It was "
            f"{', then '.join(loader.changes[:1] + loader.changes[1:][-3:])}. Change it through "
            "set_batch_size(loader, size) or set_epoch(loader, epoch), or make a new one."
        )
    return loader


def _which(thing: object) -> str:
    return f"{type(thing).__name__} {id(thing):x}"


def _ignore_ctrl_c(_: int) -> None:
    """Leave Ctrl-C to the parent: it reaches all processes, and the parent may still need the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _leave_group(worker: int) -> None:
    """Leave Ctrl-C to the parent, and torchrun's signals too, which go to the whole group of a rank."""
    _ignore_ctrl_c(worker)
    os.setpgid(0, 0)


def _identity(batch: Any) -> Any:
    return batch
