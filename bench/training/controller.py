"""The memory controller of a training: which shape the next step has, from the peaks of those before.

Pure: it decides, and ``bench.training.controlled`` carries out and proves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.training.shape import Shape

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
