"""Trials of a micro-batch: full training steps at the real shape, on a model of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import psutil
import torch
from torch import Tensor

from bench.config import ExecutionConfig, TrainingConfig
from bench.gate.subject import global_random_state_kept
from bench.measure.budget import format_bytes, host_memory_bytes
from bench.measure.meters import meter_for
from bench.measure.predict import CannotPredict, predict_peak
from bench.measure.recovery import attempt, recover
from bench.training.batch_size import FREE_HERE, Trial
from bench.training.execution import Execution
from bench.training.step import Batch, make_optimizer, training_step
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed

WARM_UP_STEPS = 2  # the first makes the optimizer's state; the second, with it there, is metered
MEASURED_STEPS = 2
MOST_PIECES = 2  # from the second piece on, the gradients of those before are held: as high as it gets
SURE_SHARE = 1.1  # of the limit: predictions are within 10 % of what is measured


@dataclass(frozen=True)
class TrialSetup:
    """What all trials of a search have in common; plain data, so that it can go to another process."""

    model: GNNMoEConfig
    training: TrainingConfig
    batch_size: int
    """Rows of a whole batch of this rank; a smaller trial is a piece of one."""
    limit_bytes: int
    """What a trial's peak may reach: the budget times the target."""
    device: str
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    """Form and precision of the model; trials run it uncompiled, since compiling each size takes minutes."""

    def build(self) -> GNNMoEModel:
        """Return a model on the device, in train mode."""
        return Execution(self.execution, torch.device(self.device)).build(self.model, seed=0).train()


class Trials:
    """Tries sizes: ``trials(size)`` says whether training runs with it, and at which peak and speed.

    A trial takes steps as training does (forward, backward, clipping, update), at full length and with
    no target ignored, the gradients of an earlier piece held where the size is less than the batch. It
    fails where memory runs out, where the peak passes the limit, and where the allocator had to give
    its cache back to go on; any other error comes out. Nothing of it stays: the model and the
    optimizer are its own, and torch's random state is left as it was.
    """

    def __init__(self, setup: TrialSetup) -> None:
        self.setup, self._device = setup, torch.device(setup.device)
        self._begun = False
        self._known: dict[int, int | None] = {}

    def __call__(self, size: int) -> Trial:
        """Return what ``size`` did."""
        start = time.perf_counter()
        shapes: list[tuple[int, ...]] = []
        predicted = self.predicted(size)
        hopeless = predicted is not None and self._hopeless(predicted)
        self._begun = True
        if hopeless:
            return Trial(size, f"not run: {hopeless}", predicted, seconds=time.perf_counter() - start)
        with global_random_state_kept(self._device):
            outcome = attempt(lambda: self._run(size, shapes))
        failure, peak, speed = outcome.value or (outcome.failure, None, None)
        seconds = time.perf_counter() - start
        return Trial(size, failure, predicted, peak, speed, len(shapes), seconds)

    def pieces(self, size: int) -> int:
        """Return how many pieces a trial's batches have: two stand for any number of them."""
        return MOST_PIECES if size < self.setup.batch_size else 1

    def predicted(self, size: int) -> int | None:
        """Return the peak in bytes predicted of ``size``, worked out once; None where it cannot be."""
        if size not in self._known:
            self._known[size] = self._predict(size)
        return self._known[size]

    def _predict(self, size: int) -> int | None:
        setup = self.setup
        try:
            return predict_peak(
                setup.model, size * self.pieces(size), setup.model.max_seq_length, setup.training,
                micro_batch_size=size, device=self._device, execution=setup.execution,
            )  # fmt: skip
        except CannotPredict:
            return None

    def _hopeless(self, predicted: int) -> str | None:
        """Return why a size need not be run to know that it fails; the first one always is, if it can be."""
        if self._device.type == "cpu" and predicted > (free := free_host_bytes()):
            return f"only {format_bytes(free)} {FREE_HERE}"  # Linux would kill the process, untold
        limit = self.setup.limit_bytes
        if self._begun and predicted > limit * SURE_SHARE:
            return f"far above {format_bytes(limit)}"
        return None

    def _run(self, size: int, shapes: list[tuple[int, ...]]) -> tuple[str | None, int, float | None]:
        """Return why the size fails (None: it does not), its peak in bytes and its tokens/s."""
        setup = self.setup
        recover()  # what the trial before left in the cache would be freed by a retry, and judged as one
        retries = allocator_retries(self._device)
        model = setup.build()
        optimizer = make_optimizer(model, setup.training)
        batch = random_batch(setup.model, size * self.pieces(size), self._device)

        def step() -> None:
            training_step(model, batch, optimizer, setup.training.max_grad_norm, size, shapes)

        for _ in range(WARM_UP_STEPS - 1):
            step()
        reading = meter_for(self._device).measure(step, (model, optimizer, [batch]))
        peak, seconds = reading.judged_bytes, None
        if peak <= setup.limit_bytes:
            seconds = _seconds(step, self._device)
        failure = why_it_fails(peak, setup.limit_bytes, allocator_retries(self._device) - retries)
        return failure, peak, None if seconds is None else batch["targets"].numel() / seconds


def random_batch(
    model: GNNMoEConfig, rows: int, device: torch.device, generator: torch.Generator | None = None
) -> Batch:
    """Return a batch (rows, max_seq_length) of any tokens: what they are does not change what they take."""
    generator = generator or torch.Generator().manual_seed(stream_seed(0, "tune"))
    shape = rows, model.max_seq_length + 1
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def why_it_fails(peak_bytes: int, limit_bytes: int, retries: int) -> str | None:
    """Return why a trial that ran to its end does not fit all the same; None where it does."""
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
    """Return the seconds of the quickest of the measured steps."""
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


def fits_all_ranks(size: int | None, device: torch.device) -> int | None:
    """Return the smallest of the ranks' sizes, by one collective after the search; alone, ``size``.

    None (nothing fits) on any rank is None on all.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return size
    value: Tensor = torch.tensor(size or 0, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN)
    return int(value) or None
