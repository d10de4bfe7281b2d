"""The speed pass holds a second copy of the model: where that does not fit, the run keeps its result."""

from __future__ import annotations

import json

import torch

from bench import session
from bench.run import main


def test_a_speed_pass_that_runs_out_of_memory_costs_the_run_nothing_else(tiny, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(session, "measure_speed", full)
    assert main(["--coupler", "mean", *tiny]) == 0
    [path] = (tmp_path / "results").glob("*/*/record.json")
    record = json.loads(path.read_text())
    assert record["status"] == "ok"
    assert record["quality"]["validation"]["tokens"] > 0
    for quantity in ("speed", "memory"):
        assert record[quantity]["value"] is None
        assert "ran out of memory" in record[quantity]["reason"]
    assert "speed and memory are not measured" in capsys.readouterr().out


def test_any_other_failure_of_the_speed_pass_is_one_of_the_run(tiny, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(session, "measure_speed", broken)
    assert main(["--coupler", "mean", *tiny]) == 1
    [path] = (tmp_path / "results").glob("*/*/record.json")
    assert json.loads(path.read_text())["status"] == "crashed"
