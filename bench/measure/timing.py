"""How this project times steps: a warm-up, then each step by itself, with nothing read back in between.

On CUDA an event is recorded before and after each step, and the host waits once at the end. Elsewhere a
clock is read. All times are kept. To compare two things, time them alternating in one process; two absolute
times say little. In turn, each step begins on an idle device: otherwise the work of one step would hide how
long the host takes to launch the next.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.config import RunConfig, TrainingConfig
from bench.measure.memory import predict_peak
from bench.measure.rates import paired_ratios
from bench.record import Warmup
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, Execution, make_optimizer, real_targets, training_step
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed

TimedStep = Callable[[int], object]
"""One step, given its number: warm-up steps are 0, 1, …, and the timed steps go on from there."""
WarmupSteps = int | Literal["auto"]
"""How many warm-up steps; auto: until the median of ten steps moves by less than 2%, at most 50 steps."""
Product = tuple[int, int, int]
"""A matrix product: rows, inner size and columns."""
Agree = Callable[[float], float]
"""Makes one number of the numbers of several ranks, so that all ranks warm up equally long."""

WINDOW_STEPS, MOST_WARMUP_STEPS, TOLERANCE = 10, 50, 0.02
CUDA_SIZES, CPU_SIZES = (4096, 8192), (512, 1024, 2048, 4096)  # rows of the square matrices that are timed
MOST_PRODUCT_SECONDS = 1.0
CUDA_COPY_BYTES, CPU_COPY_BYTES = 2**30, 2**28  # well beyond any cache


@dataclass(frozen=True)
class StepTimes:
    """The seconds of each timed step, and how the warm-up before them went."""

    seconds: list[float]
    warmup_seconds: list[float]
    steady: bool
    moved: float | None
    """The share by which the median of ten steps moved at the end of an automatic warm-up."""

    @property
    def median(self) -> float:
        """The median of the timed steps in seconds."""
        return statistics.median(self.seconds)

    @property
    def warmup(self) -> Warmup:
        """How the warm-up went, as a record keeps it."""
        steps = len(self.warmup_seconds)
        remark = f"not steady: the warm-up was fixed to {steps} step{'s' * (steps != 1)}"
        if self.moved is not None:
            steady = "steady" if self.steady else "not steady"
            remark = f"{steady}: after {steps} warm-up steps, the median of {WINDOW_STEPS} steps"
            remark += f" {'changed' if self.steady else 'still changed'} by {self.moved:.1%}"
        return Warmup(
            warmup_steps=steps, warmup_seconds=self.warmup_seconds, steady=self.steady, remark=remark
        )


def time_steps(
    step: TimedStep, *, device: torch.device, warmup: WarmupSteps, steps: int, agree: Agree = float
) -> StepTimes:
    """Warm up, then time ``steps`` calls of ``step``, each by itself."""
    return _time({"": step}, device, warmup, steps, agree, idle=False)[""]


def time_in_turn(
    steps: Mapping[str, TimedStep],
    *,
    device: torch.device,
    warmup: WarmupSteps,
    rounds: int,
    agree: Agree = float,
) -> dict[str, StepTimes]:
    """Warm up each step by itself, then time them alternating: each round takes one step of each.

    Every other round goes backwards, so that a machine that slows down slows all of them alike. The times
    of one round belong together (``bench.measure.rates.paired_ratios``).
    """
    return _time(steps, device, warmup, rounds, agree, idle=True)


def _time(
    steps: Mapping[str, TimedStep],
    device: torch.device,
    warmup: WarmupSteps,
    rounds: int,
    agree: Agree,
    *,
    idle: bool,
) -> dict[str, StepTimes]:
    assert rounds > 0
    assert steps
    warmed = {name: _warm_up(step, device, warmup, agree) for name, step in steps.items()}
    forwards = list(steps)
    order = [(name, number) for number in range(rounds) for name in forwards[:: -1 if number % 2 else 1]]
    calls = [(steps[name], len(warmed[name][0]) + number) for name, number in order]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for (name, _), value in zip(order, _seconds(calls, device, idle), strict=True):
        seconds[name].append(value)
    return {name: StepTimes(seconds[name], *warmed[name]) for name in steps}


def _warm_up(
    step: TimedStep, device: torch.device, warmup: WarmupSteps, agree: Agree
) -> tuple[list[float], bool, float | None]:
    """Return the seconds of the warm-up steps, whether they became steady, and the last move."""
    if warmup != "auto":
        return _seconds([(step, number) for number in range(warmup)], device), False, None
    seconds: list[float] = []
    median, moved = None, None
    while len(seconds) < MOST_WARMUP_STEPS and (moved is None or moved >= TOLERANCE):
        numbers = range(len(seconds), len(seconds) + WINDOW_STEPS)
        window = _seconds([(step, number) for number in numbers], device)
        seconds += window
        before, median = median, statistics.median(window)
        moved = None if before is None else agree(abs(median / before - 1))
    assert moved is not None
    return seconds, moved < TOLERANCE, moved


def _seconds(calls: Sequence[tuple[TimedStep, int]], device: torch.device, idle: bool = False) -> list[float]:
    """Return the seconds of each call; with ``idle`` each call begins when the device has nothing to do."""
    if device.type == "cuda":
        return _seconds_by_events(calls, device, idle)
    seconds = []
    for step, number in calls:
        start = perf_counter()
        step(number)
        if device.type == "mps":
            torch.mps.synchronize()
        seconds.append(perf_counter() - start)
    return seconds


def _seconds_by_events(
    calls: Sequence[tuple[TimedStep, int]], device: torch.device, idle: bool
) -> list[float]:
    """Return the seconds between the events around each call; the host waits at the end, or for ``idle``."""
    stream = torch.cuda.current_stream(device)
    events = []
    torch.cuda.synchronize(device)
    for step, number in calls:
        if idle:
            torch.cuda.synchronize(device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        step(number)
        after.record(stream)
        events.append((before, after))
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def matrix_rate(device: torch.device, dtype: torch.dtype, products: Iterable[Product]) -> float:
    """Return the highest FLOP/s that one of ``products`` of ``dtype`` reaches on this device now.

    The FLOPs of a product are divided by its median time, under the settings of the process (tf32, threads).
    A product is left out if it would take more than a second at the rate of the next smaller one.
    """
    rates: list[float] = []
    for product in sorted(set(products), key=math.prod):
        flops = 2 * math.prod(product)
        if rates and flops / rates[-1] > MOST_PRODUCT_SECONDS:
            break
        rates.append(flops / _product_seconds(product, device, dtype))
    return max(rates)


def _product_seconds(product: Product, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)  # zeros would draw less power and run faster
    rows, inner, columns = product
    left, right = (
        torch.randn(shape, device=device, generator=generator).to(dtype)
        for shape in ((rows, inner), (inner, columns))
    )
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return time_steps(lambda _: torch.mm(left, right, out=out), device=device, warmup=1, steps=5).median


def products_beside(model: GNNMoEConfig, tokens: int, device: torch.device) -> list[Product]:
    """Return the products whose rate a step of ``model`` on ``tokens`` tokens is compared with.

    These are large square products of several sizes, since the processor decides which size is fastest, and
    products of the step itself: maps of the experts and the coupler, and the gradient of a weight.
    """
    squares = [(size, size, size) for size in (CUDA_SIZES if device.type == "cuda" else CPU_SIZES)]
    D, F = model.embed_dim, model.expert_width
    maps = [(tokens, D, D), (model.num_experts * tokens, D, D), (tokens, D, F), (tokens, F, D)]
    return [*squares, *maps, (D, tokens, F)]


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes/s of a large copy within the device's memory, read and written, by the median."""
    count = CUDA_COPY_BYTES if device.type == "cuda" else CPU_COPY_BYTES
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = time_steps(lambda _: target.copy_(source), device=device, warmup=5, steps=15)
    return 2 * count / times.median


# --- training steps and what they cost ------------------------------------------------------------

TRAINING = 3
"""FLOPs of forward and backward over those of the forward: each product has two in the backward."""
WARMUP_STEPS = 2  # the first step makes the optimizer's state, the second finds the caches filled
STEPS, ROUNDS = 3, 9


class TrainingSteps:
    """A model that trains in order to be measured, with an optimizer of its own, on alternating batches.

    On several ranks, ``batches`` are the parts of this rank.
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

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """Train on batch ``number`` (modulo), in micro-batches if a size is given; return loss and norm."""
        batch, norm = self.batches[number % len(self.batches)], self.training.max_grad_norm
        rows, ranks = self.micro_batch_size, self.ranks
        return training_step(self._parallel, batch, self.optimizer, norm, rows, None, ranks)

    def tokens(self, number: int) -> int:
        """Return how many targets count in batch ``number``, over all ranks."""
        return self._tokens[number % len(self._tokens)]

    def forget(self) -> None:
        """Drop the gradients and the optimizer's state, as before the first step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


def random_batch(
    model: GNNMoEConfig, rows: int, device: torch.device, generator: torch.Generator | None = None
) -> Batch:
    """Return a batch (rows, max_seq_length) of random tokens, which cost the same as real tokens."""
    generator = generator or torch.Generator().manual_seed(stream_seed(0, "tune"))
    shape = rows, model.max_seq_length + 1
    tokens = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


@torch.no_grad()
def training_flops_per_token(model: GNNMoEModel) -> float:
    """Return the FLOPs of forward and backward for each token of one sequence of full length.

    They are three times those of a forward, which ``torch.utils.flop_counter`` counts on a copy on the CPU.
    The copy has plain logits and plain attention, since the counter does not know the chunked head and the
    fused attention. Recomputation in the backward does not count. Attention counts whole, as is usual,
    although half of it is masked.
    """
    copied = copy.deepcopy(model).cpu().eval()
    length = copied.config.max_seq_length
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copied(torch.zeros(1, length, dtype=torch.int64))
    return TRAINING * counter.get_total_flops() / length


@dataclass(frozen=True)
class Training:
    """A planned training: its model, how and with which batches it is trained, and on which device."""

    model: GNNMoEConfig
    config: RunConfig
    device: torch.device

    @property
    def micro_batch_size(self) -> int:
        """Rows that run at once, according to the flags."""
        return self.config.memory.micro_batch_size or self.config.training.batch_size

    def peak_bytes(self) -> int:
        """Return the predicted peak of allocated memory in a training step, in bytes.

        Raises:
            CannotPredict: the coupler's operations depend on the numbers in its tensors.
        """
        training = self.config.training
        return predict_peak(
            self.model,
            training.batch_size,
            self.model.max_seq_length,
            training,
            micro_batch_size=self.micro_batch_size,
            device=self.device,
            execution=self.config.execution,
        )

    def steps(self) -> TrainingSteps:
        """Return full training steps of a new model on a batch of random tokens."""
        execution, training = Execution(self.config.execution, self.device), self.config.training
        model = execution.build(self.model, training.seed)
        execution.compile(model)
        batch = random_batch(self.model, training.batch_size, self.device)
        return TrainingSteps(model, [batch], training, self.micro_batch_size)

    def step_seconds(self) -> float:
        """Return the median of a few training steps, which run now."""
        return time_steps(self.steps().step, device=self.device, warmup=WARMUP_STEPS, steps=STEPS).median


def step_time_ratio(ours: Training, theirs: Training) -> float:
    """Return our step time over theirs: the median ratio of a few rounds, which run now, alternating."""
    steps = {"ours": ours.steps().step, "theirs": theirs.steps().step}
    times = time_in_turn(steps, device=ours.device, warmup=WARMUP_STEPS, rounds=ROUNDS)
    return statistics.median(paired_ratios(times["ours"].seconds, times["theirs"].seconds))
