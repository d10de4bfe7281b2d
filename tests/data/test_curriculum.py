"""Easy blocks first: pacing, scores, and the order that serves where the model is missing."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from bench.config import TrainingConfig
from bench.data.blocks import TrainBlocks
from bench.data.corpus import Corpus, load_corpus
from bench.data.curriculum import (
    Curriculum,
    DifficultyModelMissing,
    make_curriculum,
    model_scores,
    rarity_scores,
)
from bench.data.loader import create_loader, set_epoch
from bench.training.loaders import scorer_identity
from gnnmoe.config import Refused

pytestmark = pytest.mark.core("loader")
FALLING = np.arange(50, 0, -1).astype(float)  # block 49 is the easiest


@pytest.fixture(scope="module")
def worded(small_data_dir) -> Corpus:
    return load_corpus(source="folder", data_dir=small_data_dir)


def served(loader) -> list[int]:
    """Return the blocks of an epoch; the first input names the block in the synthetic corpus."""
    return [first // 2 for batch in loader for first in batch["input_ids"][:, 0].tolist()]


@pytest.mark.parametrize(
    ("pacing", "sizes"),
    # start 0.2, five epochs: 0.2, 0.4, … and sqrt(0.04 + 0.96 t) = 0.2, 0.529, 0.721, 0.872, 1
    [("linear", [10, 20, 30, 40, 50, 50]), ("competence_sqrt", [10, 26, 36, 44, 50, 50])],
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_subset_follows_the_pacing(make_corpus, pacing, sizes, drop_last):
    """A10, C6: the easiest blocks by the pacing function, then all; len(loader) right in every epoch."""
    curriculum = Curriculum(FALLING, pacing, epochs=5)
    loader = create_loader(
        make_corpus(100), "train", 4, max_seq_length=2, drop_last=drop_last, curriculum=curriculum
    )
    for epoch, size in enumerate(sizes):
        set_epoch(loader, epoch)
        blocks = served(loader)
        kept = size - size % 4 if drop_last else size
        assert len(blocks) == len(set(blocks)) == kept
        assert set(blocks) <= set(range(50 - size, 50))
        assert len(loader) == len(list(loader)) == (kept + 3) // 4
        assert blocks != sorted(blocks)  # shuffled within
        assert served(loader) == blocks
    assert curriculum.to_record()["blocks_by_epoch"] == sizes[:5]


def test_the_last_epoch_is_that_of_a_loader_without_curriculum(make_corpus):
    """A10: the full set, in the very order of (seed, epoch)."""
    options: dict[str, Any] = {"max_seq_length": 2, "seed": 4, "epoch": 2}
    paced = create_loader(
        make_corpus(100), "train", 4, curriculum=Curriculum(FALLING, "linear", 3), **options
    )
    assert served(paced) == served(create_loader(make_corpus(100), "train", 4, **options))
    assert Curriculum(FALLING, "linear", epochs=1).size(0) == 50
    ties = Curriculum(np.arange(500.0) % 2, "linear", epochs=2)
    assert ties.subset(0).tolist() == list(range(0, 200, 2))  # in the order of the blocks


def test_rarity_by_hand(worded):
    """The mean of −log p over a block's targets, p = (count + 1) / Σ (count + 1)."""
    corpus = worded
    blocks = TrainBlocks(corpus.splits["train"], 4)
    counts = corpus.vocabulary.counts + 1
    by_hand = [
        np.mean([-np.log(counts[target] / counts.sum()) for target in blocks[i]["targets"].tolist()])
        for i in range(len(blocks))
    ]
    assert np.allclose(rarity_scores(blocks, corpus.vocabulary), by_hand, rtol=1e-12)


def test_model_scores_take_each_block_once(make_split):
    blocks = TrainBlocks(make_split(100), 2)
    seen = []

    def score(inputs, targets):
        seen.append(len(inputs))
        assert torch.equal(targets, inputs + 1)
        return inputs[:, 0].float()

    assert model_scores(blocks, score).tolist() == list(range(0, 100, 2))
    assert seen == [32, 18]
    with pytest.raises(ValueError, match=r"one number a block, \(32,\); got \(32, 2\)"):
        model_scores(blocks, lambda inputs, targets: inputs.float())


def test_a_model_orders_the_blocks(worded, tmp_path):
    """A10: the scorer model:CHECKPOINT."""
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.touch()
    asked = []

    def score(path, blocks):
        asked.append(path)
        return -np.arange(len(blocks), dtype=float)

    loader = create_loader(
        worded, "train", 1, max_seq_length=80, drop_last=False,
        curriculum=lambda blocks: make_curriculum(
            blocks, worded.vocabulary, f"model:{checkpoint}", pacing="linear", epochs=2, start=0.3,
            score_by_checkpoint=score,
        ),
    )  # fmt: skip
    blocks, curriculum = len(loader.dataset_obj), loader.sampler_obj.curriculum
    assert curriculum is not None
    assert curriculum.order_source == "model"
    assert sorted(loader.sampler_obj.served()) == list(range(blocks - round(0.3 * blocks), blocks))
    assert asked == [checkpoint]


def test_a_model_in_the_home_folder_is_found(worded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "checkpoint.pt").write_bytes(b"weights")
    blocks = TrainBlocks(worded.splits["train"], 4)

    def score(path, blocks):
        assert path == tmp_path / "checkpoint.pt"
        return np.arange(len(blocks), dtype=float)

    scorer = "model:~/checkpoint.pt"
    options = {"pacing": "linear", "epochs": 2, "score_by_checkpoint": score}
    assert make_curriculum(blocks, worded.vocabulary, scorer, **options).order_source == "model"
    spelt_out = f"model:{tmp_path}/checkpoint.pt"
    found = [scorer_identity(TrainingConfig(curriculum=text, epochs=2)) for text in (scorer, spelt_out)]
    assert found[0] == found[1] != "random"
    with pytest.raises(Refused, match=r"curriculum is '~nobody-has-this/x.pt': this home folder is not kno"):
        make_curriculum(blocks, worded.vocabulary, "model:~nobody-has-this/x.pt", **options)


@pytest.mark.parametrize("scorer", ["model:", "model", "model:/nowhere/checkpoint.pt"])
def test_a_missing_model_falls_back_to_a_random_order(worded, scorer):
    """A9: one warning, a seeded random order over the same paced sizes, and the record says so."""
    blocks = TrainBlocks(worded.splits["train"], 2)
    options = {"pacing": "linear", "epochs": 3}

    def fall_back(seed):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = make_curriculum(blocks, worded.vocabulary, scorer, seed=seed, **options)
        assert len(caught) == 1
        assert "random order" in str(caught[0].message)
        return found

    found, again, other = fall_back(0), fall_back(0), fall_back(1)
    expected = make_curriculum(blocks, worded.vocabulary, "rarity", **options)
    assert found.order_source == found.to_record()["order_source"] == "random_fallback"
    assert expected.order_source == "rarity"
    assert [found.size(e) for e in range(4)] == [expected.size(e) for e in range(4)]
    assert np.array_equal(found.subset(0), again.subset(0))
    assert not np.array_equal(found.scores, other.scores)
    assert not np.array_equal(found.subset(1), np.arange(found.size(1)))


def test_strict_refuses_a_missing_model(worded):
    """A9: --strict-curriculum."""
    blocks = TrainBlocks(worded.splits["train"], 4)
    with pytest.raises(DifficultyModelMissing, match=r"/nowhere.pt is not there; pass model:CHECKPOINT"):
        make_curriculum(
            blocks, worded.vocabulary, "model:/nowhere.pt", pacing="linear", epochs=2, strict=True
        )
    assert issubclass(DifficultyModelMissing, ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pacing": "linaer"}, "unknown curriculum pacing 'linaer'.*Did you mean 'linear'"),
        ({"epochs": 0}, "curriculum epochs must be 1 or more; got 0"),
        ({"start": 0.0}, r"start must lie in \(0, 1\]"),
        ({"start": 1.5}, "got 1.5"),
        ({"scores": np.zeros((3, 2))}, r"one number a block; got shape \(3, 2\)"),
        (
            {"scores": np.array([1.0, np.nan, np.inf, 2.0])},
            r"2 of 4 difficulty scores are not finite, the first that of block 1 \(nan\)",
        ),
    ],
)
def test_wrong_curricula(change, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**({"scores": FALLING, "pacing": "linear", "epochs": 3} | change))


@pytest.mark.parametrize("scorer", ["rarety", "rarity:x", ""])
def test_an_unknown_scorer(worded, scorer):
    blocks = TrainBlocks(worded.splits["train"], 4)
    with pytest.raises(ValueError, match=r"unknown curriculum scorer.*allowed: model:CHECKPOINT, rarity"):
        make_curriculum(blocks, worded.vocabulary, scorer, pacing="linear", epochs=2)


def test_scores_of_other_blocks_are_refused(make_corpus):
    with pytest.raises(ValueError, match="the curriculum has 50 scores for 20 blocks"):
        create_loader(
            make_corpus(100), "train", 4, max_seq_length=2, num_samples=20,
            curriculum=Curriculum(FALLING, "linear", 3),
        )  # fmt: skip
