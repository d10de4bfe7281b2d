"""What the harness costs: its own training loop beside a bare one, step by step in turn."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench.cli import Interruption
from bench.config import RunConfig
from bench.run.prepare import Prepared, prepare
from bench.run.progress import Reporter
from bench.run.session import TrainingRun
from bench.run.tracker import Tracker
from bench.speeding.machine import Machine
from bench.speeding.rows import SpeedRow
from bench.speeding.targets import BARE, FETCH, HARNESS, HARNESSED
from bench.training.step import Batch, Execution, make_optimizer, to_device
from gnnmoe.model import GNNMoEModel

SUBJECT = "training loop"


class BareLoop:
    """What one would write by hand: forward, backward, clipping and update, and nothing else."""

    def __init__(self, model: GNNMoEModel, config: RunConfig, device: torch.device) -> None:
        self.model, self.device = model.train(), device
        self.optimizer = make_optimizer(model, config.training)
        self.most = config.training.max_grad_norm

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        batch = to_device(batch, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(batch["input_ids"], targets=batch["targets"], return_logits=False)
        output["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.most)
        self.optimizer.step()


class InTurn(TrainingRun):
    """The harness's training, with a step of a bare loop on the same batch after each of its own.

    A step of the harness lasts from the end of the one before to its own end: fetching, counting, the
    learning rate, the step, reading the loss, history, log and display. ``seconds`` has a list for each
    of the three forms, without the last step, which ends with an evaluation.
    """

    def __init__(self, prepared: Prepared, model: GNNMoEModel, bare: BareLoop, machine: Machine) -> None:
        reporter = Reporter(Console(quiet=True), quiet=True)
        super().__init__(prepared, model, reporter, Interruption(), None, Tracker(prepared))
        self.seconds: dict[str, list[float]] = {HARNESSED: [], BARE: [], FETCH: []}
        self._bare, self._machine = bare, machine
        self._batch: Batch = {}
        self._began = 0.0

    def on_batch(self, batch: Batch) -> int:
        """Note when the batch was there."""
        self._fetched, self._batch = time.perf_counter(), batch
        return super().on_batch(batch)

    def after_step(self) -> None:
        """End the harness's step, do a bare one, and begin the next."""
        super().after_step()
        self._machine.synchronize()
        ended = time.perf_counter()
        if self._began and self.trainer.done.steps < self.trainer.plan.total_steps:
            self.seconds[HARNESSED].append(ended - self._began)
            self.seconds[FETCH].append(self._fetched - self._began)
            self.seconds[BARE].append(self._timed_bare_step())
        else:
            self._timed_bare_step()
        self._began = time.perf_counter()

    def _timed_bare_step(self) -> float:
        start = time.perf_counter()
        self._bare.step(self._batch)
        self._machine.synchronize()
        return time.perf_counter() - start


def harness_rows(config: RunConfig, machine: Machine, warmup: int = 3) -> list[SpeedRow]:
    """Train as ``config`` says, in a folder that is deleted after, beside a bare loop; return three rows.

    One step more than those of the warm-up is not timed: the last.
    """
    steps = config.training.max_steps
    assert steps is not None
    assert steps > warmup + 2
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            training=replace(config.training, eval_every=steps),
            data=replace(config.data, num_eval_samples=1),
            places=replace(config.places, results_dir=Path(folder), device=machine.device.type, quiet=True),
        )
        prepared = prepare(config)
        prepared.folder.path.mkdir(parents=True)
        execution = Execution(config.execution, machine.device)
        model = execution.build(prepared.model_config, config.training.seed)
        learning = InTurn(prepared, model, BareLoop(copy.deepcopy(model), config, machine.device), machine)
        learning.run()
    sizes: dict[str, Any] = {
        "batch": config.training.batch_size, "length": config.model.max_seq_length,
        "experts": config.model.num_experts, "width": config.model.embed_dim,
        "layers": config.model.num_layers,
    }  # fmt: skip
    return [SpeedRow(case=HARNESS, subject=SUBJECT, form=form, device=machine.device.type,
                precision=config.execution.precision, seconds=seconds[warmup:], **sizes)
            for form, seconds in learning.seconds.items()]  # fmt: skip
