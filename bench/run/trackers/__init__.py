"""Where a run shows its numbers while it trains: one file per tracker, named as ``--track`` names it.

A tracker file has a class ``Tracker(prepared)`` with the methods of ``Tracker`` below. A tracker that fails
prints a note, and the run continues. Nothing reads a tracker's files: records, tables and plots come from the
run's own files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from bench.record import Record
    from bench.training.evaluation import CommunicationTrace
    from gnnmoe.model import GNNMoEModel


class Tracker(Protocol):
    """What a run tells a tracker."""

    def begin(self, model: GNNMoEModel, trace: CommunicationTrace, done_steps: int) -> None:
        """Continue after ``done_steps`` steps; first write what is known by then and missing."""

    def row(self, row: dict[str, Any]) -> None:
        """Take a row of history.jsonl."""

    def sample(self, trace: CommunicationTrace) -> None:
        """Take the last sample of the couplers' weights."""

    def flush(self) -> None:
        """Write everything to the disk, before a checkpoint is saved."""

    def close(self) -> None:
        """Write what is left and stop all threads."""

    def finish(self, record: Record) -> None:
        """Take the record of the run at its end."""
