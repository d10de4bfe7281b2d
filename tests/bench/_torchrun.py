"""Runs under torchrun, as a user starts them, and what can happen to them on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 90.0


class Torchrun:
    """``torchrun --standalone --nproc-per-node=N -m bench.run FLAGS``, with its results in ``results``."""

    def __init__(self, flags: list[str], results: Path, ranks: int = 2) -> None:
        self.results = results
        launch = f"-m torch.distributed.run --standalone --nproc-per-node={ranks} -m bench.run".split()
        environment = {
            **{key: value for key, value in os.environ.items() if key != "GNNMOE_DATA_DIR"},
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "80",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, *launch, *flags, "--results-dir", str(results)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        for child in self._children():
            if f"\0RANK={number}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
                return child
        raise LookupError(f"no rank {number}")

    def _children(self) -> list[int]:
        agent = self.process.pid
        return [int(child) for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]

    def _kill(self) -> None:
        if self.process.poll() is None:
            for child in self._children():
                os.kill(child, signal.SIGKILL)
            self.process.kill()

    def when_it_has(self, steps: int, action: Callable[[Torchrun], object]) -> Torchrun:
        """Do ``action`` as soon as the history has so many rows."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            found = list(self.results.glob("*/*/history.jsonl"))
            if found and len(found[0].read_text().splitlines()) >= steps:
                action(self)
                return self
            time.sleep(0.005)
        self._kill()
        raise AssertionError(f"no {steps} steps: {self.process.communicate()}")

    def ended(self) -> tuple[int, str, str]:
        """Return exit status, stdout and stderr at its end, which has to come."""
        try:
            stdout, stderr = self.process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            self._kill()
        return self.process.returncode, stdout, stderr

    @property
    def folder(self) -> Path:
        """The run's folder, the only one there is."""
        (path,) = self.results.glob("*/*/record.json")
        return path.parent

    @property
    def record(self) -> dict[str, Any]:
        """The run's record."""
        return json.loads((self.folder / "record.json").read_text())

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the run's history."""
        return [json.loads(line) for line in (self.folder / "history.jsonl").read_text().splitlines()]
