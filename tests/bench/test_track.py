"""TensorBoard as a live view: its events are the run's own numbers; it can neither change nor end a run."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.run.__main__ import main
from bench.run.prepare import Identifier
from bench.sweep.__main__ import main as sweep_main
from bench.sweep.plan import make_plan
from bench.sweep.specification import sweep_of
from tests.bench._runs import act_at_step, interrupt, only_folder, refusal
from tests.bench.conftest import TINY

pytest.importorskip("tensorboard", reason="the extra track is not installed")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TRACK = ["--track", "tensorboard"]
SHAPE = "--num-experts 3 --max-steps 6 --eval-every 3".split()
TEXTS = ("config/text_summary", "result/text_summary")
Scalars = dict[str, list[tuple[int, np.float32]]]


def run(data: Path, results: Path, *flags: str) -> int:
    return main([*given(data, results), "--quiet", *flags])


def given(data: Path, results: Path) -> list[str]:
    return [*TINY, "--no-speed", *SHAPE, "--data-dir", str(data), "--results-dir", str(results)]


def read(folder: Path) -> tuple[Scalars, dict[str, list[tuple[int, str]]]]:
    """Return what TensorBoard sees: scalars and texts as (step, value), by tag."""
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    scalars = {tag: [(event.step, np.float32(event.value)) for event in found.Scalars(tag)]
               for tag in found.Tags()["scalars"]}  # fmt: skip
    texts = {tag: [(event.step, event.tensor_proto.string_val[0].decode()) for event in found.Tensors(tag)]
             for tag in found.Tags()["tensors"]}  # fmt: skip
    return scalars, texts


def expected(folder: Path) -> Scalars:
    """Return the same of the run's own files."""
    found: dict[str, list[Any]] = defaultdict(list)
    for row in map(json.loads, (folder / "history.jsonl").read_text().splitlines()):
        values = {name: row.get(name) for name in ("loss", "learning_rate", "gradient_norm")}
        if row["kind"] == "validation":
            loss = row["nll_sum"] / row["tokens"]
            values = {"loss": loss, "perplexity": math.exp(loss)}
        for name, value in values.items():
            found[f"{row['kind']}/{name}"].append((row["step"], np.float32(value)))
    trace = np.load(folder / "communication.npz")
    names = {"hyperedge_weights": ["{0,1}", "{0,2}", "{1,2}"], "mixing": ["E0", "E1", "E2"]}
    for part, members in names.items():
        for place, name in enumerate(members):
            values = trace[f"layer_0.{part}"][:, place]
            found[f"{part}/layer_0/{name}"] = list(zip(trace["step"].tolist(), values, strict=True))
    return found


@pytest.fixture(scope="module")
def tracked(small_data_dir, tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("tracked")
    assert run(small_data_dir, results, *TRACK) == 0
    return only_folder(results)


def test_the_events_are_the_history_and_the_weights(tracked):
    scalars, _ = read(tracked)
    assert scalars == expected(tracked)
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in scalars["validation/perplexity"]] == [3, 6]
    assert [step for step, _ in scalars["hyperedge_weights/layer_0/{0,2}"]] == [0, 3, 6]


def test_config_and_result_are_texts(tracked):
    _, texts = read(tracked)
    record = json.loads((tracked / "record.json").read_text())
    ((step, config),) = texts["config/text_summary"]
    assert (step, json.loads(config)) == (0, record["config"])
    assert all(line.startswith("    ") for line in config.splitlines()), "Markdown reads it as code"
    ((step, result),) = texts["result/text_summary"]
    cells = dict(line.strip("| ").split(" | ") for line in result.splitlines() if not line.startswith("|-"))
    quality = record["quality"]["validation"]
    assert step == 6
    assert cells["status"] == "ok"
    perplexity = math.exp(quality["nll_sum"] / quality["tokens"])
    assert float(cells["validation perplexity"].replace(",", "")) == pytest.approx(perplexity, rel=1e-5)
    assert cells["parameters"] == f"{record['parameters']['total']:,}"
    assert "test perplexity" not in cells, "it was not measured"


def test_it_changes_no_number_and_no_name(tracked, small_data_dir, tmp_path):
    assert run(small_data_dir, tmp_path) == 0
    plain = only_folder(tmp_path)
    assert not (plain / "tensorboard").exists()
    assert plain.name == tracked.name
    assert (plain / "history.jsonl").read_bytes() == (tracked / "history.jsonl").read_bytes()
    ours, theirs = np.load(tracked / "communication.npz"), np.load(plain / "communication.npz")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert main([*given(small_data_dir, tmp_path), *TRACK]) == 0
    assert not (plain / "tensorboard").exists(), "the run was finished"


@pytest.mark.parametrize("first", [pytest.param([], marks=pytest.mark.slow), TRACK], ids=["plain", "tracked"])
def test_a_resumed_run_has_every_step_once(first, small_data_dir, tmp_path, monkeypatch):
    """Interrupted inside step 6, after the checkpoint of step 3: steps 4 and 5 come again."""
    with monkeypatch.context() as patch:
        act_at_step(patch, 6, interrupt)
        assert run(small_data_dir, tmp_path, *first) == 130
    folder = only_folder(tmp_path)
    if first:
        (events,) = (folder / "tensorboard").iterdir()
        assert len(read(folder)[0]["train/loss"]) == 5
        events.write_bytes(events.read_bytes()[:-3])  # as a kill leaves it
        events.rename(events.with_name("events.out.tfevents.0000000001.earlier"))  # than this test's clocks
    assert run(small_data_dir, tmp_path, *TRACK, "--resume") == 0
    scalars, texts = read(folder)
    assert scalars == expected(folder)
    assert {tag: len(found) for tag, found in texts.items()} == dict.fromkeys(TEXTS, 1)
    assert run(small_data_dir, tmp_path, *TRACK, "--force") == 0
    assert read(folder.with_name(folder.name + ".1"))[0] == scalars == read(folder)[0], "earlier events stay"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("when", [pytest.param("opening", marks=pytest.mark.slow), "writing"])
def test_a_disk_that_refuses_is_one_note(when, small_data_dir, tmp_path, monkeypatch, capfd):
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    real, calls = LocalFileSystem.append, []

    def full(*arguments):
        calls.append(arguments)
        if when == "opening" or len(calls) > 9:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(LocalFileSystem, "append", full)
    if when == "opening":
        monkeypatch.setattr(LocalFileSystem, "write", full)
    assert run(small_data_dir, tmp_path, *TRACK) == 0
    printed = capfd.readouterr().err
    assert printed.count("No space left on device") == 1, printed
    assert "note: nothing more is written for TensorBoard" in printed
    assert "Traceback" not in printed
    assert len((only_folder(tmp_path) / "history.jsonl").read_text().splitlines()) == 8


def test_without_the_package_nothing_starts(small_data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    results = tmp_path / "results"
    (tmp_path / "sweep.toml").write_text('[base]\ntrack = "tensorboard"\n[grid]\ncoupler = ["mean"]\n')
    sweep = [str(tmp_path / "sweep.toml"), "--data-dir", str(small_data_dir)]
    for command, flags in ((main, [*TINY, *TRACK]), (sweep_main, sweep)):
        printed = refusal(capsys, [*flags, "--results-dir", str(results)], command)
        assert "track is tensorboard, which is not installed; pip install 'gnnmoe[track]'" in printed
    assert not results.exists()


def test_other_trackers_are_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--track", "mlflow", "--results-dir", str(tmp_path / "results")])
    assert stopped.value.code == 2
    assert "'tensorboard', 'wandb'" in capsys.readouterr().err


def test_a_sweep_hands_it_to_its_runs(small_data_dir, tmp_path):
    base = {"embed_dim": 8, "max_seq_length": 16, "batch_size": 4, "max_steps": 6}
    places = {"results_dir": str(tmp_path), "data_dir": str(small_data_dir)}
    plans = [make_plan(sweep_of({"base": entries, "grid": {"coupler": ["mean"]}, "seeds": 2}, "study"),
                       places, Identifier(), None)
             for entries in (base, {**base, "track": "tensorboard"})]  # fmt: skip
    without, with_it = ([(run.run_id, run.arguments) for run in plan.runs] for plan in plans)
    assert [name for name, _ in with_it] == [name for name, _ in without]
    assert all("--track=tensorboard" in arguments for _, arguments in with_it)
