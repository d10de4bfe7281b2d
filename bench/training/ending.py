"""How several ranks end alike when one of them fails, dies, or is told to stop.

A rank that fails says so in the store before it leaves. The others find a collective broken, or get the
SIGTERM that torchrun sends to them because one has ended; and a SIGTERM to torchrun itself reaches all of
them. So a rank that a signal or a broken collective has ended asks what became of each of the others.
"""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Literal

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from bench.training.ranks import Ranks, lost

PR_SET_PDEATHSIG = 1  # of prctl(2)
PATIENCE_SECONDS = {"signal": 15.0, "lost": 3.0}
"""How long to wait for word of the others: a signal reaches a busy rank at its next step, and torchrun kills
after 30 seconds; a rank that left a collective has said why before."""
Why = Literal["failed", "signal", "lost"]


@dataclass(frozen=True)
class End:
    """The end of a run before its time: as a record has it, with the lines for the log."""

    status: str
    error: str
    log: str = ""


@contextmanager
def watched(ranks: Ranks) -> Iterator[None]:
    """Tell the other ranks of each signal the moment it comes, though this one may wait in a collective.

    Python's own handlers wait for the end of the call; the byte that it writes for each signal does not.
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
    """Have this rank killed when torchrun is, even by kill -9: it would train on, and hold the run's lock.

    On Linux; elsewhere such a rank ends when it next needs torchrun.
    """
    if ranks.alone or not sys.platform.startswith("linux"):
        return
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def why(error: BaseException) -> Why:
    """Say whether an error is this rank's own, or comes of a signal or of another rank."""
    if isinstance(error, Exception):
        return "lost" if lost(error) else "failed"
    return "signal"


def agreed_end(ranks: Ranks, end: End, cause: Why) -> End:
    """Return how the run ended, after this rank came to ``end``; each of them that still can calls this.

    The first failure of any rank is the run's. Without one, a rank of which there is no word has died,
    and the run crashed; where a signal has reached all of them, someone has stopped the run.
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
    """Return the ranks of which there is no word."""
    numbers = range(ranks.world_size)
    return [r for r in numbers if not (store.check([f"ended/{r}"]) or store.check([f"signalled/{r}"]))]
