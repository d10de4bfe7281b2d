"""A look at the first batch: what it finds, and that it leaves no trace."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bench.data import loader as loader_module
from bench.data.corpus import Corpus, load_corpus
from bench.data.curriculum import Curriculum
from bench.data.loader import BatchValidationError, create_loader, validate_first_batch

pytestmark = pytest.mark.core("loader")


@pytest.fixture(scope="module")
def worded(small_data_dir) -> Corpus:
    return load_corpus(source="folder", data_dir=small_data_dir)


def make(corpus: Corpus, split: str = "train", **options):
    return create_loader(corpus, split, 4, max_seq_length=16, **options)


def test_padding_after_the_last_target_is_no_shift(worded):
    """C7: a cut evaluation ends with a window of fewer targets, then <eos> as input."""
    loader = create_loader(worded, "val", 9, max_seq_length=16, stride=5, num_samples=2)
    last = next(iter(loader))
    end = int((last["targets"][-1] != -100).nonzero().max())
    assert last["targets"][-1, end] != last["input_ids"][-1, end + 1]
    assert validate_first_batch(loader)


@pytest.mark.parametrize("options", [{}, {"num_samples": 1}, {"stride": 5}, {"stride": 5, "num_samples": 2}])
@pytest.mark.parametrize("split", ["val", "test"])
def test_sound_evaluations_pass(worded, split, options):
    """C7: also where the first batch holds context and padding."""
    assert validate_first_batch(make(worded, split, **options)) is True


def _batch(change):
    """Return what makes a loader's blocks hand out changed batches."""

    def spoil(loader):
        sound = loader.dataset.__getitems__
        loader.dataset.__getitems__ = lambda numbers: change(sound(numbers))

    return spoil


SPOILT = {
    "keys": _batch(lambda batch: {"input_ids": batch["input_ids"], "labels": batch["targets"]}),
    "dtype": _batch(lambda batch: batch | {"targets": batch["targets"].int()}),
    "shape": _batch(lambda batch: {name: tensor[:3] for name, tensor in batch.items()}),
    "shape of targets": _batch(lambda batch: batch | {"targets": batch["targets"][:, :-1]}),
    "range": _batch(lambda batch: batch | {"input_ids": batch["input_ids"] + 10_000}),
    "range below": _batch(lambda batch: batch | {"targets": batch["targets"] - 10_000}),
    "shift": _batch(lambda batch: batch | {"targets": batch["input_ids"]}),
    "shift of nothing": _batch(lambda batch: batch | {"targets": torch.full_like(batch["targets"], -100)}),
    "scores": lambda loader: loader.sampler_obj.curriculum.scores.__setitem__(3, np.nan),
}


@pytest.mark.parametrize("case", SPOILT)
def test_each_check_says_its_name(worded, case):
    """C7: keys, dtype, shapes, range, shift, finite scores."""
    blocks = len(make(worded, drop_last=False).dataset_obj)
    loader = make(worded, curriculum=Curriculum(np.arange(float(blocks)), "linear", 2))
    assert validate_first_batch(loader)
    SPOILT[case](loader)
    with pytest.raises(BatchValidationError) as caught:
        validate_first_batch(loader)
    assert isinstance(caught.value, AssertionError)
    assert caught.value.check == case.split()[0]
    assert f"fails the check '{caught.value.check}'" in str(caught.value)


def test_the_vocabulary_of_another_corpus(worded):
    """C7: the hash of the vocabulary."""
    with pytest.raises(BatchValidationError, match=r"'vocabulary'.*use the same data set and tokenizer"):
        validate_first_batch(make(worded), "0123456789abcdef")


def test_ids_past_the_vocabulary_of_the_corpus(make_corpus):
    """C7: the synthetic stream counts up, its vocabulary has two words."""
    with pytest.raises(BatchValidationError, match=r"of the input_ids lie outside 0\.\.1"):
        validate_first_batch(make(make_corpus(100)))


def test_no_assert_statement_does_the_work(worded, monkeypatch):
    """C7: the same failures under python -O, which drops assert statements."""
    path = Path(loader_module.__file__)
    optimised = ModuleType("optimised")
    monkeypatch.setitem(sys.modules, "optimised", optimised)  # where dataclasses look for their module
    exec(compile(path.read_text(), str(path), "exec", optimize=2), vars(optimised))
    loader = make(worded)
    SPOILT["shift"](loader)
    with pytest.raises(AssertionError, match="fails the check 'shift'"):
        optimised.validate_first_batch(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_draws_no_random_number_and_moves_nothing(worded, workers):
    """C7: random states and the epochs to come are those of a loader nobody looked at."""
    looked_at, other = make(worded, num_workers=workers), make(worded, num_workers=workers)

    workers_generator = looked_at.generator
    assert workers_generator is not None

    def states():
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        return torch.get_rng_state(), str(numpy_state), random.getstate(), workers_generator.get_state()

    before = states()
    assert validate_first_batch(looked_at)
    after = states()
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    pairs = zip(looked_at, other, strict=True)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in pairs)
