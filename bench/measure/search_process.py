"""A batch-size search with its trials, here or in a process of its own; and such a process for others."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from bench.measure.budget import device_memory_bytes
from bench.measure.trials import Trials, TrialSetup, fits_all_ranks
from bench.training.batch_size import Mode, NoFeasibleBatch, SearchResult, Trial, concluded, search
from bench.training.shape import ParametersNotApplied

OnTrial = Callable[[Trial], object]


@dataclass(frozen=True)
class Budgeted:
    """Trials to be done within a budget; plain data, so that it can go to another process."""

    setup: TrialSetup
    budget_bytes: int


@dataclass(frozen=True)
class Request(Budgeted):
    """A search to be done."""

    mode: Mode
    init_val: int
    max_trials: int
    max_seconds: float
    cap: int
    among: tuple[int, ...] | None = None
    """The only sizes that may be tried (None: all up to the cap)."""


Asked = TypeVar("Asked", bound=Budgeted)
Answer = TypeVar("Answer")
Send = Callable[[Any], object]


@dataclass(frozen=True)
class _Done:
    """The last message of a process: its answer."""

    answer: Any


class SearchFailed(RuntimeError):
    """The process of a search ended without an answer, and not because nothing fits."""


def search_here(request: Request, on_trial: OnTrial) -> SearchResult:
    """Search in this process; ``on_trial`` is told of each trial.

    Raises:
        NoFeasibleBatch: nothing fits.
    """
    trials = Trials(request.setup)

    def told(size: int) -> Trial:
        trial = trials(size)
        on_trial(trial)
        return trial

    return search(
        told, mode=request.mode, init_val=request.init_val, max_trials=request.max_trials,
        cap=request.cap, among=request.among, max_seconds=request.max_seconds,
    )  # fmt: skip


def search_in_child(request: Request, on_trial: OnTrial) -> SearchResult:
    """Search in a process of its own, which is ended after ``max_seconds``; raises as ``in_child``."""

    def so_far(trials: list[Trial]) -> SearchResult:
        sizes = request.among or (1, request.cap)
        return concluded(trials, request.mode, [size for size in sizes if size <= request.cap], "max_seconds")

    return in_child(_search, request, request.max_seconds, on_trial, so_far)


def _search(request: Request, seconds: float, send: Send) -> SearchResult:
    return search_here(replace(request, max_seconds=seconds), send)


def in_child(
    work: Callable[[Asked, float, Send], Answer],
    request: Asked,
    max_seconds: float,
    on_message: Send,
    so_far: Callable[[list[Any]], Answer],
) -> Answer:
    """Return ``work(request, seconds left, send)``, done in a process of its own.

    What a trial leaves behind on the device, or breaks there, goes with the process. It is ended after
    ``max_seconds``, its start included; the answer is then what ``so_far`` makes of what it sent.
    ``on_message`` is told of each. On CUDA its allocator gets no more than the budget.

    Raises:
        NoFeasibleBatch, ParametersNotApplied: ``work`` raised it.
        SearchFailed: ``work`` raised something else, sent nothing in time, or the process died.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    ours, theirs = context.Pipe(duplex=False)
    deadline = time.time() + max_seconds
    child = context.Process(target=_child, args=(theirs, work, request, deadline), daemon=True)
    child.start()
    theirs.close()
    sent: list[Any] = []

    def keep(message: Any) -> None:
        sent.append(message)
        on_message(message)

    try:
        done = _answer(ours, child, deadline, keep)
    finally:
        child.kill()
        child.join()
    if done is not None:
        return done.answer
    if not sent:
        raise SearchFailed(f"no trial ended within {max_seconds:g} s (--tune-max-seconds).")
    return so_far(sent)


def agreed(answer: int | None, failure: Exception | None, device: torch.device) -> int:
    """Return the smallest of all ranks' answers; every rank calls it, also one that has only a ``failure``.

    Raises:
        SearchFailed: another rank has no answer. Where this one has none, its failure.
    """
    smallest = fits_all_ranks(answer, device)  # the one collective
    if failure is not None:
        raise failure
    if smallest is None:
        raise SearchFailed("nothing fits on another rank.")
    return smallest


def _answer(ours: Connection, child: BaseProcess, deadline: float, keep: Send) -> _Done | None:
    """Return the child's last message, None at the deadline."""
    while ours.poll(max(0.0, deadline - time.time())):
        try:
            message = ours.recv()
        except (EOFError, OSError):  # at the end of a message, or within one
            child.join()
            raise SearchFailed(f"the search's process died (exit code {child.exitcode}).") from None
        if isinstance(message, _Done):
            return message
        if isinstance(message, Exception):
            raise message
        if isinstance(message, str):
            raise SearchFailed(f"the search's process raised {message}")
        keep(message)
    return None


def _child(
    theirs: Connection, work: Callable[[Asked, float, Send], Any], request: Asked, deadline: float
) -> None:
    warnings.simplefilter("ignore")  # the parent has said what there is to say of the coupler
    device = torch.device(request.setup.device)
    try:
        if device.type == "cuda":
            share = request.budget_bytes / device_memory_bytes(device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.index)
        theirs.send(_Done(work(request, max(1.0, deadline - time.time()), theirs.send)))
    except (NoFeasibleBatch, ParametersNotApplied) as known:
        theirs.send(known)
    except Exception:
        theirs.send(traceback.format_exc())
