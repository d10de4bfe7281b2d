"""A batch-size search with its trials, here or in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from bench.measure.budget import device_memory_bytes
from bench.measure.trials import Trials, TrialSetup
from bench.training.batch_size import Mode, NoFeasibleBatch, SearchResult, Trial, concluded, search

OnTrial = Callable[[Trial], object]


@dataclass(frozen=True)
class Request:
    """A search to be done; plain data."""

    setup: TrialSetup
    budget_bytes: int
    mode: Mode
    init_val: int
    max_trials: int
    max_seconds: float
    cap: int
    among: tuple[int, ...] | None = None
    """The only sizes that may be tried (None: all up to the cap)."""


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
    """Search in a process of its own, which is ended after ``max_seconds``, its start included.

    What a trial leaves behind on the device, or breaks there, goes with the process. On CUDA its
    allocator gets no more than the budget.

    Raises:
        NoFeasibleBatch: nothing fits.
        SearchFailed: the process raised something else, or died.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    ours, theirs = context.Pipe(duplex=False)
    begun = time.time()
    child = context.Process(target=_child, args=(theirs, request, begun), daemon=True)
    child.start()
    theirs.close()
    trials: list[Trial] = []

    def keep(trial: Trial) -> None:
        trials.append(trial)
        on_trial(trial)

    try:
        answer = _answer(ours, child, begun + request.max_seconds, keep)
    finally:
        child.kill()
        child.join()
    if answer is None:
        if not trials:
            raise SearchFailed(f"no trial ended within {request.max_seconds:g} s (--tune-max-seconds).")
        sizes = request.among or (1, request.cap)
        return concluded(trials, request.mode, [size for size in sizes if size <= request.cap], "max_seconds")
    return answer


def _answer(ours: Connection, child: BaseProcess, deadline: float, keep: OnTrial) -> SearchResult | None:
    """Return the child's answer, None at the deadline."""
    while ours.poll(max(0.0, deadline - time.time())):
        try:
            message = ours.recv()
        except EOFError:
            child.join()
            raise SearchFailed(f"the search's process died (exit code {child.exitcode}).") from None
        if isinstance(message, Trial):
            keep(message)
        elif isinstance(message, NoFeasibleBatch):
            raise message
        elif isinstance(message, SearchResult):
            return message
        else:
            raise SearchFailed(f"the search's process raised {message}")
    return None


def _child(theirs: Connection, request: Request, begun: float) -> None:
    warnings.simplefilter("ignore")  # the parent has said what there is to say of the coupler
    device = torch.device(request.setup.device)
    left = max(1.0, request.max_seconds - (time.time() - begun))
    try:
        if device.type == "cuda":
            share = request.budget_bytes / device_memory_bytes(device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        theirs.send(search_here(replace(request, max_seconds=left), theirs.send))
    except NoFeasibleBatch as nothing:
        theirs.send(nothing)
    except Exception:
        theirs.send(traceback.format_exc())
