"""``python -m bench.speed``: time couplers and training steps beside their lower bounds."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import Count, ExecutionConfig, ModelConfig, Place, PlacesConfig, flags, seconds_of
from bench.files import NOT_WRITTEN, NotWritten, utc_now
from bench.help import Help
from bench.interruption import interruptible
from bench.screen import guard_screen
from gnnmoe.config import Refused, brief

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from bench.speed.suites import Job

PROG = "python -m bench.speed"
ABOUT = Help(
    usual=("coupler_type couplers sizes batch_size whole_steps suite time_budget device name table").split(),
    examples=(
        "--couplers mean,GNN,HGNN --sizes 'E=4;E=8'",
        "--suite all",
        "--table results/speed/RECORD",
    ),
)


def _default_model() -> ModelConfig:
    return ModelConfig(embed_dim=256)


@flags
class SpeedConfig:
    """Time couplers alone, in each of their forms, beside the least time that this machine allows.

    With --whole-steps: time whole training steps. With --suite: couplers, whole steps and the harness. All
    figures are kept in results_dir/speed/name. Exit status: 0 measured, 2 wrong input, 74 a file cannot be
    written.
    """

    model: ModelConfig = field(default_factory=_default_model)
    couplers: str | None = None
    """Several couplers in place of --coupler: names of couplers and of hypergraph layers (HNHN), separated by
    commas, or all."""
    sizes: str | None = None
    """Several sizes, such as E=4,D=256,B=32,L=128;E=8. Other flags give the letters that are missing."""
    batch_size: Count = 32
    """Sequences in the batch."""
    whole_steps: bool = False
    """Measure time and peak memory of whole training steps with these couplers, alternating, at each size."""
    rounds: Count = 5
    """Timed rounds of each form. A step of more than two seconds has one round."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: autocast, with expert outputs in bf16."""
    compile: bool = False
    """Also time the default form compiled. With --suite cpu: also a compiled whole step."""
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    """Mode of torch.compile."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA if it is available, else the CPU."""
    suite: Literal["all", "cpu", "gpu"] | None = None
    """cpu: couplers, whole steps and the harness on the CPU, in about four minutes. gpu: couplers and whole
    steps on CUDA. all: cpu, and gpu if CUDA is available."""
    time_budget: str | None = None
    """Skip measurements that would probably end later than this: 90s, 9m. The output lists them."""
    results_dir: Place = Path("results")
    """Folder of all results."""
    name: str | None = None
    """Name of the record (default: what was measured and the time)."""
    data_dir: Place | None = None
    """Folder of the text for the harness of --suite cpu, as for bench.run."""
    plot: bool = False
    """Draw the cost against E and N, if several were timed. A suite always draws. With --table: draw the
    record."""
    table: Annotated[tuple[Place, ...], Field(strict=False)] = ()
    """Measure nothing, and print the tables of these records (folders or files)."""
    page: Place | None = None
    """With --table: write the tables into this page, between its marks."""

    def __post_init__(self) -> None:
        seconds_of("time_budget", self.time_budget)
        if self.suite is not None:
            self._refuse_what_a_suite_decides()
        elif self.data_dir is not None:
            raise Refused("--data-dir is the text of --suite cpu; drop it, or add --suite cpu.")
        if self.page is not None and not self.table:
            raise Refused("--page writes the tables of --table RECORD; name a record.")
        if self.name is not None and (Path(self.name).name != self.name or self.name.startswith(".")):
            raise Refused(f"name is {brief(self.name)}; it must be a plain folder name.")
        self.execution()

    def _refuse_what_a_suite_decides(self) -> None:
        """Refuse flags that the suite decides itself."""
        decided = ["couplers", "sizes", "batch_size", "whole_steps", "rounds", "precision", "device"]
        decided += ["compile", "data_dir"] if self.suite == "gpu" else []
        defaults = {one.name: one.default for one in fields(self)}
        given = [name for name in decided if getattr(self, name) != defaults[name]]
        given += ["coupler and its options"] if self.model != _default_model() else []
        if given:
            raise Refused(
                f"--suite {self.suite} has its own {', '.join(given)}; drop your own values of them."
            )

    def execution(self) -> ExecutionConfig:
        """Return precision and compilation; raises Refused as everywhere else."""
        return ExecutionConfig(precision=self.precision, compile=self.compile, compile_mode=self.compile_mode)


@interruptible("a record that was begun keeps what was measured.")
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or print what was measured; return the exit status (2: wrong input)."""
    guard_screen()
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(SpeedConfig, arguments or ["--help"], prog=PROG, about=ABOUT)
    show_warnings_plainly()
    from rich.console import Console

    console = Console(highlight=False)
    command = shlex.join([*PROG.split(), *arguments])
    try:
        if config.table:
            from bench.speed.show import print_records

            print_records(config.table, console, draw=config.plot, page=config.page)
            return 0
        for what, jobs, device in _asked(config):
            _measure(what, jobs, device, config, command, console)
            if what == "cpu":
                _say_what_needs_a_gpu(console)
    except Refused as error:
        fail(str(error))
    except NotWritten as error:
        kept = "The record keeps what was written before; make room, and measure again under another --name."
        print(f"error: {error}.", *([] if config.table else [kept]), file=sys.stderr)
        return NOT_WRITTEN
    return 0


def _suites(asked: str | None) -> tuple[str, ...]:
    """Return the suites that ``--suite`` asks for; ``all`` means the suites that this machine can run."""
    import torch

    if asked == "all":
        return ("cpu", "gpu") if torch.cuda.is_available() else ("cpu",)
    return () if asked is None else (asked,)


def _say_what_needs_a_gpu(console: Console) -> None:
    """Name the jobs of the other suite if this machine cannot run them."""
    import torch

    from bench.speed.suites import gpu_jobs

    if not torch.cuda.is_available():
        names = dict.fromkeys(job.name.partition(":")[0] for job in gpu_jobs())
        console.print(
            f"not measured, because this machine has no CUDA device: {'; '.join(names)} (--suite gpu)",
            markup=False,
        )


def _asked(config: SpeedConfig) -> Iterator[tuple[str, list[Job], torch.device]]:
    """Yield what is to be measured: a name, its jobs, and the device.

    Raises:
        Refused: an unknown name, a wrong size, or a device that this machine does not have.
    """
    import torch

    from bench.device import resolve_device
    from bench.speed import suites as known
    from bench.training.step import Execution

    compile_mode = config.compile_mode if config.compile else None
    suites = _suites(config.suite)
    if not suites:
        execution = Execution(config.execution(), resolve_device(config.device))  # refuses what it cannot do
        jobs = known.form_jobs(
            config.model.resolved(known.VOCABULARY if config.whole_steps else 1),
            config.couplers,
            config.sizes,
            config.batch_size,
            config.precision,
            config.rounds,
            compile_mode,
            execution.device,
            whole_steps=config.whole_steps,
        )
        yield config.couplers or config.model.coupler_type, jobs, execution.device
    if "cpu" in suites:
        device = torch.device("cpu")
        Execution(config.execution(), device)
        yield "cpu", known.cpu_jobs(PlacesConfig(data_dir=config.data_dir), compile_mode), device
    if "gpu" in suites:
        if not torch.cuda.is_available():
            raise Refused("--suite gpu needs a CUDA device, and this machine has none; take --suite cpu.")
        yield "gpu", known.gpu_jobs(), torch.device("cuda")


def _measure(
    what: str, jobs: list[Job], device: torch.device, config: SpeedConfig, command: str, console: Console
) -> None:
    """Run jobs into a record, report progress, and show the results."""
    from rich.console import Console

    from bench.device import keep_freed_memory
    from bench.files import without_places
    from bench.speed.machine import Machine
    from bench.speed.record import SpeedRecord
    from bench.speed.show import one_line, show, write_plots_of
    from bench.speed.suites import run_jobs
    from bench.training.environment import code_hashes, describe_environment

    keep_freed_memory()  # as a run does
    progress = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    environment = describe_environment(device, code_hashes(config.model.resolved(1)))
    stamp = utc_now("-%Y%m%d-%H%M%S")
    name = config.name or re.sub(r"[^\w.-]+", "-", what).lstrip(".-") + stamp
    about = {"what": what, "command": without_places(command), "environment": environment.model_dump()}
    record = SpeedRecord(config.results_dir, name, about)
    record.begin()
    status = "stopped"
    try:
        run_jobs(
            jobs,
            Machine(device),
            record,
            budget=seconds_of("time_budget", config.time_budget),
            on_job=lambda job: progress.print(f"{job} …"),
            on_row=lambda row: progress.print(f"  {one_line(row)}"),
        )
        status = "ok"
    finally:  # after a Ctrl-C and on a full disk too
        try:
            record.end(status)
        finally:
            show(record.data, record.rows, console)
            console.print(f"record: {record.path}", markup=False, soft_wrap=True)
        if config.plot or what in ("cpu", "gpu"):
            write_plots_of(record.path, record.data, record.rows, console)


if __name__ == "__main__":
    sys.exit(main())
