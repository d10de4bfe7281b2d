"""A real sweep over two processes a run: a rank is killed, and the sweep called again completes its run."""

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
    "--sweep coupler=mean,gate embed_dim=8 num_layers=1 max_seq_length=16 batch_size=4 max_steps=250 "
    "eval_every=250 num_eval_samples=4 speed_steps=2 speed_warmup_steps=1 --devices-per-run 2 --slots 1"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "error"),
    [("RANK=1", "rank 1 died"), ("torch.distributed.run", "killed by signal 9")],
    ids=["a rank", "torchrun"],
)
def test_what_is_killed_crashes_its_run_and_the_next_call_completes_it(
    tmp_path, small_data_dir, killed, error
):
    results = tmp_path / "results"
    places = ["--results-dir", str(results), "--data-dir", str(small_data_dir)]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80"}

    def sweep(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.sweep", *SWEEP, *places, *more],
            env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    first = sweep()
    wait_until(lambda: any(path.read_text() for path in results.glob("*/*/history.jsonl")), 90)
    name = "environ" if killed == "RANK=1" else "cmdline"
    found = [process for process in processes_with(str(results))
             if killed in Path(f"/proc/{process}/{name}").read_text().split("\0")]  # fmt: skip
    os.kill(found[0], signal.SIGKILL)
    shown, _ = first.communicate(timeout=180)
    assert first.returncode == 1, shown
    records = {record["status"]: record for record in records_in(results)}
    assert set(records) == {"crashed", "ok"}, "the sweep went on"
    assert records["crashed"]["error"].startswith(error)
    crashed = records["crashed"]["run_id"]
    assert not processes_with(str(results)), "nothing is left over"

    second = sweep("--retry", "failed")
    shown, _ = second.communicate(timeout=180)
    assert second.returncode == 0, shown
    after = {record["run_id"]: record for record in records_in(results)}
    assert {record["status"] for record in after.values()} == {"ok"}
    assert {record["used"]["world_size"] for record in after.values()} == {2}
    assert after[crashed]["used"]["steps"] == 250
    assert after[records["ok"]["run_id"]] == records["ok"], "what was done is not done again"


def records_in(results: Path) -> list[dict]:
    """Return the records of the runs, not of those that were set aside."""
    found = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(results.glob("*/*/record.json"))
    }
    return [record for name, record in found.items() if record["run_id"] == name]
