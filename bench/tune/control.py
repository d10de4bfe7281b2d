"""Memory in training: a step that ran out of it is done again in smaller pieces, and a controller may
change the shape of the steps by their peaks.

``Controller`` decides and is pure; ``ControlledSteps`` carries out what it decides and proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.config import RunConfig
from bench.device import at_once, attempt
from bench.measure.memory import meter_for
from bench.training.loop import Shapes, Step, Steps, random_state, set_random_state
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, UpdateOutOfMemory
from bench.tune.budget import length_bounds, limit_of, training_state_bytes
from bench.tune.shape import Shape, cut, divisors, ladder, require_used, witnessed
from bench.tune.trials import require_batch_applied
from gnnmoe.model import GNNMoEModel

MOST_RECOVERIES = 20  # in a run; each at least halves the micro-batch, so only a huge one gets this far
GROW_SHARE = 0.95  # of the limit: what the next shape up may be expected to take
OUT_OF_MEMORY = "out of memory"
NOTHING_SMALLER = "above the limit, and nothing is smaller"
PATIENCE = 3  # steps with that much room, one after the other, before it grows


@dataclass(frozen=True)
class Decision:
    """A change of shape, or one that waits for the next epoch."""

    step: int
    """The step after which it was decided; it is in force at the next one, unless it is pending."""
    from_rows: int
    from_length: int
    to_rows: int
    to_length: int
    peak_bytes: int | None
    """Measured in that step; None where memory ran out, or where a pending change came into force."""
    reason: str
    pending: bool = False

    def __str__(self) -> str:
        when = "from the next epoch on" if self.pending else "from the next step on"
        peak = "" if self.peak_bytes is None else f", peak {self.peak_bytes / 2**20:,.1f} MiB"
        return (
            f"step {self.step}{peak}: {self.reason}; {self.from_rows} × {self.from_length} at once becomes "
            f"{self.to_rows} × {self.to_length} {when}"
        )


class Controller:
    """Moves along a ladder of shapes: a step up where there is room, a step down above the limit.

    ``shapes``: as ``ladder`` gives them, which are also the bounds. ``fixed_bytes``: what every step
    holds whatever its shape (parameters, optimizer state), so that the rest grows at most in
    proportion to the tokens. A shape that was once too large is never taken again, so for any peaks
    whatever the shapes rise, then fall, and end: there is no oscillation. Rows change at the next
    step, the length at the next epoch. With ``adapt`` false it changes nothing of its own accord.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        start: Shape,
        *,
        limit_bytes: int,
        fixed_bytes: int = 0,
        adapt: bool = True,
    ) -> None:
        self.shapes, self.limit_bytes, self.fixed_bytes = list(shapes), limit_bytes, fixed_bytes
        self.adapt = adapt
        self.decisions: list[Decision] = []
        self._at = self.shapes.index(start)
        self._ceiling = len(self.shapes)  # the least place that was too large
        self._room = 0  # steps with room for the next shape, one after the other
        self._pending: int | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the next step."""
        return self.shapes[self._at]

    def observe(self, step: int, peak_bytes: int) -> Decision | None:
        """Take in the peak of a step at ``shape``; return the change that follows from it, if any."""
        if not self.adapt:
            return None
        if peak_bytes > self.limit_bytes:
            self._room, self._ceiling = 0, min(self._ceiling, self._at)
            if self._pending is not None and self._pending > self._at:
                self._pending = None  # it was to grow
            return self._go(step, self._at - 1, peak_bytes, "above the limit")
        self._room = self._room + 1 if self._has_room(peak_bytes) else 0
        if self._room < PATIENCE:
            return None
        return self._go(step, self._at + 1, peak_bytes, "room for more")

    def begin_epoch(self, step: int) -> Decision | None:
        """Bring a length that was decided on into force; ``step``: the steps done before."""
        if self._pending is None:
            return None
        to, self._pending = self._pending, None
        return self._moved(step, to, None, "a new epoch")

    def ran_out(self, step: int, failed_rows: int, rows: int) -> Decision:
        """Take in that memory ran out with ``failed_rows`` at once, and that ``rows`` are run instead."""
        length = self.shape.length
        self._ceiling = min(self._ceiling, self.shapes.index(Shape(failed_rows, length)))
        return self._moved(step, self.shapes.index(Shape(rows, length)), None, OUT_OF_MEMORY)

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to go on deciding the same."""
        return {
            "rows": self.shape.rows, "length": self.shape.length, "ceiling": self._ceiling,
            "room": self._room, "pending": self._pending, "decisions": self.to_record(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._at = self.shapes.index(Shape(state["rows"], state["length"]))
        self._ceiling, self._room, self._pending = state["ceiling"], state["room"], state["pending"]
        self.decisions = [Decision(**decision) for decision in state["decisions"]]

    def to_record(self) -> list[dict[str, Any]]:
        """Return every decision, ready for JSON."""
        return [asdict(decision) for decision in self.decisions]

    def _has_room(self, peak_bytes: int) -> bool:
        """Say whether the next shape would stay well within the limit, by the most that it can take.

        At each moment of a step memory is a part that does not depend on the batch, at least
        ``fixed_bytes``, and one in proportion to the tokens.
        """
        above = self._at + 1
        if above >= min(self._ceiling, len(self.shapes)):
            return False
        growth = self.shapes[above].tokens / self.shape.tokens
        most = self.fixed_bytes + max(0, peak_bytes - self.fixed_bytes) * growth
        return most <= GROW_SHARE * self.limit_bytes

    def _go(self, step: int, to: int, peak_bytes: int, reason: str) -> Decision | None:
        if to == self._pending:
            return None
        self._room = 0
        if to < 0:
            said = any(decision.reason == NOTHING_SMALLER for decision in self.decisions)
            return None if said else self._decided(step, self.shape, self._at, peak_bytes, NOTHING_SMALLER)
        if self.shapes[to].length == self.shape.length:
            return self._moved(step, to, peak_bytes, reason)
        self._pending = to
        return self._decided(step, self.shape, to, peak_bytes, reason, pending=True)

    def _moved(self, step: int, to: int, peak_bytes: int | None, reason: str) -> Decision:
        before, self._at, self._pending, self._room = self.shape, to, None, 0
        return self._decided(step, before, to, peak_bytes, reason)

    def _decided(
        self, step: int, before: Shape, to: int, peak_bytes: int | None, reason: str, pending: bool = False
    ) -> Decision:
        after = self.shapes[to]
        decision = Decision(
            step, before.rows, before.length, after.rows, after.length, peak_bytes, reason, pending
        )
        self.decisions.append(decision)
        return decision


@dataclass(frozen=True)
class Recovery:
    """One out of memory: the micro-batch that was too large, and the one that came after it."""

    step: int
    failed_micro_batch_size: int
    micro_batch_size: int
    error: str


def next_smaller(unit: int, failed: int) -> int | None:
    """Return the largest divisor of ``unit`` that is half of ``failed`` or less; None where there is none."""
    return max((size for size in divisors(unit) if size <= failed // 2), default=None)


Peak = Callable[[Callable[[], object], tuple[Any, ...]], int]
"""Runs a function once and returns its peak in bytes; the second argument holds memory before it."""


def ignored(_: object) -> None:
    """Tell nobody."""


class ControlledSteps(Steps):
    """Runs the steps of a training; from the first that runs out of memory on, in smaller micro-batches.

    A step that ran out of memory before the optimizer's update is done again from the random state it
    began with, in the largest divisor of ``unit`` (the batch, or what all batches of a schedule are
    multiples of) that is half the micro-batch or less. So the training is the one that had this
    micro-batch from that step on. On several ranks no step is done again: the others wait in a sum.

    With a ``controller`` each step has the shape that it says, cut from the batch that the loader
    handed out, so that a change holds at the next step whatever was fetched ahead, and no block is
    lost or repeated. What the model saw is held against it. With a ``peak`` the controller is told
    of the peak of each step.
    """

    def __init__(
        self,
        model: nn.Module,
        unit: int,
        device: torch.device,
        micro_batch_size: int | None = None,
        *,
        ranks: Ranks = ALONE,
        controller: Controller | None = None,
        peak: Peak | None = None,
        on_recovery: Callable[[Recovery], object] = ignored,
        on_decision: Callable[[Decision], object] = ignored,
    ) -> None:
        super().__init__(micro_batch_size)
        self.controller = controller
        self.recoveries: list[Recovery] = []
        self._model, self._unit, self._device, self._peak = model, unit, device, peak
        self._attempt = attempt if ranks.alone else at_once
        self._on_recovery, self._on_decision = on_recovery, on_decision

    def begin_epoch(self, steps_done: int) -> None:
        """Let a change of length come into force."""
        if self.controller is not None:
            self._say(self.controller.begin_epoch(steps_done))

    def run(
        self, step: Step, batch: Batch, number: int, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor, Shapes]:
        """Do step ``number``, and decide on the shape of the next one.

        Raises:
            torch.OutOfMemoryError: memory runs out with the smallest micro-batch too.
            UpdateOutOfMemory: it ran out inside the update, which is never repeated.
            ReportedUsedMismatch: the model saw another shape than the controller's.
        """
        if self.controller is not None:
            self.micro_batch_size = self.controller.shape.rows
            batch = cut(batch, self.controller.shape.length)
        random = random_state(self._device)
        while True:
            shapes: Shapes = []
            outcome = self._attempt(lambda shapes=shapes: self._once(step, batch, shapes, optimizer))
            if isinstance(outcome.value, UpdateOutOfMemory):
                raise outcome.value
            if outcome.value is not None:
                break
            self._shrink(len(batch["input_ids"]), number, outcome.failure or "")
            set_random_state(random, self._device)
        loss, norm, peak = outcome.value
        if self.controller is not None:
            if peak is not None:
                self._say(self.controller.observe(number, peak))
            self.micro_batch_size = self.controller.shape.rows
        return loss, norm, shapes

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to go on with the same shapes and decisions."""
        return {
            "recovering": {"micro_batch_size": self.micro_batch_size, "recoveries": self.to_record()},
            "control": None if self.controller is None else self.controller.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.micro_batch_size = state["recovering"]["micro_batch_size"]
        self.recoveries = [Recovery(**recovery) for recovery in state["recovering"]["recoveries"]]
        if self.controller is not None:
            self.controller.load_state_dict(state["control"])

    def to_record(self) -> list[dict[str, Any]]:
        """Return every recovery, ready for JSON."""
        return [asdict(recovery) for recovery in self.recoveries]

    def _once(
        self, step: Step, batch: Batch, shapes: Shapes, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor, int | None] | UpdateOutOfMemory:
        """Return loss, gradient norm and peak; an update that may be half done cannot be tried again."""
        done: list[tuple[Tensor, Tensor]] = []

        def once() -> None:
            done.append(step(batch, self.micro_batch_size, shapes))

        peak = None
        try:
            if self.controller is None:
                once()
            else:
                with witnessed(self._model) as seen:
                    if self._peak is None:
                        once()
                    else:
                        peak = self._peak(once, (self._model, optimizer, [batch]))
                require_used(self.controller.shape, seen, tuple(batch["input_ids"].shape))
        except UpdateOutOfMemory as error:
            return error
        return *done[0], peak

    def _shrink(self, rows: int, number: int, error: str) -> None:
        failed = min(rows, self.micro_batch_size or rows)
        smaller = next_smaller(self._unit, failed)
        if smaller is None or len(self.recoveries) == MOST_RECOVERIES:
            raise torch.OutOfMemoryError(f"step {number} does not fit in micro-batches of {failed}: {error}")
        self.micro_batch_size = smaller
        self.recoveries.append(Recovery(number, failed, smaller, error))
        if self.controller is not None:
            self._say(self.controller.ran_out(number, failed, smaller))
        self._on_recovery(self.recoveries[-1])

    def _say(self, decision: Decision | None) -> None:
        if decision is not None:
            self._on_decision(decision)


def steps_of(
    config: RunConfig,
    model: GNNMoEModel,
    unit: int,
    tuned: dict[str, Any] | None,
    device: torch.device,
    ranks: Ranks,
    on_recovery: Callable[[Recovery], object],
    on_decision: Callable[[Decision], object],
) -> ControlledSteps:
    """Return the steps of a run: held to the shape that was found, and controlled where asked.

    ``unit``: rows of which every batch of a rank is a multiple. ``tuned``: the record of a search.

    Raises:
        ParametersNotApplied: a larger batch takes no more memory.
    """
    rows, length = micro_batch_size(config, tuned), config.model.max_seq_length
    shapes, controller, peak = shapes_of(config, unit, tuned), None, None
    if shapes is not None:
        most, adapt = shapes[-1].rows, config.memory.control_memory
        if adapt:
            require_batch_applied(model, length, device)
            peak = _peak(device, ranks)
        controller = Controller(
            shapes, Shape(min(rows or most, most), length),
            limit_bytes=limit_of(config.memory, device, ranks)[1],
            fixed_bytes=_always_held(model), adapt=adapt,
        )  # fmt: skip
    return ControlledSteps(
        model, unit, device, rows, ranks=ranks, controller=controller, peak=peak,
        on_recovery=on_recovery, on_decision=on_decision,
    )  # fmt: skip


def shapes_of(config: RunConfig, unit: int, tuned: dict[str, Any] | None) -> list[Shape] | None:
    """Return the shapes between which the controller of a run may move; None where it has none."""
    length, adapt = config.model.max_seq_length, config.memory.control_memory
    if not adapt and (tuned is None or micro_batch_size(config, tuned) is None):
        return None
    most = config.memory.tune_max_batch_size or unit
    lengths = [length]
    if adapt:
        lengths = [part for part in divisors(length) if part == length or part >= length_bounds(config)[0]]
    return ladder(lengths, [piece for piece in divisors(unit) if piece <= most])


def micro_batch_size(config: RunConfig, tuned: dict[str, Any] | None) -> int | None:
    """Return the rows to run at once: those found, else those asked for; None: whole batches."""
    found = tuned["micro_batch_size"] if tuned else None
    return config.memory.micro_batch_size if found is None else found


def _always_held(model: nn.Module) -> int:
    """Return what a step holds from its beginning to its end: parameters, buffers, optimizer state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return training_state_bytes(model) - sum(p.numel() * p.element_size() for p in trained)


def _peak(device: torch.device, ranks: Ranks) -> Peak:
    meter = meter_for(device)

    def peak(step: Callable[[], object], owners: tuple[Any, ...]) -> int:
        reading = meter.measure(step, owners)
        return ranks.largest(reading.judged_bytes)  # so that all ranks decide the same

    return peak
