"""A requested search, carried out: its trials, the proof that a batch size is applied, and its process.

A trial takes full training steps on its own model. A search runs in this process, on CUDA in a child process.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import psutil
import torch

from bench.check.subject import global_random_state_kept
from bench.config import ExecutionConfig, TrainingConfig
from bench.device import attempt, device_memory_bytes, format_bytes, host_memory_bytes, recover
from bench.measure.memory import CannotPredict, meter_for, predict_peak
from bench.measure.timing import random_batch
from bench.record import is_measured
from bench.training.step import Execution, make_optimizer, training_step
from bench.tune.search import FREE_HERE, Found, Mode, SearchFailed, Shape, Trial, concluded, ladder, search
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel

OnTrial = Callable[[Trial], object]
WARM_UP_STEPS = 2  # the first makes the optimizer's state; the second, with that state, is metered
MEASURED_STEPS = 2
MOST_PIECES = 2  # from the second piece on, earlier gradients are held: memory rises no further
SURE_SHARE = 1.1  # of the limit: predictions are within 10% of the measurement


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of a search have in common; plain data, so that it can go to another process."""

    model: GNNMoEConfig
    training: TrainingConfig
    batch_size: int
    """Rows of a whole batch of this rank; a smaller trial is a piece of such a batch."""
    limit_bytes: int
    """The highest peak that fits: the budget times the target."""
    device: str
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    """Form and precision of the model. Trials run it uncompiled: compiling each size takes minutes."""

    def model_of(self, length: int) -> GNNMoEConfig:
        """Return the model's config at this length."""
        return replace(self.model, max_seq_length=length)

    def build(self, length: int) -> GNNMoEModel:
        """Return a model of this length on the device, in train mode."""
        execution = Execution(self.execution, torch.device(self.device))
        return execution.build(self.model_of(length), seed=0).train()


@dataclass(frozen=True)
class Request:
    """A search to be done; plain data, so that it can go to another process."""

    setup: TrialSetup
    budget_bytes: int
    target: float
    """Share of the budget that a trial may reach."""
    mode: Mode
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    """Rows of the micro-batches that may be tried."""
    start: int
    """Rows of the first trial; the mode ``shape`` starts where the prediction says."""
    max_trials: int
    max_seconds: float

    @property
    def shapes(self) -> list[Shape]:
        """The ladder of shapes that may be tried."""
        return ladder(self.lengths, self.rows)


class Trials:
    """Tries shapes: ``trials(shape)`` returns whether training runs with it, its peak and its speed.

    A trial takes the steps of a training: forward, backward, clipping, update. No target is ignored. Where
    the shape is less than the batch, the gradients of an earlier piece are held. A trial fails where memory
    runs out, where the peak passes the limit, and where the allocator has to give its cache back. Any other
    error comes out. A trial leaves nothing behind: it has its own model and optimizer, and torch's random
    state stays.
    """

    def __init__(self, setup: TrialSetup) -> None:
        self.setup, self._device = setup, torch.device(setup.device)
        self._begun: set[int] = set()
        """The lengths with a trial."""
        self._known: dict[Shape, int | None] = {}

    def __call__(self, shape: Shape) -> Trial:
        """Try ``shape``."""
        start = time.perf_counter()
        seen: list[tuple[int, ...]] = []
        predicted = self.predicted(shape)
        hopeless = None if predicted is None else self._hopeless(predicted, shape.length)
        self._begun.add(shape.length)
        if hopeless:
            return Trial(shape, f"not run: {hopeless}", predicted, seconds=time.perf_counter() - start)
        with global_random_state_kept(self._device):
            outcome = attempt(lambda: self._run(shape, seen))
        failure, peak, speed = outcome.value or (outcome.failure, None, None)
        seconds = time.perf_counter() - start
        return Trial(shape, failure, predicted, peak, speed, len(seen), seconds)

    def predicted(self, shape: Shape) -> int | None:
        """Return the predicted peak of ``shape`` in bytes, computed once; None where it cannot be."""
        if shape not in self._known:
            self._known[shape] = self._predict(shape)
        return self._known[shape]

    def _predict(self, shape: Shape) -> int | None:
        setup = self.setup
        try:
            return predict_peak(
                setup.model_of(shape.length),
                shape.rows * self._pieces(shape),
                shape.length,
                setup.training,
                micro_batch_size=shape.rows,
                device=self._device,
                execution=setup.execution,
            )
        except CannotPredict:
            return None

    def _pieces(self, shape: Shape) -> int:
        """Return how many pieces a trial's batch has: two stand for any larger number."""
        return MOST_PIECES if shape.rows < self.setup.batch_size else 1

    def _hopeless(self, predicted: int, length: int) -> str | None:
        """Return why a shape fails without being run; the first shape of a length is always run."""
        if self._device.type == "cpu" and predicted > (free := free_host_bytes()):
            return f"only {format_bytes(free)} {FREE_HERE}"  # Linux would kill the process without a message
        limit = self.setup.limit_bytes
        if length in self._begun and predicted > limit * SURE_SHARE:
            return f"far above {format_bytes(limit)}"
        return None

    def _run(self, shape: Shape, seen: list[tuple[int, ...]]) -> tuple[str | None, int, float | None]:
        """Return why the shape fails (None: it fits), its peak in bytes and its tokens/s."""
        setup = self.setup
        recover()  # the cache of the trial before would be freed by a retry, and this trial would fail
        retries = allocator_retries(self._device)
        model = setup.build(shape.length)
        optimizer = make_optimizer(model, setup.training)
        batch = random_batch(model.config, shape.rows * self._pieces(shape), self._device)

        def step() -> None:
            training_step(model, batch, optimizer, setup.training.max_grad_norm, shape.rows, seen)

        for _ in range(WARM_UP_STEPS - 1):
            step()
        peak = meter_for(self._device).measure(step, (model, optimizer, [batch])).judged_bytes
        seconds = _seconds(step, self._device) if peak <= setup.limit_bytes else None
        failure = why_it_fails(peak, setup.limit_bytes, allocator_retries(self._device) - retries)
        return failure, peak, None if seconds is None else batch["targets"].numel() / seconds


def why_it_fails(peak_bytes: int, limit_bytes: int, retries: int) -> str | None:
    """Return why a trial that ran to its end does not fit; None where it fits."""
    if peak_bytes > limit_bytes:
        return f"peak above {format_bytes(limit_bytes)}"
    return f"the allocator had to retry {retries} times" if retries > 0 else None


def allocator_retries(device: torch.device) -> int:
    """Return how often the CUDA allocator was full and gave its cache back, since the process began."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


def free_host_bytes() -> int:
    """Return the bytes that the host can give without swapping."""
    return min(psutil.virtual_memory().available, host_memory_bytes())


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest measured step."""
    ticks = []
    for number in range(MEASURED_STEPS + 1):
        if number:
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        ticks.append(time.perf_counter())
    return min(after - before for before, after in pairwise(ticks))


class ParametersNotApplied(RuntimeError):
    """A larger batch takes no more memory, so the model cannot have run it."""


def require_batch_applied(model: GNNMoEModel, length: int, device: torch.device) -> None:
    """Compare the activation memory of one sequence with that of two; the model keeps nothing of them.

    Raises:
        ParametersNotApplied: it does not rise.
    """

    def compare() -> None:
        one, two = (activation_bytes(model, rows, length, device) for rows in (1, 2))
        if two <= one:
            raise ParametersNotApplied(
                f"parameters not applied: 1 sequence at once takes {one:,} bytes of activations and "
                f"2 take {two:,}; the batch size that is set is not the one that is run."
            )

    attempt(compare)  # where two sequences run out of memory, they take more than one


def activation_bytes(model: GNNMoEModel, rows: int, length: int, device: torch.device) -> int:
    """Return the peak in bytes of a forward pass with its graph, minus the bytes of the batch.

    Parameters and buffers count, so only differences between sizes have a meaning.

    Raises:
        ValueError: the device's meter reads no allocated bytes.
    """
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "targets": ids.clone()}

    def forward() -> None:
        model(batch["input_ids"], targets=batch["targets"], return_logits=False)

    with global_random_state_kept(device):
        peak = meter_for(device).measure(forward, (model, [batch])).peak_allocated_bytes
    if not is_measured(peak):
        raise ValueError("activation memory cannot be read on this device.")
    assert isinstance(peak, int)
    return peak - 2 * ids.numel() * ids.element_size()


# --- The search, in this process or in a child process


def search_here(request: Request, on_trial: OnTrial) -> Found:
    """Search in this process; ``on_trial`` receives each trial.

    Raises:
        NoFeasibleBatch: nothing fits.
        ParametersNotApplied: the search is for a length, and a larger batch takes no more memory.
    """
    trials, device = Trials(request.setup), torch.device(request.setup.device)
    if request.mode == "shape":
        shortest = request.lengths[0]
        with global_random_state_kept(device):
            require_batch_applied(request.setup.build(shortest), shortest, device)
    return search(
        trials,
        request.shapes,
        request.mode,
        start=request.start,
        predict=trials.predicted,
        limit_bytes=request.setup.limit_bytes,
        max_trials=request.max_trials,
        max_seconds=request.max_seconds,
        on_trial=on_trial,
    )


def search_in_child(
    request: Request, on_trial: OnTrial, work: Callable[[Request, OnTrial], Found] = search_here
) -> Found:
    """Search in a child process.

    What a trial leaves on the device, or breaks there, ends with the child. The child is ended
    ``max_seconds`` after its start; the answer then follows from its trials. On CUDA its allocator gets no
    more than the budget.

    Raises:
        NoFeasibleBatch, ParametersNotApplied: ``work`` raised it.
        SearchFailed: ``work`` raised another error, no trial ended in time, or the process died.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    ours, theirs = context.Pipe(duplex=False)
    deadline = time.monotonic() + request.max_seconds  # one clock for all processes of the machine
    child = context.Process(target=_child, args=(theirs, work, request, deadline), daemon=True)
    child.start()
    theirs.close()
    trials: list[Trial] = []

    def keep(trial: Trial) -> None:
        trials.append(trial)
        on_trial(trial)

    try:
        found = _answer_of(ours, child, deadline, keep)
    finally:
        child.kill()
        child.join()
    if found is not None:
        return found
    if not trials:
        raise SearchFailed(f"no trial ended within {request.max_seconds:g} s (--tune-max-seconds).")
    return concluded(trials, request.shapes, "max_seconds")


def _answer_of(ours: Connection, child: BaseProcess, deadline: float, keep: OnTrial) -> Found | None:
    """Return the child's answer, None at the deadline; ``keep`` receives each trial before."""
    while ours.poll(max(0.0, deadline - time.monotonic())):
        try:
            message = ours.recv()
        except (EOFError, OSError):  # at the end of a message, or within one
            child.join()
            raise SearchFailed(f"the search's process died (exit code {child.exitcode}).") from None
        if isinstance(message, Found):
            return message
        if isinstance(message, Exception):
            raise message
        if isinstance(message, str):
            raise SearchFailed(f"the search's process raised {message}")
        keep(message)
    return None


def _child(
    theirs: Connection, work: Callable[[Request, OnTrial], Found], request: Request, deadline: float
) -> None:
    """Send each trial, then the answer: what was found, a known error, or the traceback of another error."""
    warnings.simplefilter("ignore")  # the parent has shown the warnings about the coupler
    device = torch.device(request.setup.device)
    try:
        if device.type == "cuda":
            share = request.budget_bytes / device_memory_bytes(device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.index)
        left = replace(request, max_seconds=max(1.0, deadline - time.monotonic()))
        theirs.send(work(left, theirs.send))
    except (SearchFailed, ParametersNotApplied) as known:
        theirs.send(known)
    except Exception:
        theirs.send(traceback.format_exc())
