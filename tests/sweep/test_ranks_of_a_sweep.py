"""A real sweep over two processes a run: what is killed crashes its run, and the next call completes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweep.test_local import processes_with, wait_until

REPOSITORY = Path(__file__).parents[2]
SWEEP = (
    "--sweep coupler=mean,gate embed_dim=8 num_layers=1 max_seq_length=16 batch_size=4 max_steps=120 "
    "eval_every=120 num_eval_samples=4 speed_steps=2 speed_warmup_steps=1 --devices-per-run 2 --slots 1"
).split()
KILLED = {"RANK=1": "rank 1 died", "torch.distributed.run": "killed by signal 9"}


@pytest.mark.slow
def test_what_is_killed_crashes_its_run_and_the_next_call_completes_it(tmp_path, small_data_dir):
    """A rank of the first run is killed, then torchrun itself of the second: the sweep went on between."""
    results = tmp_path / "results"
    places = ["--results-dir", str(results), "--data-dir", str(small_data_dir)]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}

    def sweep(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.sweep", *SWEEP, *places, *more],
            env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    first = sweep()
    for begun, name in enumerate(KILLED):
        wait_until(lambda begun=begun: len(histories_in(results)) > begun, 90)
        source = "environ" if name == "RANK=1" else "cmdline"
        found = [process for process in processes_with(str(results))
                 if name in Path(f"/proc/{process}/{source}").read_text().split("\0")]  # fmt: skip
        os.kill(found[0], signal.SIGKILL)
    shown, _ = first.communicate(timeout=180)
    assert first.returncode == 1, shown
    records = sorted(records_in(results), key=lambda record: record["time"]["start"])
    for record, error in zip(records, KILLED.values(), strict=True):
        assert record["status"] == "crashed"
        assert record["error"].startswith(error)
        assert record["time"]["end"] is not None
    assert records[0]["used"]["steps"] > 0
    assert not processes_with(str(results)), "nothing is left over"

    second = sweep("--retry", "failed")
    shown, _ = second.communicate(timeout=180)
    assert second.returncode == 0, shown
    for record in records_in(results):
        assert (record["status"], record["used"]["world_size"], record["used"]["steps"]) == ("ok", 2, 120)


def histories_in(results: Path) -> list[Path]:
    """Return the histories that have begun."""
    return [path for path in results.glob("*/*/history.jsonl") if path.read_text()]


def records_in(results: Path) -> list[dict]:
    """Return the records of the runs, not of those that were set aside."""
    found = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/*/record.json"))
    }
    return [record for name, record in found.items() if record["run_id"] == name]
