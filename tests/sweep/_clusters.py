"""A real Ray cluster and a real one-node Slurm, each started for the tests and ended with them."""

from __future__ import annotations

import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bench.conftest import TINY
from tests.conftest import REPOSITORY
from tests.sweep.test_local import wait_until

REQUIRED = os.environ.get("REQUIRE_OPTIONAL", "").split(",")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "srun", "scontrol")


def _needs(name: str, missing: list[str]) -> pytest.MarkDecorator:
    """Skip where something is missing, unless REQUIRE_OPTIONAL names it."""
    return pytest.mark.skipif(
        bool(missing) and name not in REQUIRED, reason=f"not installed: {', '.join(missing)}"
    )


needs_ray = _needs("ray", [name for name in ("ray",) if importlib.util.find_spec(name) is None])
needs_submitit = _needs("submitit", [n for n in ("submitit",) if importlib.util.find_spec(n) is None])
needs_slurm = _needs("slurm", [n for n in PROGRAMS if shutil.which(n) is None])

SLURM_CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Start a cluster of two workers, with a token of its own, and yield its address."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: sockets lie in it
    (port,) = _free_ports(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        flags = f"--head --block --port={port} --num-cpus=2 --num-gpus=0 --include-dashboard=false"
        store = "--object-store-memory=80000000"
        command = [str(Path(sys.executable).parent / "ray"), "start", *flags.split(), store]
        with _daemon([*command, f"--temp-dir={folder}"], Path(folder) / "out"):
            wait_until(lambda: _answers(port), 60)
            yield f"127.0.0.1:{port}"
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def one_node_slurm() -> Iterator[Path]:
    """Start a Slurm of this machine on the loopback device only, without root; yield its folder."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    text = SLURM_CONF.format(
        folder=folder, user=user, host=socket.gethostname().split(".")[0], ports=_free_ports(2)
    )
    (folder / "slurm.conf").write_text(text)
    with (
        pytest.MonkeyPatch.context() as patch,
        _daemon(["slurmctld", "-D"], folder / "slurmctld.out", SLURM_CONF=str(folder / "slurm.conf")),
        _daemon(["slurmd", "-D"], folder / "slurmd.out", SLURM_CONF=str(folder / "slurm.conf")),
    ):
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        wait_until(lambda: "idle" in slurm("sinfo", "--noheader", "--format=%T"), 60)
        yield folder
        slurm("scancel", "--me")
        wait_until(lambda: not slurm("squeue", "--noheader"), 30)
    shutil.rmtree(folder, ignore_errors=True)


def slurm(*command: str) -> str:
    """Return what a Slurm program prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


def sweep_of_four(results: Path, data_dir: Path, *flags: str) -> Path:
    """Run four tiny runs by ``python -m bench.sweep``; return the study's folder.

    In a process of its own: one process can talk to one Ray cluster only, since Ray keeps its first token.
    """
    study = results / "four"
    table = {name[2:].replace("-", "_"): value for name, value in _pairs(TINY)}
    lines = [f"{name} = {value}" for name, value in table.items()]
    results.mkdir(parents=True, exist_ok=True)
    file = results / "four.toml"
    file.write_text("\n".join(["[base]", *lines, "plots = false", "[grid]", 'coupler = ["mean", "GNN"]']))
    places = ["--results-dir", str(results), "--data-dir", str(data_dir), "--study", study.name]
    command = [sys.executable, "-m", "bench.sweep", str(file), "--seeds", "2", *places, *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return study


def _pairs(flags: Sequence[str]) -> list[tuple[str, str]]:
    return [(a, b) for a, b in itertools.pairwise(flags) if a[:2] == "--" and b[:2] != "--"]


@contextmanager
def _daemon(command: list[str], output: Path, **variables: str) -> Iterator[None]:
    """Keep a daemon, and what it starts, while the block lasts."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **variables}, start_new_session=True
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
