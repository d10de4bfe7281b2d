"""Training steps in the shape that a controller says, each proved by the tensors that the model saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bench.training.controller import Controller, Decision
from bench.training.recovering import Recovering, Recovery, Step
from bench.training.recovering import Shapes as Pieces
from bench.training.shape import cut, require_used, witnessed
from bench.training.step import Batch

Peak = Callable[[Callable[[], object], Batch], int]
"""Runs a function once and returns its peak in bytes; the batch is held before it."""


class StepControl:
    """Stands around the steps of a trainer.

    Sets the micro-batch of ``recovering`` before each step, cuts the batch to the length, measures the
    peak where a meter is given, and after the step asks the controller for the next shape. Micro-batch
    and length act on the batch that the loader has handed out, so that a change holds at the next step
    whatever was fetched ahead, and no block is lost or repeated.
    """

    def __init__(
        self,
        controller: Controller,
        model: nn.Module,
        announce: Callable[[Decision], object],
        peak: Peak | None = None,
    ) -> None:
        self.controller, self._model, self._announce, self._meter = controller, model, announce, peak
        self._batch: Batch = {}
        self._peak: int | None = None

    def begin_epoch(self, steps_done: int) -> None:
        """Let a change of length come into force."""
        self._say(self.controller.begin_epoch(steps_done))

    def prepared(self, batch: Batch, recovering: Recovering) -> Batch:
        """Return the batch in sequences of the length that is in force, and set the micro-batch."""
        recovering.micro_batch_size = self.controller.shape.rows
        self._batch, self._peak = cut(batch, self.controller.shape.length), None
        return self._batch

    def watched(self, step: Step) -> Step:
        """Return ``step``, measured and held against what the controller says.

        Raises (when it is called):
            ReportedUsedMismatch: the model saw another shape.
        """

        def watching(micro_batch_size: int | None, shapes: Pieces) -> Any:
            done: list[Any] = []
            with witnessed(self._model) as seen:
                if self._meter is None:
                    done.append(step(micro_batch_size, shapes))
                else:
                    self._peak = self._meter(lambda: done.append(step(micro_batch_size, shapes)), self._batch)
            require_used(self.controller.shape, seen, tuple(self._batch["input_ids"].shape))
            return done[0]

        return watching

    def recovered(self, recovery: Recovery) -> None:
        """Take in that memory ran out and that smaller micro-batches are run from here on."""
        self._say(self.controller.ran_out(
            recovery.step, recovery.failed_micro_batch_size, recovery.micro_batch_size
        ))  # fmt: skip

    def after_step(self, step: int, recovering: Recovering) -> None:
        """Decide on the next step's shape."""
        if self._peak is not None:
            self._say(self.controller.observe(step, self._peak))
        recovering.micro_batch_size = self.controller.shape.rows

    def _say(self, decision: Decision | None) -> None:
        if decision is not None:
            self._announce(decision)
