from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as GraphLoader

from bench.data.blocks import EvalWindows, TrainBlocks
from bench.data.curriculum import Curriculum
from bench.data.loader import (
    create_loader,
    set_epoch,
)

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


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 100), batch=st.integers(1, 40), drop=st.booleans())
def test_as_many_batches_as_pyg(make_corpus, n, batch, drop):
    """A1: the sizes of our batches are those of PyG's loader, for any n and B."""
    graphs = [Data(num_nodes=1) for _ in range(n)]
    reference = GraphLoader(graphs, batch_size=batch, drop_last=drop)  # type: ignore[arg-type]
    sizes = [found.num_graphs for found in reference]
    assume(sizes)  # we refuse an epoch without a batch, see below
    ours = create_loader(make_corpus(n), "train", batch, max_seq_length=1, drop_last=drop)
    assert [len(found["input_ids"]) for found in ours] == sizes
    assert len(ours) == len(reference)


@pytest.mark.parametrize(("n", "batch", "drop", "world"), [(29, 4, False, 2), (7, 9, False, 1)])
def test_workers_count_alike(make_corpus, n, batch, drop, world):
    """A1: two workers, alone and as the second of two ranks."""
    options: dict[str, Any] = {"max_seq_length": 1, "drop_last": drop, "world_size": world, "rank": world - 1}
    loader = create_loader(make_corpus(n), "train", batch, num_workers=2, **options)
    share = n // world
    assert len(list(loader)) == len(loader) == (share // batch if drop else -(-share // batch))


def test_workers_yield_the_same_batches(make_corpus):
    """A1, C6, A10: workers 0 and 2, which live on and serve each epoch's order and subset."""
    curriculum = Curriculum(np.arange(20.0), "linear", epochs=2, start=0.5)
    alone, helped = (
        create_loader(
            make_corpus(60), "train", 4, max_seq_length=3, num_workers=workers, curriculum=curriculum
        )
        for workers in (0, 2)
    )
    assert helped.persistent_workers
    for epoch, batches in ((0, 2), (1, 5), (0, 2)):
        set_epoch(alone, epoch)
        set_epoch(helped, epoch)
        found = _first_ids(helped)
        assert found == _first_ids(alone)
        assert len(found) == 4 * len(helped) == 4 * batches


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


@pytest.mark.parametrize(("name", "shuffle"), [("val", None), ("validation", True), ("test", None)])
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
        ({"epoch": -1}, "epoch must be 0 or more; got -1"),
        ({"start": 11}, "start must lie in 0..10, the samples of epoch 0; got 11"),
        ({"split": "val", "start": 1}, "start applies to training; an evaluation begins anew"),
        ({"num_workers": -1}, "num_workers must be 0 or more, or 'auto'; got -1"),
        ({"num_workers": "all"}, "or 'auto'; got 'all'"),
        ({"split": "val", "batch_schedule": "0:4"}, "apply to training; drop them for split 'val'"),
        ({"batch_schedule": "0:8"}, "batch_size is 4, but the batch schedule 0:8 begins with 8"),
    ],
)
def test_wrong_arguments(make_corpus, arguments, message):
    """C1: an unknown split and impossible sizes get one clear message."""
    chosen: dict[str, Any] = {"split": "train", "batch_size": 4, "max_seq_length": 3} | arguments
    with pytest.raises(ValueError, match=message):
        create_loader(make_corpus(30), chosen.pop("split"), chosen.pop("batch_size"), **chosen)


def test_a_folder_serves_as_corpus(small_data_dir):
    """C1: create_loader takes a folder; the loader names its dataset and its sampler."""
    loader = create_loader(small_data_dir, "train", 4, max_seq_length=16)
    again = create_loader(str(small_data_dir), "train", 4, max_seq_length=16)
    assert torch.equal(next(iter(loader))["input_ids"], next(iter(again))["input_ids"])
    assert loader.dataset_obj is loader.dataset
    assert loader.sampler_obj is loader.batch_sampler
    assert loader.sampler_obj.batch_size == 4
    assert create_loader(small_data_dir, "train", 4).dataset_obj.length == 128


def test_a_wrong_split_or_folder_names_what_is_there(tmp_path, make_corpus, small_data_dir):
    """C1: the path, what it holds, and the remedy."""
    with pytest.raises(
        ValueError, match=r"Did you mean 'train'\? The corpus synthetic holds train, validation"
    ):
        create_loader(make_corpus(30), "trian", 4, max_seq_length=3)
    with pytest.raises(ValueError, match=rf"'dev'; allowed: .*The folder {small_data_dir} holds .*wiki.test"):
        create_loader(small_data_dir, "dev", 4, max_seq_length=3)
    with pytest.raises(ValueError, match=rf"{tmp_path}/none does not exist; pass --data-dir"):
        create_loader(tmp_path / "none", "train", 4, max_seq_length=3)
    (tmp_path / "wiki.train.tokens").write_text(" a \n")
    with pytest.raises(ValueError, match=rf"{tmp_path} lacks wiki.valid.tokens.*holds wiki.train.tokens"):
        create_loader(tmp_path, "train", 4, max_seq_length=3)


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 1), (6, 3), (64, 4)])
def test_automatic_workers(make_corpus, monkeypatch, cores, workers):
    """C3: "auto" = min(4, cores // 2)."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("torch.utils.data.DataLoader.check_worker_number_rationality", lambda self: None)
    loader = create_loader(make_corpus(30), "train", 4, max_seq_length=3, num_workers="auto")
    assert loader.num_workers == workers


def test_pinning_where_there_is_cuda(make_corpus, monkeypatch):
    """C2: the default where nobody says which device the batches go to; a wish is granted."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert create_loader(make_corpus(30), "train", 4, max_seq_length=3).pin_memory is True
    assert create_loader(make_corpus(30), "train", 4, max_seq_length=3, pin_memory=False).pin_memory is False


def test_more_samples_than_there_are_is_said_once(make_corpus):
    """E1: all of them, and one warning, for training and for evaluation."""
    for split, blocks in (("train", 10), ("val", 11)):
        said_so = f"asked for 12 .* blocks of 4 tokens; only {blocks} exist"
        with pytest.warns(UserWarning, match=said_so) as said:
            create_loader(make_corpus(43), split, 2, max_seq_length=4, num_samples=12)
        assert len(said) == 1


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (4, {}, "batch_size 4 with drop_last gives only 7 batches in epoch 0, which serves 30 train blocks "
                "of 2 tokens; 10 are needed: use a batch of at most 3, or lower min_steps_per_epoch"),
        (31, {"min_batches": 1}, "gives no batch in epoch 0, which serves 30 .*; use a batch of at most 30"),
        (2, {"rank": 0, "world_size": 3},
         "batch_size 2 per rank .*only 5 batches in epoch 0 on each of 3 ranks.*at most 3 over all ranks,"),
        (2, {"curriculum": Curriculum(np.arange(30.0), "linear", 3, start=0.5)},
         "only 7 batches in epoch 0, which serves 15 .*at most 1,"),
        (2, {"batch_schedule": "0:2,3:4"}, "batch_size 4 with drop_last gives only 7 batches in epoch 3"),
    ],
)  # fmt: skip
def test_an_epoch_of_hardly_any_batches(make_corpus, batch, options, message):
    """A6: fewer than min_steps_per_epoch in the smallest epoch, or none at all, is an error."""
    with pytest.raises(ValueError, match=message):
        create_loader(make_corpus(60), "train", batch, max_seq_length=2, **({"min_batches": 10} | options))


def test_just_enough_batches(make_corpus):
    """A6: the largest batch that the message names is accepted."""
    assert len(create_loader(make_corpus(60), "train", 3, max_seq_length=2, min_batches=10)) == 10


# --- A4: what the loop iterates is what was created ------------------------------------------------


def test_a_sampler_cannot_be_changed(make_corpus):
    """A4: what the loop iterates is what was created."""
    loader = create_loader(make_corpus(60), "train", 4, max_seq_length=2, batch_schedule="0:4,1:5")
    for name in ("batch_size", "drop_last", "epoch", "start", "num_samples", "curriculum"):
        with pytest.raises(
            AttributeError, match=rf"{name} of a EpochBatchSampler .*set_epoch.*create_loader"
        ):
            setattr(loader.sampler_obj, name, 1)
    assert len(list(loader)) == 7
    set_epoch(loader, 1)
    assert len(list(loader)) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_cannot_be_changed(make_corpus, workers):
    """A4: also while its workers live on."""
    loader = create_loader(make_corpus(60), "train", 4, max_seq_length=2, num_workers=workers)
    assert len(list(loader)) == 7
    for name in ("batch_sampler", "dataset", "num_workers", "corpus"):
        with pytest.raises(AttributeError, match=rf"{name} of a BlockLoader .*set_epoch.*create_loader"):
            setattr(loader, name, [[0], [1]])


# --- real data -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wikitext_batches(wikitext):
    """A2: 510 batches at 32, 509 with drop_last; 54 evaluation batches, the last with the 46 tokens."""
    options: dict[str, Any] = {"max_seq_length": 128}
    assert len(create_loader(wikitext, "train", 32, drop_last=False, **options)) == 510
    assert len(create_loader(wikitext, "train", 32, **options)) == 509
    validation = list(create_loader(wikitext, "val", 32, **options))
    assert len(validation) == 54
    assert (validation[-1]["targets"][-1] != -100).sum() == 46
    assert sum(int((batch["targets"] != -100).sum()) for batch in validation) == 217_646


@pytest.mark.parametrize(("num_samples", "batches"), [(7_491, 235), (203_496, 6_360)])
def test_counts_of_earlier_experiments(make_corpus, num_samples, batches):
    """A2: 7,491 samples at 32 → 235 batches; 203,496 at 32 → 6,360."""
    loader = create_loader(make_corpus(num_samples), "train", 32, max_seq_length=1, drop_last=False)
    assert len(loader) == batches
