"""Which samples go into which batch: on one rank, on many, and with a batch size that changes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.config import BatchSchedule
from bench.data import loader as loader_module
from bench.data.blocks import IGNORED, EvalWindows
from bench.data.curriculum import Curriculum
from bench.data.loader import (
    EpochBatchSampler,
    Extent,
    Shard,
    create_loader,
    resolve_shard,
    set_epoch,
    size_of,
)

pytestmark = pytest.mark.core("loader")


def make_samplers(n: int, batch: int, world: int, **options) -> list[EpochBatchSampler]:
    chosen = {"shuffle": True, "drop_last": True, "seed": 3, "epoch": 2} | options
    return [EpochBatchSampler(n, batch, shard=Shard(rank, world), **chosen) for rank in range(world)]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 120), batch=st.integers(1, 20), world=st.integers(1, 5), drop=st.booleans())
def test_training_shards(n, batch, world, drop):
    """C4, A1: disjoint, equally long, together a permutation less the remainder, which is reported."""
    samplers = make_samplers(n, batch, world, drop_last=drop)
    batches = [list(sampler) for sampler in samplers]
    served = [[number for numbers in found for number in numbers] for found in batches]
    together = [number for numbers in served for number in numbers]
    assert len({len(numbers) for numbers in served}) == 1
    assert len(set(together)) == len(together) == n - samplers[0].remainder
    assert set(together) <= set(range(n))
    assert samplers[0].remainder == (n % (world * batch) if drop else n % world)
    share = n // world
    for sampler, found, numbers in zip(samplers, batches, served, strict=True):
        assert len(sampler) == len(found) == (share // batch if drop else math.ceil(share / batch))
        assert sampler.served().tolist() == numbers
        assert np.array_equal(sampler.order(), samplers[0].order())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), length=st.integers(1, 9), extra=st.integers(0, 60), batch=st.integers(1, 7))
def test_evaluation_shards(make_corpus, data, length, extra, batch):
    """C5: every token is scored once at any world size, batch and stride; the sum is the same."""
    corpus, stride = make_corpus(length + extra), data.draw(st.integers(1, length))
    world = data.draw(st.integers(1, 4))
    windows, nll = [], np.full(length + extra, np.nan)
    for rank in range(world):
        loader = create_loader(
            corpus, "val", batch, max_seq_length=length, stride=stride, rank=rank, world_size=world
        )
        blocks, numbers = loader.dataset_obj, loader.sampler_obj.served()
        assert isinstance(blocks, EvalWindows)
        scored = [item["targets"][item["targets"] != IGNORED].numpy() for item in loader]
        losses = np.concatenate([np.empty(0, dtype=np.int64), *scored]) ** 0.5
        assert np.isnan(nll[blocks.target_numbers(numbers)]).all()
        nll[blocks.target_numbers(numbers)] = losses
        windows += numbers.tolist()
        assert loader.sampler_obj.remainder == 0
    assert windows == list(range(len(windows)))
    assert np.array_equal(nll, np.arange(1, length + extra + 1) ** 0.5)  # the stream counts up


def test_an_evaluation_rank_may_have_nothing(make_corpus):
    """C5: two windows on three ranks; none is padded or repeated."""
    loaders = [
        create_loader(make_corpus(8), "test", 4, max_seq_length=4, rank=rank, world_size=3)
        for rank in range(3)
    ]
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders] == [1, 1, 0]


def test_rank_and_world_come_from_torch_distributed(make_corpus, monkeypatch):
    """C1, C4: distributed=True asks the process group; without one it says what to do."""
    with pytest.raises(ValueError, match="init_process_group first, or pass rank and world_size"):
        create_loader(make_corpus(40), "train", 2, max_seq_length=2, distributed=True)
    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2
    )
    monkeypatch.setattr(loader_module.torch, "distributed", group)
    loader = create_loader(make_corpus(40), "train", 2, max_seq_length=2, distributed=True)
    assert loader.sampler_obj.shard == Shard(1, 2)
    assert len(loader) == 5
    assert create_loader(make_corpus(40), "train", 2, max_seq_length=2).sampler_obj.shard == Shard(0, 1)


@pytest.mark.parametrize(
    ("rank", "world", "message"),
    [(2, 2, "rank must lie in 0..world_size - 1; got rank 2 of 2"), (0, None, "go together"),
     (-1, 2, "got rank -1 of 2")],
)  # fmt: skip
def test_wrong_ranks(rank, world, message):
    with pytest.raises(ValueError, match=message):
        resolve_shard(True, rank, world)


def test_progressive_batch_size(make_corpus):
    """C8: the sizes yielded are the schedule's; no sample is lost or repeated within an epoch."""
    loader = create_loader(
        make_corpus(60), "train", 4, max_seq_length=2, drop_last=False, batch_schedule="0:4, 2:8,3:30"
    )
    for epoch, size in enumerate([4, 4, 8, 30, 30]):
        set_epoch(loader, epoch)
        batches = [batch["input_ids"] for batch in loader]
        assert len(batches) == len(loader) == math.ceil(30 / size)
        assert {len(batch) for batch in batches[:-1]} <= {size}
        assert loader.sampler_obj.batch_size == size
        assert sorted(torch.cat(batches)[:, 0].tolist()) == list(range(0, 60, 2))
    set_epoch(loader, 0)
    assert len(next(iter(loader))["input_ids"]) == 4


@settings(max_examples=25, deadline=None)
@given(
    taken=st.integers(0, 7), before=st.integers(1, 6), after=st.integers(1, 9), epoch=st.integers(0, 2),
    drop=st.booleans(), curriculum=st.none() | st.just(Curriculum(np.arange(50.0), "linear", 2, start=0.9)),
)  # fmt: skip
def test_a_loader_goes_on_within_an_epoch(make_corpus, taken, before, after, epoch, drop, curriculum):
    """C11: the same rest in the same order, also at another batch size; later epochs are whole."""

    def make(batch: int, **options):
        chosen = {"max_seq_length": 2, "seed": 1, "epoch": epoch, "curriculum": curriculum} | options
        return create_loader(make_corpus(100), "train", batch, **chosen)

    def blocks_of(loader) -> list[int]:
        return [first // 2 for batch in loader for first in batch["input_ids"][:, 0].tolist()]

    whole = make(1)
    order, resumed = blocks_of(whole), make(after, start=taken * before, drop_last=drop)
    rest = order[taken * before :]
    assert blocks_of(resumed) == blocks_of(resumed) == rest[: len(rest) - len(rest) % after * drop]
    assert len(resumed) == len(list(resumed))
    set_epoch(whole, epoch + 1)
    set_epoch(resumed, epoch + 1)
    order = blocks_of(whole)
    assert blocks_of(resumed) == order[: len(order) - len(order) % after * drop]


def test_another_world_size_goes_on_too(make_corpus):
    """C11, C4: one rank consumed 12 of 50; two ranks share the other 38."""
    order = make_samplers(50, 4, 1, drop_last=False)[0].order()
    ranks = make_samplers(50, 3, 2)
    for sampler in ranks:
        sampler.move_to(2, start=12)
    first, second = (sampler.served() for sampler in ranks)
    assert np.stack([first, second], 1).ravel().tolist() == order[12:48].tolist()
    assert ranks[0].remainder == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'', which is no epoch:size"),
        ("0:16,x:32", "'x:32', which is no epoch:size"),
        ("16", "'16', which is no epoch:size; write .* such as \"0:16,2:32\""),
        ("1:16", "is '1:16'; write .* in rising order from epoch 0"),
        ("0:16,2:32,1:8", "is '0:16,2:32,1:8'; write"),
        ("0:16,0:8", "is '0:16,0:8'; write"),
        ("0:16,2:0", "is '0:16,2:0'; a size must be 1 or more"),
        ("0:-4", "'0:-4', which is no epoch:size"),
    ],
)
def test_wrong_schedules(text, message):
    with pytest.raises(ValueError, match=message):
        BatchSchedule.parse(text)


@pytest.mark.parametrize(
    ("text", "epochs", "simple"),
    [
        ("0:16,03:32", None, "0:16,3:32"),
        ("0:16,2:16,3:32,4:32,5:16", None, "0:16,3:32,5:16"),
        ("0:16,1:016", None, "0:16"),
        ("0:16,2:32", 2, "0:16"),
        ("0:16,2:32", 3, "0:16,2:32"),
    ],
)
def test_a_schedule_has_one_simple_form(text, epochs, simple):
    schedule = BatchSchedule.parse(text)
    assert str(schedule.simplified(epochs)) == simple
    last = 8 if epochs is None else epochs
    assert [size_of(schedule, e) for e in range(last)] == [
        size_of(BatchSchedule.parse(simple), e) for e in range(last)
    ]


@pytest.mark.parametrize(
    ("schedule", "extent", "epoch"),
    [
        ("0:4,100000000:8", Extent(), 100_000_000),
        ("0:9999,100000000:4", Extent(max_steps=12), 0),
        ("0:4,2:8", Extent(max_steps=50), 0),  # 25 batches an epoch
        ("0:4,2:8", Extent(max_steps=51), 2),
    ],
)
def test_the_smallest_epoch_is_one_that_is_reached(schedule, extent, epoch):
    """A6: at once, however far away the changes lie."""
    parsed = BatchSchedule.parse(schedule)
    (sampler,) = make_samplers(100, size_of(parsed, 0), 1, schedule=parsed)
    assert sampler.smallest_epoch(extent) == epoch


@settings(max_examples=60, deadline=None)
@given(
    changes=st.dictionaries(st.integers(1, 6), st.integers(1, 40)),
    first=st.integers(1, 40),
    curriculum=st.none() | st.integers(1, 5),
    epochs=st.none() | st.integers(1, 7),
    steps=st.none() | st.integers(1, 60),
    most=st.none() | st.integers(1, 5),
)
def test_the_smallest_epoch_by_going_through_all(changes, first, curriculum, epochs, steps, most):
    """A5, A6: with a curriculum, a schedule and every limit."""
    schedule = BatchSchedule(((0, first), *sorted(changes.items())))
    paced = None if curriculum is None else Curriculum(np.arange(50.0), "linear", curriculum, start=0.3)
    (sampler,) = make_samplers(50, first, 1, schedule=schedule, curriculum=paced, drop_last=False)
    reached, done = [], 0
    for epoch in range(12 if epochs is None else epochs):
        if steps is not None and done >= steps:
            break
        reached.append(epoch)
        done += min(sampler.batches_in(epoch), most or 10**9)
    fewest = min(map(sampler.batches_in, reached))
    found = sampler.smallest_epoch(Extent(epochs, steps, most))
    assert found in reached
    assert sampler.batches_in(found) == fewest


def test_ranks_share_the_batches_of_one(make_corpus):
    """C4: the k-th batches of two ranks together are the k-th of one rank at twice the size."""
    alone = list(make_samplers(50, 8, 1)[0])
    first, second = (list(sampler) for sampler in make_samplers(50, 4, 2))
    for whole, one, two in zip(alone, first, second, strict=True):
        assert set(whole) == {*one, *two}
