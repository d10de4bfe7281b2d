"""A loader goes on where it was left, or says why it cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.data.curriculum import Curriculum
from bench.data.loader import create_loader, set_epoch
from bench.data.resume import loader_state, resume_loader
from bench.data.vocabulary import Vocabulary

pytestmark = pytest.mark.core("loader")


def make(corpus, batch=4, **options):
    chosen: dict[str, Any] = {"max_seq_length": 2, "seed": 1} | options
    return create_loader(corpus, "train", batch, **chosen)


def blocks_of(loader) -> list[int]:
    return [first // 2 for batch in loader for first in batch["input_ids"][:, 0].tolist()]


@settings(max_examples=60, deadline=None)
@given(
    taken=st.integers(0, 7), before=st.integers(1, 6), after=st.integers(1, 9), epoch=st.integers(0, 2),
    drop=st.booleans(),
)  # fmt: skip
def test_the_same_remaining_samples_at_any_batch_size(make_corpus, taken, before, after, epoch, drop):
    """C11: (epoch, samples consumed) gives the same rest in the same order, also at another batch size."""
    corpus = make_corpus(100)
    first = make(corpus, before, epoch=epoch, drop_last=False)
    order = blocks_of(first)
    state = json.loads(json.dumps(loader_state(first, taken * before)))
    second = make(corpus, after, drop_last=drop)
    resume_loader(second, state)
    rest = order[taken * before :]
    kept = len(rest) - len(rest) % after if drop else len(rest)
    assert blocks_of(second) == blocks_of(second) == rest[:kept]
    assert len(second) == len(list(second))
    set_epoch(second, epoch)  # the training loop names the epoch it is in
    assert blocks_of(second) == rest[:kept]
    set_epoch(second, epoch + 1)
    set_epoch(first, epoch + 1)
    whole = blocks_of(first)
    assert blocks_of(second) == (whole[: len(whole) - len(whole) % after] if drop else whole)


def test_another_world_size_goes_on_too(make_corpus):
    """C11, C4: one rank consumed 12 of 50; two ranks share the other 38."""
    alone = make(make_corpus(100))
    order = blocks_of(make(make_corpus(100), drop_last=False))
    state = loader_state(alone, 12)
    ranks = [make(make_corpus(100), 3, rank=rank, world_size=2) for rank in (0, 1)]
    for loader in ranks:
        resume_loader(loader, state)
    first, second = map(blocks_of, ranks)
    assert [number for pair in zip(first, second, strict=True) for number in pair] == order[12:48]
    assert ranks[0].sampler_obj.remainder == 2


def test_a_curriculum_goes_on_in_its_epoch(make_corpus):
    curriculum = Curriculum(np.arange(50.0), "linear", epochs=3)
    first = make(make_corpus(100), 2, curriculum=curriculum)
    set_epoch(first, 1)
    state, order = loader_state(first, 10), blocks_of(first)
    second = make(make_corpus(100), 2, curriculum=curriculum)
    resume_loader(second, state)
    assert blocks_of(second) == order[10:]
    assert "resumed after 10 samples by " + __file__ in second.changes[-1]


def test_what_cannot_be_continued_is_refused(make_corpus):
    """C11: another corpus, vocabulary, length, seed, subset or curriculum; nothing is changed then."""
    corpus = make_corpus(100)
    state = loader_state(make(corpus), 8)
    words = Vocabulary(("<unk>", "<eos>"), np.zeros(2, dtype=np.int64))
    text = replace(corpus.splits["test"], sha256="another")
    curriculum = Curriculum(np.arange(50.0), "linear", epochs=3)
    cases = {
        r"the vocabulary of another corpus: it was synthetic \(\w{12}\) and is other \(": make(
            replace(corpus, name="other", vocabulary=words)
        ),
        r"on another corpus: it was synthetic \(\w{12}\) and is synthetic \(\w{12}\)": make(
            replace(corpus, splits=dict(corpus.splits) | {"test": text})
        ),
        "max_seq_length was 2 and is 4; use the same max_seq_length": make(corpus, max_seq_length=4),
        "seed was 1 and is 2": make(corpus, seed=2),
        "num_samples was 50 and is 30; use the same number of": make(corpus, num_samples=30),
        "the order of epoch 0 differs; use the same curriculum": make(
            corpus, 2, curriculum=curriculum, epoch=1
        ),
    }
    for message, loader in cases.items():
        before = blocks_of(loader)
        with pytest.raises(ValueError, match=message):
            resume_loader(loader, state)
        assert blocks_of(loader) == before


def test_wrong_states(make_corpus):
    loader = make(make_corpus(100))
    with pytest.raises(ValueError, match=r"samples_consumed must lie in 0\.\.50.*got 51"):
        loader_state(loader, 51)
    with pytest.raises(ValueError, match=r"lacks corpus, corpus_sha256, .*; take it by loader_state"):
        resume_loader(loader, {"epoch": 0})
    validation = create_loader(make_corpus(100), "val", 4, max_seq_length=2)
    with pytest.raises(ValueError, match="an evaluation begins anew"):
        loader_state(validation, 0)


def test_at_the_end_of_an_epoch_nothing_remains(make_corpus):
    first, second = make(make_corpus(100)), make(make_corpus(100))
    resume_loader(second, loader_state(first, 50))
    assert len(second) == len(list(second)) == 0
    set_epoch(second, 1)
    assert len(second) == 12
