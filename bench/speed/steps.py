"""Whole training steps of several kinds, alternating; and the harness beside a bare loop, step by step.

A whole step is forward, backward, clipping and update, with nothing read back.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from bench.config import ExecutionConfig, RunConfig, TrainingConfig
from bench.interruption import Interruption
from bench.measure.rates import over_the_rate
from bench.measure.timing import TRAINING, TimedStep, TrainingSteps, random_batch
from bench.run.prepare import Prepared, prepare
from bench.run.progress import Reporter
from bench.run.session import TrainingRun
from bench.speed.forms import largest_difference
from bench.speed.machine import Machine, Turn, in_turn, peak_bytes
from bench.speed.record import BARE, FETCH, HARNESS, HARNESSED, SpeedRow
from bench.training.step import Batch, Execution, make_optimizer, to_device
from gnnmoe.config import GNNMoEConfig
from gnnmoe.head import IGNORED, TiedHead
from gnnmoe.model import GNNMoEModel

BATCHES = 3
LEARNING_RATE = 1e-4  # random tokens teach nothing; a step must stay finite


# --- whole steps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One kind of step: how the model is executed, and whether its head holds all logits at once."""

    name: str
    execution: ExecutionConfig
    plain_head: bool = False
    config: GNNMoEConfig | None = None
    """The model, if it differs from the common model; it is compared with the first variant of that model."""


def executed(experts: str, precision: str, compile_mode: str | None = None) -> ExecutionConfig:
    """Return how a model is executed; ``compile_mode`` None means eager."""
    config = ExecutionConfig(experts=experts, precision=precision)  # pyright: ignore[reportArgumentType]
    if compile_mode is None:
        return config
    return replace(config, compile=True, compile_mode=compile_mode)  # pyright: ignore[reportArgumentType]


def steps_of(variant: Variant, config: GNNMoEConfig, batch: int, device: torch.device) -> TrainingSteps:
    """Return the training steps of one variant, on batches of random tokens."""
    execution = Execution(variant.execution, device)
    model = execution.build(variant.config or config, 0)
    if variant.plain_head:
        hold_all_logits(model)
    execution.compile(model)
    generator = torch.Generator().manual_seed(0)
    batches = [random_batch(model.config, batch, device, generator) for _ in range(BATCHES)]
    return TrainingSteps(model, batches, TrainingConfig(learning_rate=LEARNING_RATE))


def hold_all_logits(model: GNNMoEModel) -> None:
    """Let the model's head compute its loss over all logits at once, without chunks."""
    head = model.head
    assert isinstance(head, TiedHead)

    def loss(hidden_ND: Tensor, embedding_VD: Tensor, targets_N: Tensor) -> Tensor:
        logits = F.linear(hidden_ND, embedding_VD, head.padded_bias())
        return F.cross_entropy(logits, targets_N, ignore_index=IGNORED)

    head.loss = loss


def step_rows(
    case: str,
    variants: Sequence[Variant],
    config: GNNMoEConfig,
    batch: int,
    machine: Machine,
    *,
    rounds: int,
    warmup: int = 3,
    memory: bool = True,
) -> list[SpeedRow]:
    """Time whole steps of one batch, alternating; a step that fails becomes a row with its error.

    Loss and gradient norm of the first step are compared with those of the first variant of the same model.
    That model is ``config`` for a variant without a config of its own.
    """
    by_name = {variant.name: variant for variant in variants}
    steps: dict[str, TrainingSteps] = {}
    differences: dict[str, float] = {}
    expected: list[tuple[GNNMoEConfig | None, Tensor]] = []

    def make(name: str) -> TimedStep:
        steps[name] = steps_of(by_name[name], config, batch, machine.device)
        return steps[name].step

    def check(name: str, found: tuple[Tensor, Tensor]) -> None:
        loss_and_norm, own = torch.stack(found).double(), by_name[name].config
        first = next((value for model, value in expected if model == own), None)
        if first is None:
            expected.append((own, first := loss_and_norm))
        differences[name] = largest_difference(loss_and_norm, first, first.abs())

    turns = in_turn(list(by_name), make, check, machine, rounds=rounds, warmup=warmup)
    rows = []
    for name, variant in by_name.items():
        of, precision = variant.config or config, variant.execution.precision
        subject = "step" if variant.config else f"step, {config.coupler_type}"
        row = machine.row(case, subject, name, precision, batch, of, of.num_layers, turns[name])
        row.largest_difference = differences.get(name)
        if row.error is None:
            _measure_beside(row, variant, steps[name], machine, memory)
        rows.append(row)
    return rows


def _measure_beside(
    row: SpeedRow, variant: Variant, steps: TrainingSteps, machine: Machine, memory: bool
) -> None:
    """Add the FLOPs of a step, the matrix rate, and the peak of one more step to its row."""
    own = steps.model.flops(row.batch, row.length)
    row.flops = None if own is None else TRAINING * own
    rates = machine.rates(row.precision, steps.model.config, row.tokens)
    row.matrix_flops_per_second = rates.flops_per_second
    row.remark = over_the_rate(row.mfu or 0.0)
    if memory and variant.execution.compile_mode == "reduce-overhead":
        unseen = "CUDA graphs hold their memory in a pool of their own: no peak of the step is known"
        row.remark = "; ".join(filter(None, [row.remark, unseen]))
    elif memory:
        steps.optimizer.zero_grad(set_to_none=True)
        owners = steps.model, steps.optimizer, steps.batches
        row.peak_bytes = peak_bytes(lambda: steps.step(0), owners, machine.device)


# --- the harness -----------------------------------------------------------------------------------


class BareLoop:
    """A training loop as one writes it by hand: forward, backward, clipping and update, and nothing else."""

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
    """The harness's training; after each of its steps, the bare loop takes a step on the same batch.

    A step of the harness lasts from the end of the bare step to its own end: fetching, counting, the learning
    rate, the step, reading the loss, history, log and display. ``seconds`` has a list for each of the three
    forms, without the last step, which ends with an evaluation.
    """

    def __init__(self, prepared: Prepared, model: GNNMoEModel, bare: BareLoop, machine: Machine) -> None:
        reporter = Reporter(Console(quiet=True), quiet=True)
        super().__init__(prepared, model, reporter, Interruption(), None, [])
        self.seconds: dict[str, list[float]] = {HARNESSED: [], BARE: [], FETCH: []}
        self._bare, self._machine = bare, machine
        self._batch: Batch = {}
        self._began = 0.0

    def on_batch(self, batch: Batch) -> int:
        """Note when the batch arrived."""
        self._fetched, self._batch = time.perf_counter(), batch
        return super().on_batch(batch)

    def after_step(self) -> None:
        """End the harness's step, take a bare step, and begin the next."""
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
    """Train as ``config`` says, in a temporary folder, beside a bare loop; return a row for each form.

    The last step and one step beyond the warm-up are not timed.
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
    batch, precision, of = config.training.batch_size, config.execution.precision, config.model
    return [
        machine.row(
            HARNESS,
            "training loop",
            form,
            precision,
            batch,
            of,
            of.num_layers,
            Turn(seconds=seconds[warmup:]),
        )
        for form, seconds in learning.seconds.items()
    ]
