"""Ray: one task per run, with its CPUs and GPUs, on an existing cluster or on one started on this machine.

Ray tries nothing twice: the record of a run says how it ended, and the next call of the sweep goes on.
``ray.cancel``, which is SIGINT in the worker, asks a task to end. When the sweep dies, even by kill -9, Ray
ends its workers, and each run then saves its state.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
from typing import Annotated, Any

import tyro

from bench.config import flags
from bench.sweep.executors import child
from bench.sweep.executors.base import GRACE_SECONDS, SHARED, ClusterExecutor, Resources, Wanted, lost
from bench.sweep.executors.child import ChildEnd, RemoteTask
from gnnmoe.config import Refused

OWN_CLUSTER = "local"  # Ray's word for a new cluster on this machine
CONNECT_SECONDS = 5.0
OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster on this machine: tasks pass no data


@flags
class Options:
    """Flags of --executor ray."""

    ray_address: Annotated[str | None, tyro.conf.arg(aliases=("--address",))] = None
    """The Ray cluster, HOST:PORT or auto (default: the environment variable RAY_ADDRESS; without it, Ray is
    started on this machine for as long as the sweep lasts)."""


def make(options: Options, wanted: Wanted) -> RayExecutor:
    """Return the executor for what a sweep wants.

    Raises:
        Refused: Ray is not installed, the address does not answer, or no run fits into the cluster.
    """
    if wanted.slots is not None and wanted.slots < 1:
        raise Refused(f"slots is {wanted.slots}; it must be 1 or more.")
    address = options.ray_address or os.environ.get("RAY_ADDRESS") or OWN_CLUSTER
    if (
        address == OWN_CLUSTER and "RAY_AUTH_MODE" not in os.environ
    ):  # else Ray leaves a token in the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = import_ray()
    connect(ray, address)
    try:
        slots = wanted.slots or capacity(ray.nodes(), wanted.resources)
        return RayExecutor(ray, wanted, slots)
    except Refused:
        ray.shutdown()
        raise


def import_ray() -> Any:
    """Return the package.

    Raises:
        Refused: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else runs yield to all other processes
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of its own future
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Refused(
            "executor ray needs Ray, which is not installed; pip install 'gnnmoe[ray]' installs it."
        ) from None
    return ray


def connect(ray: Any, address: str) -> None:
    """Join the cluster at ``address``, or start one on this machine for ``local``.

    Raises:
        Refused: nothing answers there.
    """
    own: dict[str, Any] = {"address": address}
    if address == OWN_CLUSTER:
        own |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    elif found := re.fullmatch(r"(?:ray://)?([^:/]+):([0-9]+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise Refused(
                f"no Ray cluster answers at {address} ({error}); ray start --head starts one."
            ) from None
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # of many types: ConnectionError, RuntimeError, ValueError, …
        wants_token = "AuthenticationError" in f"{error} {error.__cause__}"
        hint = "; it wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if wants_token else ""
        raise Refused(f"Ray cannot be reached at {address}: {_first_line(error)}{hint}") from error


def capacity(nodes: list[dict[str, Any]], resources: Resources) -> int:
    """Return how many runs fit into the nodes side by side.

    Raises:
        Refused: no run fits.
    """
    asked = {"CPU": resources.cpus, "GPU": resources.gpus}
    having = [node["Resources"] for node in nodes if node["Alive"]]
    fitting = sum(min(int(has.get(name, 0) // n) for name, n in asked.items() if n) for has in having)
    if not fitting:
        largest = {name: max((int(has.get(name, 0)) for has in having), default=0) for name in asked}
        raise Refused(
            f"a run asks for {asked['CPU']} CPUs and {asked['GPU']} GPUs, and no node of the Ray cluster has "
            f"them (at most {largest['CPU']} CPUs, {largest['GPU']} GPUs); lower --cpus-per-run, or pass "
            "--slots where the cluster grows by itself."
        )
    return fitting


class RayExecutor(ClusterExecutor):
    """Gives each task to Ray; ``ray`` is the package, connected."""

    def __init__(self, ray: Any, wanted: Wanted, slots: int, grace_seconds: float = GRACE_SECONDS) -> None:
        super().__init__(wanted, slots, grace_seconds)
        self._ray, self._references, self._asked = ray, {}, set()
        asked = wanted.resources
        ray.cloudpickle.register_pickle_by_value(child)  # workers need not have this package on their path
        self._do = ray.remote(child.do).options(num_cpus=asked.cpus, num_gpus=asked.gpus, max_retries=0)

    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        """Ask a task to save its state and end, or end it ``at_once``."""
        if run_id in self._references and (at_once or run_id not in self._asked):
            self._asked.add(run_id)
            self._ray.cancel(self._references[run_id], force=at_once)

    def close(self) -> None:
        """Leave the cluster; a cluster started for the sweep ends."""
        self._ray.shutdown()

    def _give(self, run_id: str, task: RemoteTask) -> None:
        self._references[run_id] = self._do.remote(task, (signal.SIGINT,), self._grace)

    def _ends(self) -> dict[str, ChildEnd]:
        names = {reference: run_id for run_id, reference in self._references.items()}
        if not names:
            return {}
        ready, _ = self._ray.wait(list(names), num_returns=len(names), timeout=0)
        ends = {}
        for reference in ready:
            run_id = names[reference]
            ends[run_id] = self._end(run_id, reference)
            del self._references[run_id]
            self._asked.discard(run_id)
        return ends

    def _end(self, run_id: str, reference: Any) -> ChildEnd:
        """Return how a task ended: as its child did, or how Ray says it was lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.TaskCancelledError:
            return lost()
        except errors.OutOfMemoryError as error:
            self._note(run_id, f"OutOfMemoryError: {_first_line(error)}")
            return lost(-signal.SIGKILL)
        except errors.RayTaskError as error:  # our own part of it failed
            self._note(run_id, f"error: the worker cannot start the run ({_last_line(error)}); {SHARED}")
            return lost(2)
        except errors.RayError as error:  # its worker or its node is gone
            self._note(run_id, f"{type(error).__name__}: {_first_line(error)}")
            return lost()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
