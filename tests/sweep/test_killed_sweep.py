"""Sweeps of real runs: one finishes, and others are killed and then completed."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench.cli import parse
from bench.config import RunConfig
from bench.run.__main__ import main as run_main
from bench.run.prepare import prepare
from bench.sweep.__main__ import main as sweep_main
from bench.sweep.executors.local import LocalExecutor, slots_for
from bench.sweep.outcome import SweepResult
from bench.sweep.plan import PlannedRun
from bench.sweep.specification import SweepConfig
from bench.sweep.work import execute
from tests._records import without_diagnostic_times
from tests.bench.conftest import TINY
from tests.sweep.test_local import processes_with, wait_until

REPOSITORY = Path(__file__).parents[2]
FLAGS = [*TINY, "--max-steps", "60", "--eval-every", "20", "--dropout-rate", "0.1", "--no-plots"]
MAY_DIFFER = {"time", "speed", "memory", "check", "command", "config", "environment", "study"}
SWEEP = """
import pickle, sys
from pathlib import Path
from bench.sweep.executors.local import LocalExecutor, slots_for
from bench.sweep.specification import SweepConfig
from bench.sweep.work import execute
runs, results, data = pickle.loads(Path(sys.argv[1]).read_bytes())
places = ["--data-dir", data]
config = SweepConfig(results_dir=results, study="s")
result = execute(runs, LocalExecutor(slots_for("cpu", 2)), config, places=places)
sys.exit(result.exit_status)
"""


def planned(results: Path, data_dir: Path, *configurations: str) -> list[PlannedRun]:
    """Return the runs of these flags, as a plan would."""
    runs = []
    for flags in configurations:
        own = [*FLAGS, *flags.split()]
        places = ["--data-dir", str(data_dir), "--results-dir", str(results)]
        run_id = prepare(parse(RunConfig, [*own, *places], presets=True)).run_id
        runs.append(PlannedRun(run_id, flags, tuple(own), results / "s" / run_id))
    return runs


def start_sweep(tmp_path: Path, runs: list[PlannedRun], data_dir: Path) -> subprocess.Popen[bytes]:
    results = runs[0].folder.parent.parent
    plan = tmp_path / f"{results.name}.pickle"
    plan.write_bytes(pickle.dumps((runs, results, str(data_dir))))
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / f"{results.name}.out").open("ab") as output:
        return subprocess.Popen([sys.executable, "-c", SWEEP, str(plan)], env=variables, stdout=output)


def sweep_here(tmp_path: Path, runs: list[PlannedRun], data_dir: Path) -> SweepResult:
    config = SweepConfig(results_dir=runs[0].folder.parents[1], study="s")
    with (tmp_path / "output").open("w") as output:
        return execute(
            runs, LocalExecutor(slots_for("cpu", 2)), config,
            places=["--data-dir", str(data_dir)], console=Console(file=output, width=80),
        )  # fmt: skip


@pytest.mark.slow
def test_a_real_run(tmp_path, small_data_dir, monkeypatch):
    """The child has one thread whatever the sweep has."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (run,) = planned(tmp_path / "results", small_data_dir, "--coupler mean --max-steps 4")
    result = sweep_here(tmp_path, [run], small_data_dir)
    assert result.counts == {"ok": 1}
    record = json.loads((run.folder / "record.json").read_text())
    assert record["environment"]["threads"] == 1
    assert result.outcomes[run.run_id].loss_nats is not None
    assert result.outcomes[run.run_id].seconds == record["time"]["seconds"]["total"]


@pytest.mark.slow
@pytest.mark.core("sweep")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells children of a death")
def test_killed_at_random_points_and_completed_equals_an_undisturbed_sweep(tmp_path, small_data_dir):
    """Three runs: the sweep is killed in the first ones, then at any time; the third call completes them."""
    configurations = ["--coupler GNN", "--coupler mean", "--coupler GNN --seed 1"]
    undisturbed = planned(tmp_path / "undisturbed", small_data_dir, *configurations)
    for run in undisturbed:
        places = ["--data-dir", str(small_data_dir), "--results-dir", str(tmp_path / "undisturbed")]
        assert run_main([*run.arguments, *places, "--study", "s", "--quiet"]) == 0
    runs = planned(tmp_path / "killed", small_data_dir, *configurations)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    print(f"seed of the kills: {seed}")  # pytest shows it where the test fails
    for steps in (chance.randint(1, 40), None):
        sweep = start_sweep(tmp_path, runs, small_data_dir)
        if steps is None:
            time.sleep(chance.uniform(0.5, 5.0))
        else:
            wait_until(lambda steps=steps: steps_begun(runs) >= steps, 60)
        sweep.send_signal(signal.SIGKILL)
        assert sweep.wait(20) == -signal.SIGKILL
    assert sweep_here(tmp_path, runs, small_data_dir).exit_status == 0
    wait_until(lambda: not processes_with(str(tmp_path / "killed")))
    records = [json.loads((run.folder / "record.json").read_text()) for run in runs]
    assert any(record["time"]["resumed_at_step"] for record in records)
    assert not any("--resume" in record["command"] for record in records), "the first part's"
    for ours, theirs in zip(runs, undisturbed, strict=True):
        assert_equal_but_for_times(ours.folder, theirs.folder)


def steps_begun(runs: list[PlannedRun]) -> int:
    """Return the steps that the furthest of the unfinished runs has in its history."""
    most = 0
    for run in runs:
        record, history = run.folder / "record.json", run.folder / "history.jsonl"
        if record.exists() and json.loads(record.read_text())["status"] == "interrupted":
            most = max(most, history.read_text().count('"train"'))
    return most


def assert_equal_but_for_times(folder: Path, expected: Path) -> None:
    ours, theirs = (
        without_diagnostic_times(json.loads((path / "record.json").read_text()))
        for path in (folder, expected)
    )
    assert ours["status"] == "ok"
    for key in set(theirs) - MAY_DIFFER:
        assert ours[key] == theirs[key], key
    for group in ("model", "data", "training", "measure"):
        assert ours["config"][group] == theirs["config"][group]
    assert (folder / "history.jsonl").read_text() == (expected / "history.jsonl").read_text()
    for name in ("nll.npz", "communication.npz", "experts.npz"):
        found, wanted = np.load(folder / name), np.load(expected / name)
        assert all(np.array_equal(found[key], wanted[key]) for key in wanted)


TWO_RANKS = (
    "--sweep coupler=mean embed_dim=8 num_layers=1 max_seq_length=16 batch_size=4 max_steps=60 eval_every=60 "
    "num_eval_samples=4 speed_steps=2 speed_warmup_steps=1 --devices-per-run 2 --slots 1 --retry failed"
).split()


@pytest.mark.slow
def test_what_is_killed_of_two_ranks_crashes_its_run_and_the_next_call_completes_it(
    tmp_path, small_data_dir, monkeypatch
):
    """First a rank is killed, then torchrun itself; the third call of the same sweep completes the run."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    sweep = [*TWO_RANKS, "--results-dir", str(tmp_path), "--data-dir", str(small_data_dir)]

    def kill(name: str, source: str) -> None:
        wait_until(lambda: training_in(tmp_path), 120)
        found = [process for process in processes_with(str(tmp_path))
                 if name in Path(f"/proc/{process}/{source}").read_text().split("\0")]  # fmt: skip
        os.kill(found[0], signal.SIGKILL)

    for name, source, error in (
        ("RANK=1", "environ", "rank 1 died"),
        ("torch.distributed.run", "cmdline", "killed by signal 9"),
    ):
        killer = threading.Thread(target=kill, args=(name, source))
        killer.start()
        assert sweep_main(sweep) == 1
        killer.join()
        record = record_in(tmp_path)
        assert record["status"] == "crashed"
        assert record["error"].startswith(error)
        assert record["time"]["end"] is not None
        assert not processes_with(str(tmp_path)), "nothing is left over"
    assert sweep_main(sweep) == 0
    record = record_in(tmp_path)
    assert (record["status"], record["used"]["world_size"], record["used"]["steps"]) == ("ok", 2, 60)


def training_in(results: Path) -> bool:
    """Say whether a run is training: an earlier one has another status, and its folder is set aside."""
    for path in results.glob("*/*/record.json"):
        with suppress(OSError):
            running = json.loads(path.read_text())["status"] == "interrupted"
            if running and (path.parent / "history.jsonl").read_text():
                return True
    return False


def record_in(results: Path) -> dict[str, Any]:
    """Return the record of the run, not those that were set aside."""
    (path,) = [path for path in results.glob("*/*/record.json") if "." not in path.parent.name]
    return json.loads(path.read_text())
