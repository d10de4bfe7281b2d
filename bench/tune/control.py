"""Memory during training: smaller pieces after an out-of-memory error, and shapes that follow the peak.

``Controller`` decides on the shape of the next step and is pure. ``ControlledSteps`` runs the steps in that
shape, and proves that the model saw it. The batch of an update never changes: a batch (B, L) may be cut into
(B·L/ℓ, ℓ) and run in pieces of some rows, and holds the same tokens and the same targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from bench.tune.find import length_bounds, limit_of, training_state_bytes
from bench.tune.search import Shape, divisors, ladder
from bench.tune.trials import require_batch_applied
from gnnmoe.model import GNNMoEModel

MOST_RECOVERIES = 20  # in a run; each at least halves the micro-batch, so 20 are more than enough
GROW_SHARE = 0.95  # of the limit: the next larger shape may be expected to take so much
PATIENCE = 3  # steps in a row with that much room before the shape grows
OUT_OF_MEMORY = "out of memory"
NOTHING_SMALLER = "above the limit, and nothing is smaller"


# --- The shape of a step, and the proof that the model saw it


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


class ReportedUsedMismatch(RuntimeError):
    """The model did not see the shape that is reported."""


def require_used(said: Shape, seen: Sequence[tuple[int, ...]], served: tuple[int, ...]) -> None:
    """Compare the reported shape with the tensors that the model saw in one step.

    ``served`` is the shape of the step's batch. A piece may hold fewer rows than ``said`` only where it holds
    all rows of the batch.

    Raises:
        ReportedUsedMismatch: the model saw another shape, or not the whole batch.
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


# --- The decisions


@dataclass(frozen=True)
class Decision:
    """A change of shape, or a change that waits for the next epoch."""

    step: int
    """The step after which it was decided; it holds from the next step on, unless it is pending."""
    from_rows: int
    from_length: int
    to_rows: int
    to_length: int
    peak_bytes: int | None
    """The peak of that step; None where memory ran out, or where a pending change takes effect."""
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

    A shape that was too large is never taken again. So, whatever the peaks, the shapes rise, then fall, and
    end: there is no oscillation. Rows change at the next step, the length at the next epoch.

    Args:
        shapes: The ladder (see ``ladder``), from the smallest to the largest shape that may be taken.
        start: The first shape.
        limit_bytes: The highest peak that fits.
        fixed_bytes: What every step holds whatever its shape (parameters, optimizer state); the rest grows at
            most in proportion to the tokens.
        adapt: Decide by the peaks. Without it, only ``ran_out`` changes the shape.
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
        self._room = 0  # steps in a row with room for the next shape
        self._pending: int | None = None

    @property
    def shape(self) -> Shape:
        """The shape of the next step."""
        return self.shapes[self._at]

    def observe(self, step: int, peak_bytes: int) -> Decision | None:
        """Take in the peak of a step at ``shape``; return the change that follows, if any."""
        if not self.adapt:
            return None
        if peak_bytes > self.limit_bytes:
            self._room, self._ceiling = 0, min(self._ceiling, self._at)
            if self._pending is not None and self._pending > self._at:
                self._pending = None  # the shape was to grow
            return self._go(step, self._at - 1, peak_bytes, "above the limit")
        self._room = self._room + 1 if self._has_room(peak_bytes) else 0
        if self._room < PATIENCE:
            return None
        return self._go(step, self._at + 1, peak_bytes, "room for more")

    def begin_epoch(self, step: int) -> Decision | None:
        """Let a pending change of length take effect; ``step`` is the number of steps done."""
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
        """Return what ``load_state_dict`` needs to make the same decisions."""
        return {
            "rows": self.shape.rows,
            "length": self.shape.length,
            "ceiling": self._ceiling,
            "room": self._room,
            "pending": self._pending,
            "decisions": self.to_record(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._at = self.shapes.index(Shape(state["rows"], state["length"]))
        self._ceiling, self._room, self._pending = state["ceiling"], state["room"], state["pending"]
        self.decisions = [Decision(**decision) for decision in state["decisions"]]

    def to_record(self) -> list[dict[str, Any]]:
        """Return every decision, ready for JSON."""
        return [asdict(decision) for decision in self.decisions]

    def _has_room(self, peak_bytes: int) -> bool:
        """Return whether the next shape would stay well within the limit, by the most that it can take.

        At each moment of a step, memory has a part that does not depend on the batch, at least
        ``fixed_bytes``, and a part in proportion to the tokens.
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


# --- The steps


@dataclass(frozen=True)
class Recovery:
    """One out-of-memory error: the micro-batch that was too large, and the micro-batch that followed."""

    step: int
    failed_micro_batch_size: int
    micro_batch_size: int
    error: str


def next_smaller(unit: int, failed: int) -> int | None:
    """Return the largest divisor of ``unit`` that is at most half of ``failed``; None where there is none."""
    return max((size for size in divisors(unit) if size <= failed // 2), default=None)


Peak = Callable[[Callable[[], object], tuple[Any, ...]], int]
"""Runs a function once and returns its peak in bytes; the second argument holds memory before."""


def ignored(_: object) -> None:
    """Tell nobody."""


class ControlledSteps(Steps):
    """Runs the steps of a training, and repeats a step that ran out of memory in smaller micro-batches.

    A step that ran out of memory before the optimizer's update is repeated from its first random state. The
    new micro-batch is the largest divisor of ``unit`` that is at most half of the old micro-batch. So the
    training equals a training with this micro-batch from that step on. On several ranks no step is repeated,
    because the other ranks wait in a sum.

    With a ``controller``, each step has the controller's shape, cut from the batch of the loader. So a change
    holds at the next step whatever was fetched ahead, and no block is lost or repeated. The shapes that the
    model saw are compared with the controller's shape.

    Args:
        model: The model that the steps train.
        unit: The rows of which every batch is a multiple: the batch size, or the greatest common divisor of a
            schedule.
        device: The model's device.
        micro_batch_size: The first micro-batch; None: whole batches.
        ranks: The processes that share each batch.
        controller: Decides on the shape.
        peak: Measures a step's peak for the controller; None: the controller sees no peaks.
        on_recovery: Receives each recovery.
        on_decision: Receives each decision of the controller.
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
        """Let a pending change of length take effect."""
        if self.controller is not None:
            self._say(self.controller.begin_epoch(steps_done))

    def run(
        self, step: Step, batch: Batch, number: int, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor, Shapes]:
        """Do step ``number``, and decide on the shape of the next step.

        Raises:
            torch.OutOfMemoryError: memory runs out with the smallest micro-batch too.
            UpdateOutOfMemory: memory ran out inside the update, which is never repeated.
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
        """Return what ``load_state_dict`` needs to continue with the same shapes and decisions."""
        return {
            "recovering": {"micro_batch_size": self.micro_batch_size, "recoveries": self.to_record()},
            "control": None if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
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
        """Return loss, gradient norm and peak; return the error of an update, which cannot be repeated."""
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


# --- The steps of a run


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
    """Return the steps of a run, in the shape that was found, and controlled where the config asks for it.

    ``unit``: the rows of which every batch of a rank is a multiple. ``tuned``: the record of a search.

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
            shapes,
            Shape(min(rows or most, most), length),
            limit_bytes=limit_of(config.memory, device, ranks)[1],
            fixed_bytes=_always_held(model),
            adapt=adapt,
        )
    return ControlledSteps(
        model,
        unit,
        device,
        rows,
        ranks=ranks,
        controller=controller,
        peak=peak,
        on_recovery=on_recovery,
        on_decision=on_decision,
    )


def shapes_of(config: RunConfig, unit: int, tuned: dict[str, Any] | None) -> list[Shape] | None:
    """Return the shapes between which the controller of a run may move; None where it has no controller."""
    length, adapt = config.model.max_seq_length, config.memory.control_memory
    if not adapt and (tuned is None or micro_batch_size(config, tuned) is None):
        return None
    most = config.memory.tune_max_batch_size or unit
    lengths = [length]
    if adapt:
        lengths = [part for part in divisors(length) if part == length or part >= length_bounds(config)[0]]
    return ladder(lengths, [piece for piece in divisors(unit) if piece <= most])


def micro_batch_size(config: RunConfig, tuned: dict[str, Any] | None) -> int | None:
    """Return the rows to run at once: as found, else as asked for; None: whole batches."""
    found = tuned["micro_batch_size"] if tuned else None
    return config.memory.micro_batch_size if found is None else found


def _always_held(model: nn.Module) -> int:
    """Return the bytes that every step holds from start to end: parameters, buffers, optimizer state."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return training_state_bytes(model) - sum(p.numel() * p.element_size() for p in trained)


def _peak(device: torch.device, ranks: Ranks) -> Peak:
    meter = meter_for(device)

    def peak(step: Callable[[], object], owners: tuple[Any, ...]) -> int:
        reading = meter.measure(step, owners)
        return ranks.largest(reading.judged_bytes)  # so that all ranks decide the same

    return peak
