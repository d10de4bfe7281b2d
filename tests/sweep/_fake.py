"""Planned runs whose children are small scripts: each behaves as its label says, without a model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.sweep.executors.base import Executor
from bench.sweep.executors.local import LocalExecutor
from bench.sweep.outcome import SweepResult
from bench.sweep.plan import PlannedRun
from bench.sweep.specification import SweepConfig
from bench.sweep.work import execute
from tests._records import ENVIRONMENT, NO_TEST, SCORED, made_record, record_json

MADE = made_record()
KNOWN = {"configuration": MADE.configuration, "config": MADE.config, "data": MADE.data}

CHILD = """
import json, os, signal, sys, time
template, calls, folder, behaviour, *flags = sys.argv[1:]
with open(calls, "a") as file:
    file.write(" ".join([os.path.basename(folder), *flags]) + "\\n")
def write(status, error=None):
    record = json.load(open(template))
    record.update(status=status, error=error, run_id=os.path.basename(folder))
    if status == "ok":
        record["quality"] = json.load(open(template + ".quality"))
        record["time"]["seconds"]["total"] = 0.25
    with open(folder + "/record.new", "w") as file:
        json.dump(record, file)
    os.rename(folder + "/record.new", folder + "/record.json")
def begin():
    if "--force" in flags and os.path.exists(folder):
        os.rename(folder, folder + ".1")
    os.makedirs(folder, exist_ok=True)
    open(folder + "/log.txt", "w").close()
    write("interrupted")
def ended(*_):
    write("interrupted", "stopped from outside")
    sys.exit(130)
def resting(seconds):
    signal.signal(signal.SIGTERM, ended)
    begin()
    time.sleep(seconds)
if behaviour == "ok":
    print("a line of output"); begin(); write("ok")
elif behaviour in ("diverged", "check_failed", "oom", "crashed"):
    begin(); write(behaviour, "as it was told"); sys.exit(1)
elif behaviour == "endless":
    resting(60)
elif behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN); begin(); time.sleep(60)
elif behaviour == "dies":
    print("last words"); begin(); os.kill(os.getpid(), signal.SIGKILL)
elif behaviour == "dies before its record":
    print("last words"); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)
elif behaviour == "is ended by others":
    begin(); os.kill(os.getpid(), signal.SIGTERM)
elif behaviour == "runs out of memory":
    begin(); sys.exit("Traceback (most recent call last):\\ntorch.OutOfMemoryError: CUDA out of memory.")
elif behaviour == "raises":
    begin(); print("\\n".join(f"line {n}" for n in range(50))); sys.exit("KeyError: 'x'\\nrecord: /a/path")
elif behaviour == "fills the disk":
    begin(); write("interrupted", "checkpoint.pt cannot be written: No space left on device. …"); sys.exit(74)
elif behaviour == "finds a full disk":
    print("error: the results folder x cannot be written (No space left on device); …"); sys.exit(2)
elif behaviour == "leaves nothing":
    pass
elif behaviour == "refused" or (behaviour == "needs a checkpoint" and "--resume" in flags):
    print("error: this cannot\\nbe run."); sys.exit(2)
elif behaviour == "finds it busy once" and not os.path.exists(calls + ".busy"):
    open(calls + ".busy", "w").close()
    print("error: another process is at run x; wait for it."); sys.exit(2)
elif behaviour in ("needs a checkpoint", "finds it busy once"):
    begin(); write("ok")
else:
    raise SystemExit("no such behaviour")
"""


class Study:
    """A study's folder in ``tmp_path``, and sweeps of scripts in it."""

    def __init__(self, tmp_path: Path) -> None:
        self.results, self.name = tmp_path / "results", "study"
        self.folder = self.results / self.name
        self.calls_file, self.output = tmp_path / "calls.txt", io.StringIO()
        self.template = tmp_path / "template.json"
        quality = {"validation": SCORED, "test": NO_TEST, "best_step": 1}
        Path(f"{self.template}.quality").write_text(json.dumps(quality))
        elsewhere = ENVIRONMENT | {"cpu_cores": 0}
        self.template.write_text(json.dumps(record_json(study=self.name, environment=elsewhere)))

    def runs(self, *behaviours: str, cost: float | None = None) -> list[PlannedRun]:
        return [
            PlannedRun(
                f"run{number}",
                behaviour,
                (),
                self.folder / f"run{number}",
                cost,
                known=KNOWN | {"seed": number},
            )
            for number, behaviour in enumerate(behaviours)
        ]

    def command(self, run: PlannedRun) -> list[str]:
        script = [sys.executable, "-S", "-E", "-u", "-c", CHILD, str(self.template), str(self.calls_file)]
        return [*script, str(run.folder), run.label]

    def sweep(
        self,
        runs: Sequence[PlannedRun],
        slots: int = 1,
        grace: float = 60.0,
        wait: bool = False,
        command: Callable[[PlannedRun], Sequence[str]] | None = None,
        before: Callable[[], object] = lambda: None,
        executor: Executor | None = None,
        **flags: Any,
    ) -> SweepResult:
        executor = executor or LocalExecutor([{}] * slots, grace)
        config = SweepConfig(results_dir=self.results, study=self.name, wait=wait, **flags)
        console = Console(file=self.output, width=80, highlight=False)
        return execute(
            runs, executor, config, command=command or self.command, before=before, console=console
        )

    def calls(self) -> list[str]:
        """Return what was started since the last call: run_id and flags."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines

    def record(self, run_id: str = "run0") -> dict[str, Any]:
        return json.loads((self.folder / run_id / "record.json").read_text())

    def put(self, status: str, run_id: str = "run0", **changes: Any) -> None:
        """Leave a record, as an earlier sweep would have."""
        folder = self.folder / run_id
        folder.mkdir(parents=True, exist_ok=True)
        record = {**json.loads(self.template.read_text()), "run_id": run_id, "status": status, **changes}
        (folder / "record.json").write_text(json.dumps(record))
        (folder / "log.txt").touch()
