"""Speed and memory of full training steps, on a copy of the model.

Nothing inside a timed step reads a number back, logs or evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from time import perf_counter

import torch

from bench.config import MeasureConfig, TrainingConfig
from bench.measure.memory import built_bytes, measure_memory
from bench.measure.protocol import StepTimes, Warmup, time_steps
from bench.record import Memory, Speed, WarmupRecord, is_measured, not_measured
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, make_optimizer, real_targets, to_device, training_step
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed


class TrainingSteps:
    """A model that trains for the measurement's sake, with an optimizer of its own, on batches in turn.

    On several ``ranks`` the batches are this rank's parts.
    """

    def __init__(
        self,
        model: GNNMoEModel,
        batches: Sequence[Batch],
        training: TrainingConfig,
        micro_batch_size: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.batches, self.training = model.train(), list(batches), training
        self.ranks, self._parallel = ranks, ranks.parallel(model)
        self.optimizer = make_optimizer(model, training)
        self.micro_batch_size = micro_batch_size
        self._tokens = ranks.totals([real_targets(batch) for batch in batches])

    def step(self, number: int) -> None:
        """Train on batch ``number`` (modulo), in micro-batches where a size is given."""
        batch = self.batches[number % len(self.batches)]
        training_step(
            self._parallel, batch, self.optimizer, self.training.max_grad_norm, self.micro_batch_size, None,
            self.ranks,
        )  # fmt: skip

    def tokens(self, number: int) -> int:
        """Return how many targets count in batch ``number``, over all ranks."""
        return self._tokens[number % len(self._tokens)]

    def forget(self) -> None:
        """Drop gradients and the optimizer's state, as before the first step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


def warmup_of(measure: MeasureConfig) -> Warmup:
    """Return the warm-up that the flags ask for."""
    steps = measure.speed_warmup_steps
    return Warmup.steady() if steps == "auto" else Warmup.fixed(steps)


def measure_speed(steps: TrainingSteps, measure: MeasureConfig, device: torch.device) -> Speed:
    """Time training steps; return the record's ``speed``, as far as the times tell it.

    All step times are kept, those of the warm-up apart; tokens are the targets that count. Of several
    ranks the times are those of the slowest, and the tokens are of all.
    """
    times = time_steps(
        steps.step, device=device, warmup=warmup_of(measure), steps=measure.speed_steps,
        agree=steps.ranks.largest,
    )  # fmt: skip
    rank, times = steps.ranks.worst(times, key=lambda times: sum(times.seconds))
    numbers = range(times.warmup_steps, times.warmup_steps + measure.speed_steps)
    return Speed(
        step_seconds=times.seconds, rank=rank, step_tokens=[steps.tokens(number) for number in numbers],
        matrix_flops_per_second=not_measured("not asked for"), compile_seconds=not_measured("not compiled"),
        marginal=not_measured("not asked for; --marginal measures it"), **dict(warmup_record(times)),
    )  # fmt: skip


def warmup_record(times: StepTimes) -> WarmupRecord:
    """Return how a warm-up went, as a record has it."""
    return WarmupRecord(
        warmup_steps=times.warmup_steps, warmup_seconds=times.warmup_seconds, steady=times.steady,
        remark=times.remark,
    )  # fmt: skip


def peak_memory(steps: TrainingSteps, device: torch.device) -> Memory:
    """Return the record's ``memory``: of one steady step, and by phase.

    ``by_phase``, in bytes: what is held once everything is *built*; the peaks of the *first_step*,
    which makes the optimizer's state, and of a *steady* one. All is of one rank, the one that takes most.
    """
    steps.forget()
    owners = (steps.model, steps.optimizer, steps.batches)
    built = built_bytes(owners, device)
    first, steady = (measure_memory(lambda: steps.step(0), owners, device) for _ in range(2))
    steady.by_phase = {"built": built, "first_step": first.peak_allocated_bytes,
                       "steady": steady.peak_allocated_bytes}  # fmt: skip
    rank, largest = steps.ranks.worst(steady, key=_peak)
    return largest.model_copy(update={"rank": rank})


def _peak(memory: Memory) -> int:
    return memory.peak_allocated_bytes if is_measured(memory.peak_allocated_bytes) else 0


def fetched(
    loader: Iterable[Batch],
    count: int,
    as_run: Callable[[Batch], Batch],
    device: torch.device,
) -> tuple[list[Batch], list[float]]:
    """Return the first batches of a loader on the device, as they are run, and the seconds of each fetch.

    A fetch is what a step waits for at most: where workers or the device are ahead, it waits less.
    """
    batches, seconds = [], []
    rest = islice(iter(loader), count)
    while True:
        start = perf_counter()
        batch = next(rest, None)
        if batch is None:
            return batches, seconds
        batches.append(to_device(as_run(batch), device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)


@contextmanager
def on_host(model: GNNMoEModel, device: torch.device) -> Iterator[None]:
    """Keep the model in the host's memory while the block lasts."""
    model.cpu()
    try:
        yield
    finally:
        model.to(device)


def random_batch(
    model: GNNMoEConfig, rows: int, device: torch.device, generator: torch.Generator | None = None
) -> Batch:
    """Return a batch (rows, max_seq_length) of any tokens: what they are does not change what they take."""
    generator = generator or torch.Generator().manual_seed(stream_seed(0, "tune"))
    shape = rows, model.max_seq_length + 1
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
