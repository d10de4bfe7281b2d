"""Out of memory in a training step: the same batch again in smaller micro-batches, nothing skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.training.micro_batches import next_smaller
from bench.training.step import UpdateOutOfMemory

MOST_RECOVERIES = 20  # in a run; each at least halves the micro-batch, so only a huge one gets this far

Shapes = list[tuple[int, ...]]
Step = Callable[[int | None, Shapes], tuple[Tensor, Tensor]]


class Attempted(Protocol):
    """What came of an attempt: a value, or why memory ran out."""

    @property
    def value(self) -> Any:
        """What the function returned."""
        ...

    @property
    def failure(self) -> str | None:
        """The text of the out-of-memory error; None: there was none."""
        ...


Attempt = Callable[[Callable[[], Any]], Attempted]
"""Runs a function; where memory runs out, gives back what the function held (``bench.measure.recovery``)."""


@dataclass(frozen=True)
class Recovery:
    """One out of memory: the micro-batch that was too large, and the one that came after it."""

    step: int
    failed_micro_batch_size: int
    micro_batch_size: int
    error: str


class Recovering:
    """Does training steps; from the first that runs out of memory on, in smaller micro-batches.

    A step that ran out of memory before the optimizer's update is done again from the random state it
    began with, in the largest divisor of ``unit`` (the batch, or what all batches of a schedule are
    multiples of) that is half the micro-batch or less. So the training is the one that had this
    micro-batch from that step on.
    """

    def __init__(
        self, micro_batch_size: int | None, unit: int, device: torch.device, attempt: Attempt
    ) -> None:
        self.micro_batch_size = micro_batch_size
        """Rows of a piece; None: the whole batch."""
        self.recoveries: list[Recovery] = []
        self.unit = unit
        """Rows of which every batch that is trained on is a multiple; a piece is one of its divisors."""
        self._device, self._attempt = device, attempt

    def __call__(
        self, step: Step, rows: int, number: int, announce: Callable[[Recovery], None]
    ) -> tuple[Tensor, Tensor, Shapes]:
        """Do step ``number`` on a batch of ``rows``; return its loss, gradient norm and pieces' shapes.

        Raises:
            torch.OutOfMemoryError: memory runs out with the smallest micro-batch too.
            UpdateOutOfMemory: it ran out inside the update, which is never repeated.
        """
        random = random_state(self._device)
        while True:
            shapes: Shapes = []
            outcome = self._attempt(lambda shapes=shapes: _or_half_done(step, self.micro_batch_size, shapes))
            if isinstance(outcome.value, UpdateOutOfMemory):
                raise outcome.value
            if outcome.failure is None:
                return *outcome.value, shapes
            self._shrink(rows, number, outcome.failure, announce)
            set_random_state(random, self._device)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to go on with the same micro-batches."""
        return {"micro_batch_size": self.micro_batch_size, "recoveries": self.to_record()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.micro_batch_size = state["micro_batch_size"]
        self.recoveries = [Recovery(**recovery) for recovery in state["recoveries"]]

    def to_record(self) -> list[dict[str, Any]]:
        """Return every recovery, ready for JSON."""
        return [asdict(recovery) for recovery in self.recoveries]

    def _shrink(self, rows: int, number: int, error: str, announce: Callable[[Recovery], None]) -> None:
        failed = min(rows, self.micro_batch_size or rows)
        smaller = next_smaller(self.unit, failed)
        if smaller is None or len(self.recoveries) == MOST_RECOVERIES:
            raise torch.OutOfMemoryError(f"step {number} does not fit in micro-batches of {failed}: {error}")
        self.recoveries.append(Recovery(number, failed, smaller, error))
        self.micro_batch_size = smaller
        announce(self.recoveries[-1])


def _or_half_done(
    step: Step, micro_batch_size: int | None, shapes: Shapes
) -> tuple[Tensor, Tensor] | UpdateOutOfMemory:
    """Return what ``step`` does; an update that may be half done is no attempt that can be repeated."""
    try:
        return step(micro_batch_size, shapes)
    except UpdateOutOfMemory as error:
        return error


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return torch's random state on the CPU and, where there is one, on the CUDA device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Go back to what ``random_state`` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
