"""Whole training steps, several kinds in turn: forward, backward, clipping and update, nothing read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.config import ExecutionConfig, TrainingConfig
from bench.measure.floors import TRAINING
from bench.measure.protocol import Step
from bench.measure.rates import over_the_rate
from bench.measure.speed import TrainingSteps, random_batch
from bench.speeding.machine import Machine
from bench.speeding.memory import peak_bytes
from bench.speeding.parity import largest_difference
from bench.speeding.rows import SpeedRow, mfu
from bench.speeding.turns import Contender, in_turn
from bench.training.step import Execution, training_step
from gnnmoe.config import GNNMoEConfig
from gnnmoe.head import IGNORED, TiedHead
from gnnmoe.model import GNNMoEModel

BATCHES = 3
LEARNING_RATE = 1e-4  # random tokens teach nothing; a step must stay finite


@dataclass(frozen=True)
class Variant:
    """One kind of step: how the model is executed, and whether its head holds all logits at once."""

    name: str
    execution: ExecutionConfig
    plain_head: bool = False
    config: GNNMoEConfig | None = None
    """Of another model than the others': it is held against the first variant of an equal one."""


class StepRunner:
    """A model of one variant that trains on random batches of tokens."""

    def __init__(self, variant: Variant, config: GNNMoEConfig, batch: int, device: torch.device) -> None:
        execution = Execution(variant.execution, device)
        model = execution.build(config, 0)
        if variant.plain_head:
            hold_all_logits(model)
        execution.compile(model)
        training, generator = TrainingConfig(learning_rate=LEARNING_RATE), torch.Generator().manual_seed(0)
        batches = [random_batch(config, batch, device, generator) for _ in range(BATCHES)]
        self.of = TrainingSteps(model, batches, training)

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        """Do one whole step; return loss and gradient norm, not read."""
        batch = self.of.batches[number % len(self.of.batches)]
        return training_step(self.of.model, batch, self.of.optimizer, self.of.training.max_grad_norm)

    def peak_bytes(self, device: torch.device) -> int | None:
        """Return the peak of one more step: model, gradients, optimizer, batches and activations."""
        self.of.optimizer.zero_grad(set_to_none=True)
        return peak_bytes(lambda: self.step(0), (self.of.model, self.of.optimizer, self.of.batches), device)


def step_rows(case: str, variants: Sequence[Variant], config: GNNMoEConfig, batch: int, machine: Machine,
              *, rounds: int, warmup: int = 3, memory: bool = True) -> list[SpeedRow]:  # fmt: skip
    """Time whole steps of one batch in turn; one that fails becomes a row with its error.

    Loss and gradient norm of the first step are held against the first variant's of the same model,
    ``config`` where a variant has none of its own.
    """
    runners: dict[str, StepRunner] = {}
    differences: dict[str, float] = {}
    expected: list[tuple[GNNMoEConfig | None, Tensor]] = []

    def contender(variant: Variant) -> Contender:
        def make() -> Step:
            runners[variant.name] = StepRunner(variant, variant.config or config, batch, machine.device)
            return runners[variant.name].step

        def check(found: tuple[Tensor, Tensor]) -> None:
            loss_and_norm = torch.stack(found).double()
            first = next((value for model, value in expected if model == variant.config), None)
            if first is None:
                expected.append((variant.config, first := loss_and_norm))
            differences[variant.name] = largest_difference(loss_and_norm, first, first.abs())

        return Contender(variant.name, make, check)

    turns = in_turn([contender(one) for one in variants], machine.device, rounds=rounds, warmup=warmup)
    rows = []
    for variant in variants:
        turn, precision, of = turns[variant.name], variant.execution.precision, variant.config or config
        subject = "step" if variant.config else f"step, {config.coupler_type}"
        row = SpeedRow(
            case=case, subject=subject, form=variant.name, device=machine.device.type,
            precision=precision, batch=batch, length=of.max_seq_length, experts=of.num_experts,
            width=of.embed_dim, layers=of.num_layers, seconds=turn.seconds,
            first_seconds=turn.first_seconds, error=turn.error,
            largest_difference=differences.get(variant.name),
        )  # fmt: skip
        if turn.error is None:
            own = runners[variant.name].of.model.flops(batch, of.max_seq_length)
            row.flops = None if own is None else TRAINING * own
            row.matrix_flops_per_second = machine.rates(precision).flops_per_second
            row.remark = over_the_rate(mfu(row) or 0.0)
            if memory and variant.execution.compile_mode == "reduce-overhead":
                unseen = "CUDA graphs hold their memory in a pool of their own: no peak of the step is known"
                row.remark = "; ".join(filter(None, [row.remark, unseen]))
            elif memory:
                row.peak_bytes = runners[variant.name].peak_bytes(machine.device)
        rows.append(row)
    return rows


def hold_all_logits(model: GNNMoEModel) -> None:
    """Let the model's head compute its loss over all logits at once, as one would without chunks."""
    head = model.head
    assert isinstance(head, TiedHead)

    def loss(hidden_ND: Tensor, embedding_VD: Tensor, targets_N: Tensor) -> Tensor:
        logits = F.linear(hidden_ND, embedding_VD, head.padded_bias())
        return F.cross_entropy(logits, targets_N, ignore_index=IGNORED)

    head.loss = loss


def executed(experts: str, precision: str, compile_mode: str | None = None) -> ExecutionConfig:
    """Return how a model is executed; ``compile_mode`` None: eager."""
    config = ExecutionConfig(experts=experts, precision=precision)  # pyright: ignore[reportArgumentType]
    if compile_mode is None:
        return config
    return replace(config, compile=True, compile_mode=compile_mode)  # pyright: ignore[reportArgumentType]
