"""How a run on several ranks ends: what each rank says, and what follows from it for the record."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from bench.interruption import Interruption
from bench.training import ranks as ranks_module
from bench.training.ranks import ALONE, End, Ranks, agreed_end, watched, why

OOM = End("oom", "rank 1: OutOfMemoryError: 2 GiB")
CRASHED, STOPPED = End("crashed", "RuntimeError: gloo/transport"), End("interrupted", "stopped from outside")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(ranks_module, "PATIENCE_SECONDS", {"signal": 0.3, "lost": 0.3})


def first_of(world_size: int, store: Store, rank: int = 0) -> Ranks:
    return Ranks(rank, world_size, rank, world_size, "gloo", store)


def told(**keys: str) -> HashStore:
    store = HashStore()
    for key, value in keys.items():
        store.set(key.replace("_", "/"), value)
    return store


FAILED = json.dumps(asdict(OOM))
CASES = {
    "one failed, the collective broke": (2, {"failure": FAILED}, CRASHED, "lost", "oom", "rank 1: OutOf"),
    "one failed, torchrun stopped the other": (2, {"failure": FAILED, "signalled_0": ""}, STOPPED, "signal",
                                               "oom", "rank 1: OutOf"),
    "one is silent, the collective broke": (2, {}, CRASHED, "lost", "crashed", "rank 1 died"),
    "one is silent, torchrun stopped the other": (2, {"signalled_0": ""}, STOPPED, "signal", "crashed",
                                                  "rank 1 died"),
    "one of three is silent": (3, {"signalled_0": "", "signalled_1": ""}, STOPPED, "signal", "crashed",
                               "rank 2 died"),
    "two of three are silent": (3, {}, CRASHED, "lost", "crashed", "ranks 1 and 2 died"),
    "a signal reached all": (3, {"signalled_0": "", "signalled_1": "", "signalled_2": ""}, STOPPED, "signal",
                             "interrupted", "stopped from outside"),
    "a signal reached one, all stopped after their step": (2, {"ended_1": "signal"}, STOPPED, "signal",
                                                           "interrupted", "stopped from outside"),
    "a signal reached all, and the first left": (2, {"signalled_0": "", "ended_1": "signal"}, CRASHED, "lost",
                                                 "interrupted", "stopped from outside"),
    "all lost each other without a signal": (2, {"ended_1": "lost"}, CRASHED, "lost", "crashed",
                                             "a collective failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_end_follows_from_what_all_ranks_say(case):
    world_size, keys, own, cause, status, words = CASES[case]
    end = agreed_end(first_of(world_size, told(**keys)), own, cause)
    assert end.status == status
    assert words in end.error


def test_the_first_failure_is_the_runs():
    store = HashStore()
    one = agreed_end(first_of(2, store, rank=1), End("oom", "no room", "its log"), "failed")
    other = agreed_end(first_of(2, store), End("crashed", "KeyError"), "failed")
    assert one == other == End("oom", "rank 1: no room", "its log")
    assert agreed_end(ALONE, CRASHED, "failed") == CRASHED


def test_word_that_comes_late_is_waited_for(monkeypatch):
    monkeypatch.setattr(ranks_module, "PATIENCE_SECONDS", {"signal": 5.0, "lost": 5.0})
    store = told(signalled_0="")
    threading.Timer(0.3, lambda: store.set("signalled/1", "")).start()
    start = time.monotonic()
    assert agreed_end(first_of(2, store), STOPPED, "signal").status == "interrupted"
    assert time.monotonic() - start < 4.0


def test_why():
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert why(gloo) == why(dist.DistBackendError("NCCL error")) == "lost"
    assert why(RuntimeError("shapes differ")) == why(torch.OutOfMemoryError("CUDA")) == "failed"
    assert why(ValueError("gloo/transport")) == "failed"
    assert why(KeyboardInterrupt()) == "signal"


def test_a_rank_that_waits_in_a_collective_says_at_once_that_a_signal_came():
    """Python's handler comes only after the wait, which here is that of a store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = TCPStore("127.0.0.1", store.port, is_master=False)
    heard: list[float] = []

    def listen() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        other.wait(["signalled/0"], timedelta(seconds=5))
        heard.append(time.monotonic())

    with Interruption().installed() as interruption, interruption.deferred(), watched(first_of(2, store)):
        thread = threading.Timer(0.3, listen)
        thread.start()
        with pytest.raises(dist.DistError):
            store.wait(["never"], timedelta(seconds=2))
        waited_until = time.monotonic()
        thread.join()
    assert interruption.requested
    with Interruption().installed() as interruption:
        interruption.over()  # after the end no signal counts
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert not interruption.requested
    assert heard[0] < waited_until - 0.5
