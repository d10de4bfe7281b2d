from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.data.blocks import EvalWindows, TrainBlocks
from bench.data.loader import create_loader, set_epoch

pytestmark = pytest.mark.core("loader")


def _first_ids(loader) -> list[int]:
    """The first input of every sample, in order; it names the sample in the synthetic corpus."""
    return [first for batch in loader for first in batch["input_ids"][:, 0].tolist()]


def _numpy_state() -> str:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return f"{state['state']['key'].tolist()} {state['state']['pos']}"


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [32, 32, 32, 4]), (True, [32, 32, 32])])
def test_hundred_samples(make_corpus, drop_last, sizes):
    """A1: 100 samples, batch 32."""
    loader = create_loader(make_corpus(200), "train", 32, max_seq_length=2, drop_last=drop_last)
    assert [len(batch["input_ids"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 90),
    batch=st.integers(1, 40),
    drop=st.booleans(),
    split=st.sampled_from(["train", "val"]),
)
def test_length_is_what_is_yielded(make_corpus, n, batch, drop, split):
    """A1, A6: len(loader) == len(list(loader)), and never zero batches."""
    expected = n // batch if drop else -(-n // batch)
    if expected == 0:
        with pytest.raises(ValueError, match=f"batch_size {batch} with drop_last gives no batch.*{n} blocks"):
            create_loader(make_corpus(3 * n), split, batch, max_seq_length=3, drop_last=drop)
        return
    loader = create_loader(make_corpus(3 * n), split, batch, max_seq_length=3, drop_last=drop)
    assert len(loader) == len(list(loader)) == expected


def test_workers_yield_the_same_batches(make_corpus):
    """A1, C6: workers 0 and 2."""
    alone, helped = (
        create_loader(make_corpus(60), "train", 4, max_seq_length=3, num_workers=workers)
        for workers in (0, 2)
    )
    assert len(helped) == 5
    assert _first_ids(alone) == _first_ids(helped)
    set_epoch(alone, 1)
    set_epoch(helped, 1)
    assert _first_ids(alone) == _first_ids(helped)


def test_defaults(make_corpus):
    """C1, C2: shuffle and drop_last only for train; no pinning and no warning on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = create_loader(make_corpus(70), "train", 4, max_seq_length=3)
        validation = create_loader(make_corpus(70), "val", 4, max_seq_length=3)
        assert sorted(_first_ids(train)) != _first_ids(train)
        assert _first_ids(validation) == list(range(0, 70, 3))
    assert (len(train), len(validation)) == (5, 6)
    assert isinstance(train.dataset, TrainBlocks)
    assert isinstance(validation.dataset, EvalWindows)
    assert train.pin_memory is torch.cuda.is_available()
    assert train.num_workers == 0


def test_one_epoch_serves_each_block_once(make_corpus):
    loader = create_loader(make_corpus(100), "train", 3, max_seq_length=2, drop_last=False)
    assert sorted(_first_ids(loader)) == list(range(0, 100, 2))


def test_order_is_a_function_of_seed_and_epoch(make_corpus):
    """C6: the same (seed, epoch) gives the same order; set_epoch changes it in place."""
    corpus = make_corpus(80)
    loader = create_loader(corpus, "train", 4, max_seq_length=2, seed=5)
    zero = _first_ids(loader)
    assert _first_ids(loader) == zero
    set_epoch(loader, 3)
    three = _first_ids(loader)
    assert three != zero
    assert _first_ids(create_loader(corpus, "train", 4, max_seq_length=2, seed=5, epoch=3)) == three
    assert _first_ids(create_loader(corpus, "train", 8, max_seq_length=2, seed=5, epoch=3)) == three
    assert _first_ids(create_loader(corpus, "train", 4, max_seq_length=2, seed=6, epoch=3)) != three


def test_the_order_of_today_stays(make_corpus):
    """A golden value: records of one seed stay comparable over versions."""
    loader = create_loader(make_corpus(8), "train", 8, max_seq_length=1)
    assert _first_ids(loader) == [1, 3, 7, 6, 4, 5, 2, 0]


def test_subset_is_the_same_in_every_epoch_and_nested(make_corpus):
    """E1: subsets are nested and the same for every coupler at one seed."""
    corpus = make_corpus(200)
    options: dict[str, Any] = {"max_seq_length": 2, "seed": 1, "drop_last": False}
    small = create_loader(corpus, "train", 4, num_samples=10, **options)
    large = create_loader(corpus, "train", 7, num_samples=20, epoch=2, **options)
    first = set(_first_ids(small))
    set_epoch(small, 9)
    assert set(_first_ids(small)) == first
    assert len(first) == 10
    assert first < set(_first_ids(large))


@pytest.mark.parametrize("shuffle", [None, True])
@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_evaluation_ignores_seed_and_epoch(make_corpus, name, shuffle):
    """C12, E1: content and order fixed; the first n blocks for every seed."""
    corpus = make_corpus(50)
    options: dict[str, Any] = {"max_seq_length": 4, "stride": 2, "num_samples": 3, "shuffle": shuffle}
    loaders = [
        create_loader(corpus, name, 2, seed=s, epoch=e, **options) for s, e in [(0, 0), (7, 0), (0, 5)]
    ]
    set_epoch(loaders[0], 4)
    orders = [_first_ids(loader) for loader in loaders]
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == [0, 2, 4, 6, 8]  # 12 targets: 4, then 2 a window


@pytest.mark.parametrize("workers", [0, 2])
def test_iteration_leaves_the_global_random_state(make_corpus, workers):
    loader = create_loader(make_corpus(60), "train", 4, max_seq_length=3, num_workers=workers)
    before = torch.get_rng_state(), _numpy_state(), random.getstate()
    list(loader)
    list(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert _numpy_state() == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tset"}, "unknown split 'tset'.*Did you mean 'test'"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"num_samples": 0}, "num_samples must be 1 or more; got 0"),
        ({"split": "val", "num_samples": 0}, "evaluation blocks must be 1 or more; got 0"),
        ({"stride": 2}, "stride applies to evaluation"),
        ({"max_seq_length": 0}, "max_seq_length must be 1 or more"),
        ({"max_seq_length": 31}, "has 30 tokens, one block needs 31"),
    ],
)
def test_wrong_arguments(make_corpus, arguments, message):
    """C1: an unknown split and impossible sizes get one clear message."""
    chosen: dict[str, Any] = {"split": "train", "batch_size": 4, "max_seq_length": 3} | arguments
    with pytest.raises(ValueError, match=message):
        create_loader(make_corpus(30), chosen.pop("split"), chosen.pop("batch_size"), **chosen)


@pytest.mark.parametrize(("num_samples", "batches"), [(7_491, 235), (203_496, 6_360)])
def test_counts_of_earlier_experiments(make_corpus, num_samples, batches):
    """A2: 7,491 samples at 32 → 235 batches; 203,496 at 32 → 6,360."""
    loader = create_loader(make_corpus(num_samples), "train", 32, max_seq_length=1, drop_last=False)
    assert len(loader) == batches


def test_wikitext_batches(wikitext):
    """A2: 510 batches at 32, 509 with drop_last; 54 evaluation batches, the last with the 46 tokens."""
    options: dict[str, Any] = {"max_seq_length": 128}
    assert len(create_loader(wikitext, "train", 32, drop_last=False, **options)) == 510
    assert len(create_loader(wikitext, "train", 32, **options)) == 509
    validation = list(create_loader(wikitext, "val", 32, **options))
    assert len(validation) == 54
    assert (validation[-1]["targets"][-1] != -100).sum() == 46
    assert sum(int((batch["targets"] != -100).sum()) for batch in validation) == 217_646
