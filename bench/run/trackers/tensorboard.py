"""A run in TensorBoard while it trains (``--track tensorboard``)."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.record import Record, is_measured
from bench.run.prepare import Prepared
from bench.run.trackers import members_of, results_of, values_of_row, values_of_sample
from bench.training.evaluation import CommunicationTrace
from gnnmoe.model import GNNMoEModel

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class Tracker:
    """Writes a run's numbers into the folder ``tensorboard`` of the run.

    By step ``train/loss``, ``train/learning_rate`` and ``train/gradient_norm``; by evaluation
    ``validation/loss`` (nats per token), ``validation/perplexity``, ``hyperedge_weights/layer_0/{0,2}`` and
    ``mixing/layer_0/E0``; as text ``config`` and ``result``. A disk error ends the tracking with a note.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._folder = prepared.folder.path / FOLDER
        self._writer: SummaryWriter | None = None
        self._begun, self._failed = False, False
        self._members: dict[str, list[str]] = {}

    def begin(self, model: GNNMoEModel, trace: CommunicationTrace, done_steps: int) -> None:
        """Continue after ``done_steps`` steps; first write what is known by then and missing.

        Events of an earlier attempt in the same folder that come after these steps no longer count.
        """
        self._members = members_of(model)
        self._begun = True
        earlier = any(self._folder.glob("events.*"))
        going_on = earlier and done_steps > 0
        self._open(purge_step=None if not earlier else done_steps + 1 if going_on else 0)
        if not going_on:
            self._do(lambda writer: self._catch_up(writer, trace))

    def row(self, row: dict[str, Any]) -> None:
        """Show a row of the history."""
        self._do(lambda writer: _add_row(writer, row))

    def sample(self, trace: CommunicationTrace) -> None:
        """Show the last sample of the couplers' weights."""
        self._do(lambda writer: self._add_sample(writer, trace.arrays(), -1))

    def flush(self) -> None:
        """Write everything to the disk, so that a run from the next checkpoint lacks no event."""
        self._do(lambda writer: writer.flush())

    def close(self) -> None:
        """Write what is left and stop the writer's thread."""
        self._do(lambda writer: writer.close())
        self._writer = None

    def finish(self, record: Record) -> None:
        """Add the ``result`` as text, except for an interrupted run, which can continue."""
        if not self._begun or record.status == "interrupted":
            return
        steps = record.used.steps if is_measured(record.used) else 0
        self._open()
        self._do(lambda writer: writer.add_text("result", _table(record), steps))
        self.close()

    def _open(self, purge_step: int | None = None) -> None:
        if not self._failed:
            if not isinstance(threading.excepthook, _Quiet):
                threading.excepthook = _Quiet(threading.excepthook)
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
            except Exception as error:
                self._give_up(error)

    def _do(self, action: Callable[[SummaryWriter], None]) -> None:
        if self._writer is not None:
            try:
                action(self._writer)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer, self._failed = None, True
        why = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"note: nothing more is written for TensorBoard ({why}); the run goes on", file=sys.stderr)

    def _catch_up(self, writer: SummaryWriter, trace: CommunicationTrace) -> None:
        writer.add_text("config", _code(self._prepared.record_config.model_dump()), 0)
        for line in self._prepared.folder.read_history().splitlines():
            _add_row(writer, json.loads(line))
        arrays = trace.arrays()
        for place in range(len(arrays["step"])):
            self._add_sample(writer, arrays, place)

    def _add_sample(self, writer: SummaryWriter, arrays: dict[str, np.ndarray], place: int) -> None:
        for name, value in values_of_sample(arrays, place, self._members).items():
            writer.add_scalar(name, value, int(arrays["step"][place]))


def _add_row(writer: SummaryWriter, row: dict[str, Any]) -> None:
    for name, value in values_of_row(row).items():
        writer.add_scalar(name, value, row["step"])


def _table(record: Record) -> str:
    """Return the results of a run as a Markdown table, without what was not measured."""
    rows = [f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value:,.6g} |"
            for name, value in results_of(record).items()]  # fmt: skip
    return "\n".join(["| quantity | value |", "|---|---|", f"| status | {record.status} |", *rows])


def _code(value: dict[str, Any]) -> str:
    """Return JSON as a Markdown code block."""
    return "\n".join(f"    {line}" for line in json.dumps(value, indent=2, ensure_ascii=False).splitlines())


class _Quiet:
    """Hides the traceback of a writer's thread: the next call of the writer raises the same error."""

    def __init__(self, before: Callable[[threading.ExceptHookArgs], Any]) -> None:
        self.before = before

    def __call__(self, arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            self.before(arguments)
