"""The processes of one run, each with a share of every batch: what they do together, and how they end.

With one process, everything here does nothing. Under torchrun each process is a rank of
``torch.distributed``. Tensors on a CPU use gloo; tensors on GPUs use NCCL, with one GPU per local rank.

A rank that fails writes the reason to the store before it ends. The other ranks then find a collective
broken, or they get the SIGTERM that torchrun sends. A SIGTERM to torchrun itself reaches all ranks. So a rank
that ends by a signal or a broken collective asks the store what happened to the other ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from bench.cli import launched
from bench.data.loader import Shard
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from gnnmoe.model import GNNMoEModel


T = TypeVar("T")
Number = TypeVar("Number", int, float)
LOST_TEXTS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of its run. All ranks call each method; properties are local.

    A collective that waits for another rank longer than the time-out of ``join`` raises on every rank.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Its number on this machine, which is also the number of its GPU."""
    local_world_size: int = 1
    backend: str | None = None
    """The backend that sums the gradients; None with one process."""
    store: Store | None = None
    """Texts by name that all ranks can read at any time."""

    @classmethod
    def join(cls, device: str, timeout_seconds: float, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Return this process's rank from the variables of torchrun, after all ranks have joined.

        ``device``: auto, cpu, cuda or mps.

        Raises:
            Refused: more ranks on this machine than it has GPUs, a device that cannot be shared, or
                a launcher that does not say all.
        """
        found = launched(environment)
        if found is None:
            return ALONE
        world_size, rank, *local = found
        on_cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        refuse_shared_device(device, local[1], torch.cuda.device_count() if on_cuda else None)
        if on_cuda:
            torch.cuda.set_device(local[0])
        timeout = timedelta(seconds=timeout_seconds)
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo", store=PrefixStore("collectives", store),
            rank=rank, world_size=world_size, timeout=timeout,
        )  # fmt: skip
        return cls(rank, world_size, local[0], local[1], "nccl" if on_cuda else "gloo", store)

    def leave(self) -> None:
        """Leave the group, after all ranks have finished."""
        if not self.alone:
            dist.destroy_process_group()

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.world_size == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def shard(self) -> Shard:
        """Which samples belong to this rank."""
        return Shard(self.rank, self.world_size)

    def device(self, device: torch.device) -> torch.device:
        """Return this rank's own device of that type."""
        return torch.device("cuda", self.local_rank) if device.type == "cuda" and not self.alone else device

    def sharing(self, device: torch.device) -> int:
        """Return how many ranks share the memory of this device; each rank has its own GPU."""
        return 1 if device.type == "cuda" else self.local_world_size

    def stream(self, name: str) -> str:
        """Return the name of this rank's random stream; the first rank has the name of a single process."""
        return name if self.first else f"{name}.{self.rank}"

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, on its device; on a GPU the host does not wait."""
        if self.alone:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total

    def totals(self, counts: Sequence[int]) -> list[int]:
        """Return each count summed over all ranks."""
        return self.sum(torch.tensor(counts, dtype=torch.int64)).tolist()

    def any(self, flag: bool) -> bool:
        """Say whether ``flag`` is true on any rank."""
        return self.totals([int(flag)])[0] > 0

    def meet(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in order; a value can be anything that pickles."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def largest(self, value: Number) -> Number:
        """Return the largest of the ranks' values."""
        return max(self.gather(value))

    def worst(self, value: T, key: Callable[[T], float]) -> tuple[int, T]:
        """Return the first rank whose value has the largest ``key``, and that value."""
        return max(enumerate(self.gather(value)), key=lambda found: key(found[1]))

    def from_first(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the first rank only, and return its result on all ranks.

        Raises:
            Refused: ``function`` raised it; all ranks raise the same message.
        """
        return function() if self.alone else self.gather(self._tried(function, self.first))[0]

    def in_turn(self, function: Callable[[], T]) -> T:
        """Call ``function`` on every rank, on the first rank before the others.

        The other ranks then find what the first has downloaded or cached.

        Raises:
            Refused: ``function`` raised it on one rank; all ranks raise the same message.
        """
        if self.alone:
            return function()
        first, others = (self._tried(function, here) for here in (self.first, not self.first))
        return first if self.first else others

    def _tried(self, function: Callable[[], Any], here: bool) -> Any:
        value, refusal = None, None
        if here:
            try:
                value = function()
            except Refused as error:
                refusal = str(error)
        for words in self.gather(refusal):
            if words is not None:
                raise Refused(words)
        return value

    def parallel(self, model: GNNMoEModel) -> nn.Module:
        """Return the module to call instead of the model: its backward gives each rank the mean gradient.

        The parameters are the same objects. Gradients are summed during the backward.
        """
        if self.alone:
            return model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broadcast_buffers has another name from torch 2.13 on
            return DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True,
                find_unused_parameters=_leaves_parameters_out(model),
            )  # fmt: skip

    def in_one_backward(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Return the context for one piece of a batch: the ranks sum gradients only in the ``last`` piece."""
        return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


ALONE = Ranks()


def refuse_shared_device(device: str, local_world_size: int, gpus: int | None) -> None:
    """Refuse more ranks than GPUs on one machine; ``gpus`` is None on a CPU, which all ranks share.

    Raises:
        Refused: the message names the largest number of ranks.
    """
    if device == "mps":
        raise Refused("device mps is one, and cannot be shared by ranks; use --device cpu, or no torchrun.")
    if gpus is not None and local_world_size > gpus:
        raise Refused(
            f"{local_world_size} ranks on a machine with {gpus} GPU{'s' * (gpus != 1)}: each needs one of "
            f"its own; use --nproc-per-node={gpus}, or --device cpu."
        )


def lost(error: BaseException) -> bool:
    """Say whether ``error`` is a collective that found another rank gone or silent."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(text in str(error) for text in LOST_TEXTS)
    )


def _leaves_parameters_out(model: GNNMoEModel) -> bool:
    """Say whether the loss does not depend on some parameter; DDP must know this."""
    training, parameters = model.training, [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros(1, 2, dtype=torch.int64, device=parameters[0].device)
    devices = [ids.device] if ids.is_cuda else []
    with torch.random.fork_rng(devices):
        loss = type(model.eval()).forward(model, ids, targets=ids, return_logits=False)["loss"]
    gradients = torch.autograd.grad(cast(Tensor, loss), parameters, allow_unused=True)
    model.train(training)
    return any(gradient is None for gradient in gradients)


# --- how the ranks end ----------------------------------------------------------------------------

PR_SET_PDEATHSIG = 1  # of prctl(2)
PATIENCE_SECONDS = {"signal": 15.0, "lost": 3.0}
"""How long to wait for the other ranks.

A signal reaches a busy rank at its next step, and torchrun kills after 30 seconds. A rank that left a
collective has already written its reason."""
Why = Literal["failed", "signal", "lost"]


@dataclass(frozen=True)
class End:
    """The early end of a run: status and error of the record, and the lines for the log."""

    status: str
    error: str
    log: str = ""


@contextmanager
def watched(ranks: Ranks) -> Iterator[None]:
    """Tell the other ranks at once when a signal comes, even while this rank waits in a collective.

    A Python signal handler runs only after the collective returns; the wake-up byte comes at once.
    """
    if ranks.store is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    store = ranks.store.clone()  # pyright: ignore[reportAttributeAccessIssue]  # the thread's own connection

    def tell() -> None:
        while ours.recv(1):
            with suppress(dist.DistError):
                store.set(f"signalled/{ranks.rank}", "")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(theirs.fileno())
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join(timeout=1.0)
        ours.close()


def die_with_torchrun(ranks: Ranks) -> None:
    """Kill this rank when torchrun dies, even by kill -9. Otherwise it would keep training and hold the lock.

    Only on Linux; elsewhere the rank ends when it next needs torchrun.
    """
    if ranks.alone or not sys.platform.startswith("linux"):
        return
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def why(error: BaseException) -> Why:
    """Say whether an error comes from this rank, from a signal or from another rank."""
    if isinstance(error, Exception):
        return "lost" if lost(error) else "failed"
    return "signal"


def agreed_end(ranks: Ranks, end: End, cause: Why) -> End:
    """Return how the run ended, after this rank came to ``end``; every living rank calls this.

    The first failure of any rank is the failure of the run. Without a failure, a silent rank has died and the
    run crashed. If a signal has reached all ranks, someone has stopped the run.
    """
    if ranks.store is None:
        return end
    try:
        return _agreed(ranks, ranks.store, end, cause)
    except (dist.DistError, RuntimeError) as error:  # torchrun itself is gone
        return End("crashed", f"torchrun is gone: {error}") if cause == "lost" else end


def _agreed(ranks: Ranks, store: Store, end: End, cause: Why) -> End:
    if cause == "failed":
        own = End(end.status, f"rank {ranks.rank}: {end.error}", end.log)
        found = store.compare_set("failure", "", json.dumps(asdict(own)))
        return End(**json.loads(found))
    told = store.check([f"signalled/{ranks.rank}"])
    store.set(f"ended/{ranks.rank}", "signal" if told or cause == "signal" else "lost")
    deadline = time.monotonic() + PATIENCE_SECONDS[cause]
    while time.monotonic() < deadline and not store.check(["failure"]) and _silent(ranks, store):
        time.sleep(0.05)
    if store.check(["failure"]):
        return End(**json.loads(store.get("failure")))
    silent = _silent(ranks, store)
    if silent:
        named = " and ".join(map(str, silent))
        text = f"rank {named} died" if len(silent) == 1 else f"ranks {named} died"
        return End("crashed", f"{text} or hangs: no word of it to the others", end.log)
    ends = [f"ended/{rank}" for rank in range(ranks.world_size)]
    if any(store.check([name]) and store.get(name) == b"lost" for name in ends):
        return End("crashed", "a collective failed, though no rank did", end.log)
    return End("interrupted", "stopped from outside")


def _silent(ranks: Ranks, store: Store) -> list[int]:
    """Return the ranks that have written neither an end nor a signal."""
    numbers = range(ranks.world_size)
    return [r for r in numbers if not (store.check([f"ended/{r}"]) or store.check([f"signalled/{r}"]))]
