"""``python -m bench.sweep FILE.toml``: train many configurations, paired by seed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.cli import fail, launched, parse, show_warnings_plainly
from bench.config import as_flags
from bench.files import check_writable
from bench.help import Help
from bench.interruption import interruptible
from bench.screen import guard_screen
from bench.sweep.executors.base import (
    LOCAL,
    Resources,
    Wanted,
    check_name,
    make_executor,
    resources_for,
    with_options,
)
from bench.sweep.specification import Sweep, SweepConfig, load_sweep, parse_shorthand
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from bench.study.hypotheses import Hypothesis
    from bench.sweep.plan import Match, Plan

PROG = "python -m bench.sweep"
ABOUT = Help(
    usual="file sweep seeds match dry_run plan retry force time_budget slots study data_dir".split(),
    examples=(
        "sweeps/small.toml --dry-run",
        "--sweep coupler=mean,gate,HGNN --seeds 3 --study first",
    ),
)


@interruptible("finished runs are kept; the same command continues.")
def main(argv: Sequence[str] | None = None) -> int:
    """Plan and run what the flags ask for; return the exit status."""
    guard_screen()
    arguments = list(sys.argv[1:] if argv is None else argv)
    config = parse(with_options(SweepConfig), arguments, prog=PROG, about=ABOUT)
    show_warnings_plainly()
    from rich.console import Console

    from bench.sweep.plan import show_expected, show_plan, warn_of_few_seeds

    console = Console(highlight=False)
    try:
        refuse_ranks()
        config, resources = on_its_devices(config)
        sweep = read_sweep(config)
        config = replace(config, study=sweep.study)
        with console.status("planning …"):
            plan, match, hypotheses = plan_sweep(config, sweep)
        warn_of_few_seeds(plan, hypotheses, console)
        if config.dry_run or config.plan:
            show_plan(plan, match, console, config.keep_stale)
            if config.plan:
                show_expected(plan, console)
            return 0
        command = shlex.join([*PROG.split(), *arguments])
        return run_plan(config, plan, hypotheses, resources, command)
    except Refused as error:
        fail(str(error))


def refuse_ranks() -> None:
    """Refuse to be one process of several: the runs of a sweep would take themselves for its ranks.

    Raises:
        Refused: ``WORLD_SIZE`` is more than 1.
    """
    found = launched()
    if found is not None:
        raise Refused(
            f"WORLD_SIZE is {found[0]} in the environment, but a sweep starts the processes of its runs "
            "itself; unset WORLD_SIZE, and give --devices-per-run."
        )


def read_sweep(config: SweepConfig) -> Sweep:
    """Return the sweep of the file or of the line of shell.

    Raises:
        Refused: neither or both are given, or the sweep is wrong.
    """
    if (config.file is None) == (not config.sweep):
        given = "both a file and --sweep are given" if config.sweep else "neither a file nor --sweep is given"
        raise Refused(f"{given}; give one of them: {PROG} sweeps/first.toml")
    if config.file is None:
        sweep = parse_shorthand(config.sweep, seeds=config.seeds or 1, study=config.study or "sweep")
    else:
        sweep = load_sweep(config.file, seeds=config.seeds)
    return replace(sweep, study=config.study or sweep.study)


def plan_sweep(config: SweepConfig, sweep: Sweep) -> tuple[Plan, Match | None, list[Hypothesis]]:
    """Return the plan and its hypotheses; a hypothesis that its runs cannot answer is refused.

    Raises:
        Refused: a run cannot be, its folder cannot be written, or a hypothesis is wrong.
    """
    import torch

    from bench.run.prepare import Identifier
    from bench.study.hypotheses import check_against, hypotheses_of
    from bench.sweep.plan import Match, make_plan

    check_writable(config.results_dir / sweep.study)
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
    command: str,
) -> int:
    """State the hypotheses, run what is left of the plan and return the exit status.

    Raises:
        Refused: another sweep works on the study, the results cannot be written, or the executor's
            package or its cluster is missing.
    """
    from bench.device import resolve_device
    from bench.study.hypotheses import state
    from bench.sweep.work import execute

    device = resolve_device(config.device).type if config.executor == LOCAL else config.device
    logs = config.results_dir / plan.study / ".logs"
    wanted = Wanted(device=device, logs=logs, slots=config.slots, resources=resources)
    places = places_of(config)
    own = {name: places[name] for name in ("data_dir", "data_source", "device") if name in places}
    own["reuse_check"] = not config.force  # the leak check once per configuration, not once per seed
    own |= {"keep_stale": True} if config.keep_stale else {}
    result = execute(
        plan.runs,
        make_executor(config.executor, config, wanted),
        config,
        places=as_flags(own),
        again=command,
        processes=resources.processes,
        before=lambda: state(hypotheses, config.results_dir / plan.study),
    )
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
    """Refuse a question to one device of this machine, where the runs have other devices.

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
    places: dict[str, Any] = {"results_dir": str(config.results_dir)}
    places |= {"device": config.device, "data_source": config.data_source}
    return places if config.data_dir is None else {**places, "data_dir": str(config.data_dir)}


if __name__ == "__main__":
    sys.exit(main())
