"""A run in Weights & Biases while it trains (``--track wandb``)."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from bench.record import Record
from bench.run.prepare import Prepared
from bench.run.trackers import members_of, results_of, values_of_row, values_of_sample
from bench.training.evaluation import CommunicationTrace
from gnnmoe.config import Refused
from gnnmoe.model import GNNMoEModel

PROJECT = "gnnmoe"
NEEDS_NO_ACCOUNT = ("offline", "disabled", "dryrun")


class Tracker:
    """Sends a run's numbers to the project ``gnnmoe`` of Weights & Biases, with the names of TensorBoard's.

    ``WANDB_PROJECT`` and the other variables of wandb count. With ``WANDB_MODE=offline`` no account is
    needed: the files are in the folder ``wandb`` of the run, for ``wandb sync``. A continued run is another
    run there, in the group of its run_id, with all steps. An error ends the tracking with a note.

    Raises:
        Refused: wandb has no account and is not offline.
    """

    def __init__(self, prepared: Prepared) -> None:
        wandb: Any = importlib.import_module("wandb")
        if os.environ.get("WANDB_MODE", "online") not in NEEDS_NO_ACCOUNT and not wandb.login(
            prompt=False, verify=False
        ):
            raise Refused(
                "track is wandb, but wandb has no account; run `wandb login`, or set WANDB_MODE=offline."
            )
        self._prepared = prepared
        self._run: Any = None
        self._members: dict[str, list[str]] = {}

    def begin(self, model: GNNMoEModel, trace: CommunicationTrace, done_steps: int) -> None:
        """Start a run of wandb with the steps that are done."""
        del done_steps  # they are in the history
        self._members = members_of(model)
        self._do(lambda: self._start(trace))

    def row(self, row: dict[str, Any]) -> None:
        """Send a row of the history."""
        self._log(row["step"], values_of_row(row))

    def sample(self, trace: CommunicationTrace) -> None:
        """Send the last sample of the couplers' weights."""
        arrays = trace.arrays()
        self._log(int(arrays["step"][-1]), values_of_sample(arrays, -1, self._members))

    def flush(self) -> None:
        """Do nothing: the process of wandb writes everything that it has been sent."""

    def close(self) -> None:
        """Do nothing: the results are still to come."""

    def finish(self, record: Record) -> None:
        """Send the results, and end the run of wandb."""
        if self._run is not None:
            self._do(lambda: self._end(record))

    def _end(self, record: Record) -> None:
        found = {f"result/{name}": value for name, value in results_of(record).items()}
        self._run.summary.update({"status": record.status, **found})
        self._run.finish(exit_code=0 if record.status == "ok" else 1)

    def _start(self, trace: CommunicationTrace) -> None:
        wandb: Any = importlib.import_module("wandb")
        places, folder = self._prepared.config.places, self._prepared.folder.path
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), group=self._prepared.run_id, dir=str(folder),
            name=places.run_name or self._prepared.run_id, job_type=places.study,
            config=self._prepared.record_config.model_dump(), settings=settings, reinit="create_new",
        )  # fmt: skip
        self._catch_up(trace)

    def _catch_up(self, trace: CommunicationTrace) -> None:
        """Send the history and the samples, in the order of the steps."""
        values: dict[int, dict[str, float]] = defaultdict(dict)
        arrays = trace.arrays()
        for place, step in enumerate(arrays["step"].tolist()):
            values[step] |= values_of_sample(arrays, place, self._members)
        for line in self._prepared.folder.read_history().splitlines():
            row = json.loads(line)
            values[row["step"]] |= values_of_row(row)
        for step in sorted(values):
            self._run.log(values[step], step=step)

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self._run is not None:
            self._do(lambda: self._run.log(values, step=step))

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            why = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"note: nothing more is sent to wandb ({why}); the run goes on", file=sys.stderr)
