"""The difficulty model of a curriculum: scored once, and refused in one line where it cannot serve."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import bench.training.loaders
from bench.data.blocks import TrainBlocks
from bench.data.corpus import load_corpus
from bench.run.__main__ import main
from bench.training.checkpoint import load_checkpoint, save_checkpoint
from bench.training.loaders import difficulty_scores
from tests.bench._runs import only_run, refusal, results_of
from tests.bench.conftest import TINY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(small_data_dir):
    return load_corpus(data_dir=small_data_dir)


@pytest.fixture(scope="module")
def finished(small_data_dir, tmp_path_factory) -> Path:
    """The checkpoint of a finished run at length 16."""
    results = tmp_path_factory.mktemp("finished")
    places = ["--data-dir", str(small_data_dir), "--results-dir", str(results), "--quiet"]
    assert main([*TINY, *places, "--coupler", "mean"]) == 0
    (path,) = results.glob("*/*/checkpoint.pt")
    return path


@pytest.fixture
def scored(monkeypatch) -> list[int]:
    """How many blocks were scored at each time that any were."""
    found: list[int] = []

    def counted(blocks, score, real=bench.training.loaders.model_scores):
        found.append(len(blocks))
        return real(blocks, score)

    monkeypatch.setattr(bench.training.loaders, "model_scores", counted)
    return found


def scores(path: Path, blocks: TrainBlocks, corpus, folder: Path, announce=None) -> np.ndarray:
    with mock.patch.dict(os.environ, GNNMOE_CACHE_DIR=str(folder)):
        return difficulty_scores(path, blocks, corpus=corpus, device=CPU, announce=announce)


def test_blocks_are_scored_once_and_it_is_said(finished, corpus, tmp_path, scored):
    blocks, said = TrainBlocks(corpus.splits["train"], 16), []
    first = scores(finished, blocks, corpus, tmp_path, said.append)
    moved = tmp_path / "moved.pt"
    moved.write_bytes(finished.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = scores(moved, blocks, corpus, tmp_path, said.append)
    assert np.array_equal(first, again)
    assert scored == [len(blocks)]
    assert said == [f"scoring {len(blocks)} blocks by {finished} …"]


def test_other_blocks_another_length_or_another_checkpoint_are_scored_anew(
    finished, corpus, tmp_path, scored
):
    split = corpus.splits["train"]
    state = load_checkpoint(finished)
    state["model"] = {name: value * 1.5 for name, value in state["model"].items()}
    other = tmp_path / "other.pt"
    save_checkpoint(other, state)
    scores(finished, TrainBlocks(split, 16), corpus, tmp_path)
    scores(finished, TrainBlocks(split, 8), corpus, tmp_path)
    scores(other, TrainBlocks(split, 16), corpus, tmp_path)
    for seed in (0, 1):
        scores(finished, TrainBlocks.subset(split, 16, 20, seed), corpus, tmp_path)
    whole = len(TrainBlocks(split, 16))
    assert scored == [whole, len(TrainBlocks(split, 8)), whole, 20, 20]
    assert len(list((tmp_path / "difficulty").iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "garbage", "swapped"])
def test_broken_scores_are_made_again_with_one_warning(finished, corpus, tmp_path, scored, damage):
    blocks = TrainBlocks(corpus.splits["train"], 16)
    expected = scores(finished, blocks, corpus, tmp_path)
    (path,) = (tmp_path / "difficulty").iterdir()
    raw = path.read_bytes()
    swapped = raw.replace(expected.tobytes(), expected[::-1].tobytes())
    path.write_bytes({"cut": raw[:-30], "garbage": b"garbage", "swapped": swapped}[damage])
    assert path.read_bytes() != raw
    with pytest.warns(UserWarning, match="set of difficulty scores in .* is broken") as caught:
        assert np.array_equal(scores(finished, blocks, corpus, tmp_path), expected)
    assert len(caught) == 1
    assert np.array_equal(scores(finished, blocks, corpus, tmp_path), expected)
    assert len(scored) == 2


def flags_with(checkpoint: Path, tiny: list[str], *more: str) -> list[str]:
    place = tiny.index("--max-steps")
    flags = [*tiny[:place], *tiny[place + 2 :], "--coupler", "mean", "--epochs", "2", "--batch-size", "2"]
    return [*flags, "--curriculum", f"model:{checkpoint}", *more]


def without(*keys: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def of_model(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"identity": state["identity"] | {"model": state["identity"]["model"] | fields}}

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("model"), "lacks trainer; name the checkpoint.pt of a finished"),
        (without("identity"), "is no checkpoint of a run: it lacks identity"),
        (lambda state: state | {"identity": "text"}, "is no checkpoint of a run: a part of it is no dict"),
        (of_model(wings=2), "unexpected keyword argument 'wings'"),
        (of_model(coupler_type="Mine@0123456789ab"), "use one whose coupler is registered"),
        (lambda state: without("model")(state) | {"trainer": {"best_model": {}}},
         "interrupted before its first evaluation"),
        (lambda state: state | {"model": dict(list(state["model"].items())[1:])}, "Missing key(s)"),
        (lambda _: b"text", "name the checkpoint.pt of a finished run"),
        (lambda _: b"\n" * 99, "name the checkpoint.pt of a finished run"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_score_is_refused_in_one_line(
    finished, tiny, tmp_path, capsys, change, said
):
    path, changed = tmp_path / "wrong.pt", change(load_checkpoint(finished))
    if isinstance(changed, bytes):
        path.write_bytes(changed)
    else:
        save_checkpoint(path, changed)
    line = refusal(capsys, flags_with(path, tiny))
    assert line.startswith("error: ")
    assert "--force" not in line
    assert str(path) in line
    assert said in line


def test_a_scorer_of_shorter_sequences_or_of_another_text_is_refused(finished, tiny, capsys):
    line = refusal(capsys, flags_with(finished, tiny, "--max-seq-length", "24", "--min-steps-per-epoch", "1"))
    for said in (f"{finished} was trained at max_seq_length 16", "have 24 tokens", "--max-seq-length 16 or"):
        assert said in line
    line = refusal(capsys, flags_with(finished, tiny, "--tokenizer", "bpe:300"))
    assert "was trained on another text or with another tokenizer" in line


@pytest.mark.slow
def test_a_finished_run_is_shown_without_scoring_again(finished, tiny, scored, capsys, monkeypatch, tmp_path):
    """Also where its sequences are shorter than those of the scorer."""
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path / "cache"))
    flags = flags_with(finished, tiny, "--max-seq-length", "8", "--max-batches-per-epoch", "2")
    assert main(flags) == 0
    assert f"blocks by {finished} …\n" in capsys.readouterr().err
    _, record = only_run(results_of(tiny))
    assert record["data"]["training_blocks"]["curriculum"]["order_source"] == "model"
    assert main(flags) == 0
    printed = capsys.readouterr()
    assert "is finished" in printed.out
    assert "scoring" not in printed.err
    assert len(scored) == 1
