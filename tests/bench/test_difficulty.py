"""The difficulty model of a curriculum: scored once, and refused in one line where it cannot serve."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
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


def scores(
    path: Path, blocks: TrainBlocks, corpus, folder: Path, said: list[str] | None = None
) -> np.ndarray:
    announce = None if said is None else said.append
    with mock.patch.dict(os.environ, GNNMOE_CACHE_DIR=str(folder)):
        return difficulty_scores(path, blocks, corpus=corpus, device=CPU, announce=announce)


def test_blocks_are_scored_once_and_it_is_said(finished, corpus, tmp_path, scored):
    blocks, said = TrainBlocks(corpus.splits["train"], 16), []
    first = scores(finished, blocks, corpus, tmp_path, said)
    moved = tmp_path / "moved.pt"
    moved.write_bytes(finished.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = scores(moved, blocks, corpus, tmp_path, said)
    assert np.array_equal(first, again)
    assert first.dtype == again.dtype == np.float64
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
        subset = TrainBlocks.subset(split, 16, 20, seed)
        scores(finished, subset, corpus, tmp_path)
    assert scored == [
        len(TrainBlocks(split, 16)),
        len(TrainBlocks(split, 8)),
        len(TrainBlocks(split, 16)),
        20,
        20,
    ]
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


@pytest.mark.slow
def test_a_finished_run_is_shown_without_scoring_again(finished, tiny, scored, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path / "cache"))
    flags = flags_with(finished, tiny)
    assert main(flags) == 0
    assert f"blocks by {finished} …\n" in capsys.readouterr().err
    (record,) = Path(tiny[tiny.index("--results-dir") + 1]).glob("*/*/record.json")
    source = json.loads(record.read_text())["data"]["training_blocks"]["curriculum"]["order_source"]
    assert source == "model"
    assert main(flags) == 0
    printed = capsys.readouterr()
    assert "is finished" in printed.out
    assert "scoring" not in printed.err
    assert len(scored) == 1


def changed(name: str):
    """Return a function that damages a checkpoint's state in one way."""

    def change(state: dict) -> None:
        if name == "no weights":
            del state["model"]
        elif name == "no identity":
            del state["identity"]
        elif name == "odd identity":
            state["identity"] = "text"
        elif name == "unknown field":
            state["identity"]["model"]["wings"] = 2
        elif name == "file":
            state["identity"]["model"]["coupler_type"] = "Mine@0123456789ab"
        elif name == "interrupted":
            del state["model"]
            state["trainer"] = {"best_model": {}}
        elif name == "lost weight":
            state["model"].popitem()

    return change


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "no weights",
            "is no checkpoint of a run: it lacks trainer; name the checkpoint.pt of a finished",
        ),
        ("no identity", "is no checkpoint of a run: it lacks identity"),
        ("odd identity", "is no checkpoint of a run: a part of it is no dict"),
        ("unknown field", "unexpected keyword argument 'wings'"),
        ("file", "use one whose coupler is registered"),
        ("interrupted", "interrupted before its first evaluation"),
        ("lost weight", "Missing key(s) in state_dict"),
    ],
)
def test_a_checkpoint_that_cannot_score_is_refused_in_one_line(finished, tiny, tmp_path, capsys, name, said):
    state = load_checkpoint(finished)
    changed(name)(state)
    path = tmp_path / "wrong.pt"
    save_checkpoint(path, state)
    refused(flags_with(path, tiny), capsys, str(path), said)


def refused(flags: list[str], capsys, *said: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "--force" not in line
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: Path("/etc/passwd").read_bytes(),
        lambda whole: b"",
        lambda whole: b"\n" * 99,
        lambda whole: whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:],
    ],
)
def test_a_file_that_is_no_sound_checkpoint_is_refused_in_one_line(finished, tiny, tmp_path, capsys, content):
    path = tmp_path / "some.file"
    path.write_bytes(content(finished.read_bytes()))
    refused(flags_with(path, tiny), capsys, f"checkpoint {path}", "name the checkpoint.pt of a finished run")


def test_a_scorer_of_shorter_sequences_is_refused(finished, tiny, capsys):
    flags = flags_with(finished, tiny, "--max-seq-length", "24", "--min-steps-per-epoch", "1")
    refused(
        flags,
        capsys,
        f"{finished} was trained at max_seq_length 16",
        "have 24 tokens",
        "--max-seq-length 16 or",
    )
    assert main(flags_with(finished, tiny, "--max-seq-length", "8", "--max-batches-per-epoch", "2")) == 0


def test_a_scorer_of_another_text_is_refused(finished, tiny, capsys):
    with pytest.raises(SystemExit):
        main(flags_with(finished, tiny, "--tokenizer", "bpe:300"))
    assert "was trained on another text or with another tokenizer" in capsys.readouterr().err
