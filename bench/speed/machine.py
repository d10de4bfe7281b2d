"""The device: its rates, which are under every floor, and how steps are timed and metered on it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.device import is_out_of_memory, recover
from bench.measure.memory import Owner, built_bytes, meter_for
from bench.measure.timing import (
    Product,
    TimedStep,
    copy_bandwidth,
    matrix_rate,
    products_beside,
    time_in_turn,
)
from bench.record import is_measured
from bench.speed.floors import Rates
from bench.speed.record import SpeedRow
from bench.training.environment import device_name
from gnnmoe.config import GNNMoEConfig

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
SLOW_SECONDS = 2.0
"""A step that takes longer is timed once, beside the other steps."""


@dataclass
class Turn:
    """What came of one of several things that are timed alternating."""

    step: TimedStep | None = None
    first_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    slow: bool = False


class Machine:
    """A device and its rates; each rate is measured when it is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, device_name(device)
        self._bandwidth: float | None = None
        self._flops: dict[str, float] = {}
        self._timed: set[tuple[str, Product]] = set()

    def rates(self, precision: str, model: GNNMoEConfig, tokens: int) -> Rates:
        """Return the highest FLOP/s of matrix products in this precision so far, and bytes/s of a copy.

        The products of a step of ``model`` on ``tokens`` tokens are timed too, if they are new.
        """
        if self._bandwidth is None:
            self._bandwidth = copy_bandwidth(self.device)
        products = {(precision, product) for product in products_beside(model, tokens, self.device)}
        if new := products - self._timed:
            with products_in(precision):
                rate = matrix_rate(self.device, DTYPES[precision], [product for _, product in new])
            self._flops[precision] = max(rate, self._flops.get(precision, 0.0))
            self._timed |= new
        return Rates(self._flops[precision], self._bandwidth)

    def to_record(self) -> dict[str, Any]:
        """Return what was measured of the device."""
        return {
            "device": self.name,
            "copy_bytes_per_second": self._bandwidth,
            "matrix_flops_per_second": self._flops,
        }

    def row(
        self,
        case: str,
        subject: str,
        form: str,
        precision: str,
        batch: int,
        config: GNNMoEConfig,
        layers: int,
        turn: Turn | None = None,
    ) -> SpeedRow:
        """Return the row of a form on this device at the size of a model, with its times if given."""
        turn = turn or Turn()
        return SpeedRow(
            case=case,
            subject=subject,
            form=form,
            device=self.device.type,
            precision=precision,  # pyright: ignore[reportArgumentType]
            batch=batch,
            length=config.max_seq_length,
            experts=config.num_experts,
            width=config.embed_dim,
            layers=layers,
            seconds=turn.seconds,
            first_seconds=turn.first_seconds,
            error=turn.error,
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let float32 matrix products run in TF32, or in float32 alone; bf16 is left to autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- time ------------------------------------------------------------------------------------------


def in_turn(
    names: Sequence[str],
    make: Callable[[str], TimedStep],
    check: Callable[[str, Any], None] | None,
    machine: Machine,
    *,
    rounds: int,
    warmup: int,
) -> dict[str, Turn]:
    """Make the step of each name and call it once; then time all steps in rounds of one call each.

    ``make`` and ``check`` may fail: ``check`` gets a name and the result of its first call. A step that fails
    leaves the other steps alone. A step that takes over two seconds on its second call is timed in one round.
    """
    turns = {name: _first(name, make, check, machine) for name in names}
    steps = {name: turn.step for name, turn in turns.items() if turn.step is not None}
    slow = [name for name, turn in turns.items() if turn.slow]
    for name, seconds in timed(steps, slow, machine.device, rounds=rounds, warmup=warmup).items():
        turns[name].seconds = seconds
    return turns


def timed(
    steps: Mapping[str, TimedStep], slow: Collection[str], device: torch.device, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Return the seconds of each step, timed alternating; the ``slow`` steps join in one more round only."""
    quick = {name: step for name, step in steps.items() if name not in slow}
    found = [time_in_turn(quick, device=device, warmup=warmup, rounds=rounds)] if quick else []
    if len(quick) < len(steps):
        found.append(time_in_turn(steps, device=device, warmup=0, rounds=1))
    return {
        name: [value for times in found if name in times for value in times[name].seconds] for name in steps
    }


def _first(
    name: str,
    make: Callable[[str], TimedStep],
    check: Callable[[str, Any], None] | None,
    machine: Machine,
) -> Turn:
    """Make a step and call it once; a failure becomes text, and what the step held is free again."""
    try:
        step = make(name)
        start = time.perf_counter()
        result = step(0)
        machine.synchronize()
        first = again = time.perf_counter() - start
        if check is not None:
            check(name, result)
        if first > SLOW_SECONDS:  # the cause may be imports, or a compilation
            start = time.perf_counter()
            step(0)
            machine.synchronize()
            again = time.perf_counter() - start
        return Turn(step, first, slow=again > SLOW_SECONDS)
    except Exception as error:
        failure = failure_text(error)
        traceback.clear_frames(error.__traceback__)
    recover()
    return Turn(error=failure)


def failure_text(error: Exception) -> str:
    """Return one short line for an error."""
    lines = str(error).strip().splitlines() or [""]
    kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
    return f"{kind}: {lines[0]}"[:200]


# --- memory ----------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], object], owners: tuple[Owner, ...], device: torch.device) -> int | None:
    """Run ``step`` once and return the peak in bytes of what the step and its ``owners`` hold.

    Other tensors on the device do not count. None if the meter cannot tell.
    """
    others = 0
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - built_bytes(owners, device)
    peak = meter_for(device).measure(step, owners).peak_allocated_bytes
    return peak - others if is_measured(peak) else None


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor], device: torch.device) -> int:
    """Return how many bytes ``forward`` keeps for its backward, beyond its output and ``known`` tensors.

    On CUDA these are the bytes that the allocator gave and did not get back; elsewhere the storages of all
    saved tensors.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        output = forward()
        return torch.cuda.memory_allocated(device) - before - output.untyped_storage().nbytes()
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    for tensor in (*known, output):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
