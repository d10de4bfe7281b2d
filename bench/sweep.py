"""``python -m bench.sweep FILE.toml``: many runs, isolated and resumable, paired by seed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import Count, Place, Texts, as_flags, flags
from bench.sweeps.cluster import resources_for
from bench.sweeps.durations import seconds_of
from bench.sweeps.executor import Resources
from bench.sweeps.executors import LOCAL, check_name, make_executor, with_options
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from bench.sweeps.hypotheses import Hypothesis
    from bench.sweeps.matching import Match
    from bench.sweeps.plan import Plan
    from bench.sweeps.spec import Sweep

PROG = "python -m bench.sweep"


@flags
class SweepConfig:
    """Run every configuration of a sweep file, or of --sweep, with every seed.

    Finished runs are skipped and interrupted ones continued, so the same command goes on where it was
    stopped. Exit status: 0 all ok, 1 a run failed, 2 wrong input, 130 stopped.
    """

    file: Annotated[Place | None, tyro.conf.Positional] = None
    """The sweep file (TOML)."""
    sweep: Texts = ()
    """In place of a file: flags and their values, such as coupler=GNN,HGNN num_experts=2,4,8."""
    seeds: Count | None = None
    """Seeds 0, 1, … (this many; default: the file's, or 1)."""
    match: str | None = None
    """Make all models equal: "params HGNN", "flops mean", and so on with memory (of a training step,
    predicted) and time (measured in turn, here), solves for the width of the experts."""
    dry_run: bool = False
    """Print the plan and do nothing."""
    plan: bool = False
    """As --dry-run, with the peak memory and the time that each configuration is expected to take here:
    a few seconds a configuration."""
    retry: Literal["failed", "oom", "all"] | None = None
    """Run again what failed (crashed, diverged, timeout, check_failed), what ran out of memory, or both."""
    force: bool = False
    """Run everything again; earlier records are kept as run_id.1."""
    keep_stale: bool = False
    """Keep runs that other code made, and continue interrupted ones, instead of running them again."""
    fail_fast: bool = False
    """Stop at the first run that fails."""
    wait: bool = False
    """Wait for another sweep of the same study instead of leaving."""
    time_budget: str | None = None
    """Start no run that is not expected to end in this time: 90s, 9m, 1.5h."""
    run_timeout: str | None = None
    """End a run that takes longer: 90s, 9m, 1.5h."""
    slots: Count | None = None
    """Runs side by side (default: one a GPU; on a CPU one a core, each with one thread; on a Ray cluster as
    many as it has room for; on Slurm 64 in the queue)."""
    executor: str = "local"
    """Where runs run: local (this machine), ray or slurm. A cluster must see this folder, the Python and
    the results under the same paths."""
    devices_per_run: Count = 1
    """Devices that each run is spread over by torchrun: GPUs with cuda, else processes on the CPU."""
    cpus_per_run: Count | None = None
    """On a cluster: cores of a run, shared by its devices as threads (default: 1 a device; 4 a GPU)."""
    results_dir: Place = Path("results")
    """Folder of all results."""
    study: str | None = None
    """Runs that belong together (default: the file's name)."""
    data_dir: Place | None = None
    """Folder of the text (default: the environment variable GNNMOE_DATA_DIR)."""
    data_source: Literal["auto", "folder", "hub", "embedded"] = "auto"
    """As for bench.run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """As for bench.run; on a cluster cpu (auto) or cuda, whatever this machine has."""


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and run what the flags ask for; return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(with_options(SweepConfig), arguments, prog=PROG)
    show_warnings_plainly()
    from rich.console import Console

    from bench.sweeps.dry_run import show_expected, show_plan

    console = Console(highlight=False)
    try:
        budget, timeout = (
            seconds_of("time_budget", config.time_budget),
            seconds_of("run_timeout", config.run_timeout),
        )
        config, resources = on_its_devices(config)
        sweep = read_sweep(config)
        with console.status("planning …"):
            plan, match, hypotheses = plan_sweep(config, sweep)
        if config.dry_run or config.plan:
            show_plan(plan, match, console, config.keep_stale)
            if config.plan:
                show_expected(plan, console)
            return 0
        command = shlex.join([*PROG.split(), *arguments])
        return run_plan(config, plan, hypotheses, resources, budget, timeout, command)
    except Refused as error:
        fail(str(error))


def read_sweep(config: SweepConfig) -> Sweep:
    """Return the sweep of the file or of the line of shell.

    Raises:
        Refused: neither or both are given, or something is wrong in it.
    """
    from bench.sweeps.shorthand import parse_shorthand
    from bench.sweeps.spec import load_sweep

    if (config.file is None) == (not config.sweep):
        raise Refused(f"give a sweep file or --sweep, and not both: {PROG} sweeps/couplers.toml")
    if config.file is None:
        sweep = parse_shorthand(config.sweep, seeds=config.seeds or 1, study=config.study or "sweep")
    else:
        sweep = load_sweep(config.file, seeds=config.seeds)
    return replace(sweep, study=config.study or sweep.study)


def plan_sweep(config: SweepConfig, sweep: Sweep) -> tuple[Plan, Match | None, list[Hypothesis]]:
    """Return the plan and its hypotheses; those that its runs cannot answer are refused, before any run.

    Raises:
        Refused: a run cannot be, or a hypothesis is wrong.
    """
    import torch

    from bench.run.identity import Identifier
    from bench.sweeps.hypotheses import check_against, hypotheses_of
    from bench.sweeps.matching import Match
    from bench.sweeps.plan import make_plan

    asked = config.match or sweep.match
    match = None if asked is None else Match.parse(asked)
    refuse_what_is_measured_here(config, match)
    device = None if config.executor == LOCAL else torch.device(config.device)
    identify = Identifier(device, config.devices_per_run)
    plan = make_plan(sweep, places_of(config), identify, match, device)
    hypotheses = hypotheses_of(sweep.hypotheses, Path() if config.file is None else config.file.parent)
    check_against(hypotheses, [found.flags for found in plan.configurations])
    return plan, match, hypotheses


def run_plan(
    config: SweepConfig,
    plan: Plan,
    hypotheses: Sequence[Hypothesis],
    resources: Resources,
    budget: float | None,
    timeout: float | None,
    command: str,
) -> int:
    """State the hypotheses, run what is left of the plan and return the exit status.

    Raises:
        Refused: another sweep is at the study, the results cannot be written, or the executor's
            package or its cluster is missing.
    """
    from bench.device import resolve_device
    from bench.sweeps.executor import Choices, Wanted
    from bench.sweeps.hypotheses import state
    from bench.sweeps.work import execute

    device = resolve_device(config.device).type if config.executor == LOCAL else config.device
    logs = config.results_dir / plan.study / ".logs"
    wanted = Wanted(device=device, logs=logs, slots=config.slots, resources=resources)
    places = places_of(config)
    own = {name: places[name] for name in ("data_dir", "data_source", "device") if name in places}
    own["reuse_check"] = not config.force  # the leak check once a configuration, not once a seed
    own |= {"keep_stale": True} if config.keep_stale else {}
    result = execute(
        plan.runs, make_executor(config.executor, config, wanted), results_dir=config.results_dir,
        study=plan.study, places=as_flags(own), wait=config.wait, again=command,
        processes=resources.processes, before=lambda: state(hypotheses, config.results_dir / plan.study),
        choices=Choices(
            retry=frozenset([config.retry] if config.retry else ()), force=config.force,
            keep_stale=config.keep_stale,
            fail_fast=config.fail_fast, time_budget_seconds=budget, run_timeout_seconds=timeout,
        ),
    )  # fmt: skip
    return result.exit_status


def on_its_devices(config: SweepConfig) -> tuple[SweepConfig, Resources]:
    """Return the config with the type of device that runs have on a cluster, and what each run asks for.

    Raises:
        Refused: there is no such executor, or these resources are not for it.
    """
    check_name(config.executor)
    devices = config.devices_per_run
    if config.executor == LOCAL:
        if config.cpus_per_run is not None:
            raise Refused("cpus_per_run is for a cluster; here, --slots says how many run.")
        return config, Resources(cpus=devices, processes=devices)
    if config.device == "mps":
        raise Refused("device mps is of this machine; on a cluster it must be cpu or cuda.")
    device: Literal["cpu", "cuda"] = "cuda" if config.device == "cuda" else "cpu"
    return replace(config, device=device), resources_for(device, devices, config.cpus_per_run)


def refuse_what_is_measured_here(config: SweepConfig, match: Match | None) -> None:
    """Refuse what one device of this machine answers, where runs have others.

    Raises:
        Refused: saying which flag.
    """
    if config.executor == LOCAL and config.devices_per_run == 1:
        return
    asked = ["--plan"] if config.plan else []
    if match is not None and match.quantity in ("memory", "time"):
        asked.append(f"--match {match.quantity}")
    if asked:
        where = f"on {config.executor}" if config.devices_per_run == 1 else "over several devices"
        raise Refused(f"{asked[-1]} asks one device of this machine, and runs are {where}; leave it out.")


def places_of(config: SweepConfig) -> dict[str, Any]:
    """Return the places of every run, as plain flags."""
    places: dict[str, Any] = {"results_dir": str(config.results_dir), "device": config.device,
                              "data_source": config.data_source}  # fmt: skip
    return places if config.data_dir is None else {**places, "data_dir": str(config.data_dir)}


if __name__ == "__main__":
    sys.exit(main())
