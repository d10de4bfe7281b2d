"""The environment of a run: device, packages, commit, and which code made its numbers.

Two hashes over syntax trees, without comments and docstrings, say which code it was. One hash covers the
coupler's own source, the other the project's code that can change a number. A record keeps both. If they
differ from the hashes of today's code, the run is stale, and ``bench.run`` and ``bench.sweep`` run it again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import bench
import gnnmoe
from bench.data.cache import syntax_sha256
from bench.files import without_places
from bench.record import Environment
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.registry import coupler_class, coupler_names, made_of, resolved_options
from gnnmoe.discovery import executed_source

CHANGES_NUMBERS = (
    "gnnmoe", "bench/data", "bench/measure", "bench/training", "bench/tune",
    "bench/check/audit.py", "bench/check/behaviour.py", "bench/check/communication.py",
    "bench/check/isolation.py", "bench/check/leak_check.py",
    "bench/check/subject.py", "bench/device.py", "bench/run/prepare.py", "bench/run/session.py",
)  # fmt: skip
"""Files and folders whose code can change a number; no flags, texts, plots, reports or sweeps."""
OF_COUPLERS = ("gnnmoe/couplers/[!_]*.py", "gnnmoe/hypergraph/*.py", "gnnmoe/layers/*.py")
"""Files that count only for the couplers that import them."""
OF_ALL_RUNS = ("gnnmoe/couplers/base.py", "gnnmoe/couplers/registry.py")
"""Files of these folders that count for all runs, since they hold no coupler."""
REPOSITORY = Path(gnnmoe.__path__[0]).parent


def code_hashes(config: GNNMoEConfig) -> dict[str, str]:
    """Return ``coupler_sha256`` and ``project_sha256`` for a run of this model with today's code."""
    return {"coupler_sha256": coupler_sha256(config), "project_sha256": project_sha256()}


@cache
def project_sha256() -> str:
    """Return the hash of the project's code that can change a number, without the couplers' files."""
    digest = hashlib.sha256()
    packages = {"gnnmoe": Path(gnnmoe.__path__[0]), "bench": Path(bench.__path__[0])}
    for entry in CHANGES_NUMBERS:
        package, _, rest = entry.partition("/")
        place = packages[package] / rest
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            name = f"{package}/{path.relative_to(packages[package]).as_posix()}"
            if not _of_couplers(name):
                digest.update(f"{name} {syntax_sha256(path.read_bytes())}\n".encode())
    return digest.hexdigest()


@cache
def couplers_sha256() -> str:
    """Return the hash of all couplers' files of this package."""
    lines = [
        f"{path.relative_to(REPOSITORY).as_posix()} {syntax_sha256(path.read_bytes())}\n"
        for pattern in OF_COUPLERS
        for path in sorted(REPOSITORY.glob(pattern))
        if _of_couplers(path.relative_to(REPOSITORY).as_posix())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def coupler_sha256(config: GNNMoEConfig) -> str:
    """Return the hash of a coupler's source: its class, its bases, and the modules that they import.

    The layer and the strategy that the coupler reads count too, and so does a coupler that an option names
    (``like`` of dense). The modules of their own packages count, and all modules outside installed packages.
    The name and folder of a file do not count.
    """
    named = [value for value in resolved_options(config).values() if value in coupler_names()]
    found: dict[str, str] = {}
    for number, part in enumerate([*made_of(config), *map(coupler_class, named)]):
        own = part.__module__
        for module in (own, *(cls.__module__ for cls in getattr(part, "__mro__", ())[1:])):
            of_file = number == 0 or executed_source(module) is not None
            _collect(module, own, f"part {number}" if module == own and of_file else module, found)
    lines = sorted(f"{label} {sha256}\n" for label, sha256 in found.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _collect(module: str, importer: str, label: str, found: dict[str, str]) -> None:
    """Add the hashes of a module that ``importer`` imports and, recursively, of its imports."""
    path = _file_of(module)
    if label in found or path is None or not _is_own(module, path, importer):
        return
    source = executed_source(module)
    source = path.read_bytes() if source is None else source
    found[label] = syntax_sha256(source)
    for name in _imports(source, module, path):
        _collect(name, module, name, found)


@lru_cache(maxsize=1024)
def _imports(source: bytes, module: str, path: Path) -> tuple[str, ...]:
    """Return the names of all modules that a source imports, and of their packages."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            found += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return tuple(found)


@cache
def _file_of(module: str) -> Path | None:
    """Return the source file of a module, None if it has none; nothing is imported."""
    top, *rest = module.split(".")
    if top in sys.stdlib_module_names:
        return None
    if executed_source(module) is not None:
        return Path(inspect.getsourcefile(sys.modules[module]) or "")
    try:
        spec, name = importlib.util.find_spec(top), top
        for part in rest:
            name = f"{name}.{part}"
            spec = None if spec is None else PathFinder.find_spec(name, spec.submodule_search_locations or [])
    except (ImportError, ValueError):
        return None
    path = None if spec is None or spec.origin is None else Path(spec.origin)
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _is_own(module: str, path: Path, importer: str) -> bool:
    """Say whether a module that ``importer`` imports belongs to the coupler's own source."""
    top = module.partition(".")[0]
    if top == gnnmoe.__name__:
        return _of_couplers(path.relative_to(REPOSITORY).as_posix())
    if top == bench.__name__:
        return False
    return top == importer.partition(".")[0] or not any(folder in path.parents for folder in _installed())


def _of_couplers(name: str) -> bool:
    """Return whether a file of gnnmoe counts only for the couplers that import it."""
    return name not in OF_ALL_RUNS and any(Path(name).match(pattern) for pattern in OF_COUPLERS)


@cache
def _installed() -> tuple[Path, ...]:
    """Return the folders of installed packages and of Python's own library."""
    return tuple({Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


COMMAND_SECONDS = 10
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
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


OF_ANOTHER_REPOSITORY = frozenset(
    {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX"}
)
"""What git sets for its hooks; it names the repository that git works on, not the repository of this code."""
GIT = "git --no-optional-locks -c safe.directory=*".split()  # this code may belong to another user


class NoOutput(Exception):
    """A command is missing, failed or took too long; the message says which."""


def code_state() -> dict[str, str | None]:
    """Return the git commit, the hash of the uncommitted changes, if any, and why they are unknown."""
    found: dict[str, str | None] = {"git_commit": None, "git_changes_sha256": None, "git_remark": None}
    try:
        if not _output(*GIT, "ls-files", Path(__file__).name):  # an installed copy inside another project
            return {**found, "git_remark": "git does not track this code"}
        found["git_commit"] = _output(*GIT, "rev-parse", "HEAD").decode().strip()
        changes = _output(*GIT, "diff", "--no-ext-diff", "--no-textconv", "HEAD")
        changes += _output(*GIT, "status", "--porcelain")
    except NoOutput as error:
        return {**found, "git_remark": str(error)}
    return {**found, "git_changes_sha256": hashlib.sha256(changes).hexdigest() if changes else None}


def _output(*command: str) -> bytes:
    """Return what a command prints in this folder.

    Raises:
        NoOutput: the command is missing, fails or takes ten seconds.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OF_ANOTHER_REPOSITORY}
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=COMMAND_SECONDS,
        )  # fmt: skip
    except OSError as error:
        raise NoOutput(f"{command[0]} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise NoOutput(f"{command[0]} took more than {COMMAND_SECONDS} s") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise NoOutput(f"{command[0]} failed: {without_places(said)}")
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except NoOutput:
        return None
    return said.decode(errors="replace").strip().partition("\n")[0] or None
