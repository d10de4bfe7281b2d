"""Weights & Biases without an account: what is sent is the run's own numbers, and no number changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.run.__main__ import main
from tests.bench._runs import only_folder
from tests.bench.conftest import TINY
from tests.bench.test_track import SHAPE, expected

TRACK = ["--track", "wandb"]


class FakeRun:
    """Keeps what a run of wandb is told; refuses steps that go back, as wandb does."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.rows, self.summary, self.exit_code = arguments, [], {}, None

    def log(self, values: dict[str, float], step: int) -> None:
        assert not self.rows or step >= self.rows[-1][0]
        self.rows.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb(SimpleNamespace):
    """The part of wandb that the tracker uses."""

    def __init__(self, logged_in: bool = True) -> None:
        self.runs: list[FakeRun] = []
        super().__init__(__spec__=object(), Settings=dict, login=lambda **_: logged_in)

    def init(self, **arguments: Any) -> FakeRun:
        self.runs.append(FakeRun(arguments))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch) -> FakeWandb:
    found = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return found


def run(data: Path, results: Path, *flags: str) -> int:
    places = ["--data-dir", str(data), "--results-dir", str(results), "--quiet"]
    return main([*TINY, *SHAPE, "--no-speed", *places, *flags])


def test_what_is_sent_is_the_history_the_weights_and_the_results(fake, small_data_dir, tmp_path):
    assert run(small_data_dir, tmp_path, *TRACK) == 0
    folder, (sent,) = only_folder(tmp_path), fake.runs
    record = json.loads((folder / "record.json").read_text())
    found: dict[str, list[tuple[int, Any]]] = {}
    for step, values in sent.rows:
        for name, value in values.items():
            found.setdefault(name, []).append((step, pytest.approx(value, rel=1e-6)))
    assert found == expected(folder)
    assert sent.arguments["config"] == record["config"]
    assert (sent.arguments["group"], sent.arguments["dir"]) == (folder.name, str(folder))
    assert (sent.summary["status"], sent.exit_code) == ("ok", 0)
    quality = record["quality"]["validation"]
    assert sent.summary["result/validation perplexity"] == pytest.approx(quality["perplexity"])


def test_it_changes_no_number_and_no_name(fake, small_data_dir, tmp_path):
    assert run(small_data_dir, tmp_path / "with", *TRACK) == 0
    assert run(small_data_dir, tmp_path / "without") == 0
    ours, theirs = (only_folder(tmp_path / name) for name in ("with", "without"))
    assert ours.name == theirs.name
    assert (ours / "history.jsonl").read_bytes() == (theirs / "history.jsonl").read_bytes()


def test_a_continued_run_sends_every_step_once(fake, small_data_dir, tmp_path, monkeypatch):
    import bench.training.loop

    real, steps = bench.training.loop.training_step, []

    def interrupted_at_six(*arguments):
        steps.append(None)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(bench.training.loop, "training_step", interrupted_at_six)
        assert run(small_data_dir, tmp_path, *TRACK) == 130
    assert run(small_data_dir, tmp_path, *TRACK, "--resume") == 0
    first, second = fake.runs
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert [step for step, values in second.rows if "train/loss" in values] == [1, 2, 3, 4, 5, 6]
    assert first.arguments["group"] == second.arguments["group"]


def test_an_error_is_one_note_and_the_run_goes_on(fake, small_data_dir, tmp_path, monkeypatch, capsys):
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FakeRun, "log", broken)
    assert run(small_data_dir, tmp_path, *TRACK) == 0
    assert capsys.readouterr().err.count("note: nothing more is sent to wandb (OSError:") == 1


@pytest.mark.parametrize(("package", "said"), [
    (None, "track is wandb, which is not installed; pip install 'gnnmoe[track]' installs it."),
    (FakeWandb(logged_in=False), "wandb has no account; run `wandb login`, or set WANDB_MODE=offline."),
])  # fmt: skip
def test_without_package_or_account_nothing_starts(
    package, said, small_data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run(small_data_dir, tmp_path / "results", *TRACK)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("results/*/*/record.json"))


@pytest.mark.slow
def test_offline_for_real_without_an_account(small_data_dir, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra track is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(small_data_dir, tmp_path, *TRACK) == 0
    (file,) = only_folder(tmp_path).glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in (b"train/loss", b"validation/perplexity", b"hyperedge_weights/layer_0/{0,1}"):
        assert name in content
