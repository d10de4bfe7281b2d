"""What tests of runs share: where a run is, what it refused, how it is stopped, what a trainer tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench.training.loop
from bench.measure.ledger import Ledger
from bench.run.__main__ import main


def results_of(flags: list[str]) -> Path:
    """Return the folder of the last ``--results-dir``."""
    return Path(flags[len(flags) - flags[::-1].index("--results-dir")])


def only_run(results: Path) -> tuple[Path, dict[str, Any]]:
    """Return the one run folder that was not set aside, and its record."""
    (path,) = (path for path in results.glob("*/*/record.json") if "." not in path.parent.name)
    return path.parent, json.loads(path.read_text())


def only_folder(results: Path) -> Path:
    return only_run(results)[0]


def refusal(capsys, flags: list[str], command: Callable[..., object] = main) -> str:
    """Return the one message with which ``command`` refuses ``flags``, without its line breaks."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command(flags)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


def act_at_step(monkeypatch, step: int, action: Callable[[], object]) -> list[Any]:
    """Do ``action`` inside the given training step, once; return the micro-batch size of each step."""
    real, steps = bench.training.loop.training_step, []

    def acting(*arguments):
        steps.append(arguments[4])
        if len(steps) == step:
            action()
        return real(*arguments)

    monkeypatch.setattr(bench.training.loop, "training_step", acting)
    return steps


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


class Rows(list[dict[str, Any]]):
    """Hooks of a trainer that count with a ledger and keep the rows of the history."""

    def __init__(self, **ledger: Any) -> None:
        super().__init__()
        self.ledger, self.decisions, self.after = Ledger(**ledger), [], lambda: None
        self.on_epoch, self.on_batch = self.ledger.begin_epoch, self.ledger.batch
        self.on_update, self.after_epoch = self.ledger.update, self.ledger.end_epoch

    def on_step(self, row: dict[str, Any]) -> None:
        self.append(row)

    def on_evaluation(self, row: dict[str, Any]) -> None:
        self.append(row)

    def after_step(self) -> None:
        self.after()
