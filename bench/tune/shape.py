"""The shape in which a batch is run, and the proof that it is the one that was run.

A micro-batch is (rows, length). The batch of an update never changes: (B, L) may be cut into (B·L/ℓ, ℓ)
and run in pieces of so many rows, and holds the same tokens and the same targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from bench.training.step import Batch


class ReportedUsedMismatch(RuntimeError):
    """A shape was reported that the model did not see."""


@dataclass(frozen=True)
class Shape:
    """What the model is given at once."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens at once."""
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows} × {self.length}"


def ladder(lengths: Sequence[int], rows: Sequence[int]) -> list[Shape]:
    """Return the shapes from the smallest to the largest, in the order in which they are climbed.

    Up, the length grows first, with the fewest rows, and then the rows at full length; so down, the
    rows shrink first and then the length. The tokens rise with every step.
    """
    lengths, rows = sorted(set(lengths)), sorted(set(rows))
    longer = [Shape(rows[0], length) for length in lengths]
    return longer + [Shape(more, lengths[-1]) for more in rows[1:]]


def lengths_between(shortest: int, longest: int, step: int) -> list[int]:
    """Return the lengths from ``shortest`` to ``longest`` in steps of ``step``, both ends among them."""
    return [*range(shortest, longest, step), longest]


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, rising."""
    return [size for size in range(1, number + 1) if number % size == 0]


def cut(batch: Batch, length: int) -> Batch:
    """Return a batch (B, L) as (B·L/length, length): the same tokens and targets, with less context.

    Raises:
        ValueError: ``length`` does not divide L.
    """
    full = batch["input_ids"].shape[1]
    if full % length:
        raise ValueError(f"a batch of length {full} cannot be cut into sequences of {length} evenly.")
    return batch if length == full else {name: value.reshape(-1, length) for name, value in batch.items()}


@contextmanager
def witnessed(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Yield a list that gets the shape of every ``input_ids`` tensor that the model is called with."""
    seen: list[tuple[int, ...]] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def require_used(said: Shape, seen: Sequence[tuple[int, ...]], served: tuple[int, ...]) -> None:
    """Hold what is reported against the tensors that the model saw in one step.

    ``served``: the shape of the step's batch, of which a piece may hold all rows but never more than
    ``said``.

    Raises:
        ReportedUsedMismatch: another shape was seen, or not the whole batch.
    """
    expected = (min(said.rows, served[0]), said.length)
    others = sorted({shape for shape in seen if shape != expected})
    rows = sum(shape[0] for shape in seen)
    if others or rows != served[0]:
        shown = ", ".join(f"{shape[0]} × {shape[1]}" for shape in others or sorted(set(seen)))
        raise ReportedUsedMismatch(
            f"{said} is reported to be run at once, but the model was given {shown or 'nothing'}: {rows} of "
            f"the {served[0]} rows of the batch in {len(seen)} pieces."
        )
