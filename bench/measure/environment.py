"""Where a run ran: versions, device, threads, and the git state of the code. No path and no host name."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.record import Environment

PACKAGES = ("torch_geometric", "torch_scatter", "torch_sparse", "numpy", "datasets")


def describe_environment(
    device: torch.device, hashes: Mapping[str, str], world_size: int = 1, backend: str | None = None
) -> Environment:
    """Return versions, device, threads, ranks and code state; ``hashes`` are ``code_hashes``."""
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={"torch": str(torch.__version__), **{name: _version(name) for name in PACKAGES}},
        device_type=device.type,
        device_name=device_name(device),
        cuda=torch.version.cuda if device.type == "cuda" else None,
        driver=_driver() if device.type == "cuda" else None,
        cpu_cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"),
        world_size=world_size,
        backend=backend,
        **code_state(),
        **hashes,
    )


def device_name(device: torch.device) -> str:
    """Return the model name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def code_state() -> dict[str, str | None]:
    """Return the git commit, and a hash of the uncommitted changes (None if there are none)."""
    tracked = _output(
        "git", "ls-files", Path(__file__).name
    )  # an installed copy may lie inside another project
    commit = _output("git", "rev-parse", "HEAD") if tracked else None
    if commit is None:
        return {"git_commit": None, "git_changes_sha256": None}
    changes = (_output("git", "diff", "HEAD") or "") + (_output("git", "status", "--porcelain") or "")
    digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
    return {"git_commit": commit.strip(), "git_changes_sha256": digest}


def _output(*command: str) -> str | None:
    """Return what a command prints in this folder; None if it is missing, fails or takes ten seconds."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None
