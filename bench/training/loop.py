"""The training loop: steps, an evaluation every so often, and the best state kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench.config import DEFAULT_MAX_STEPS, TrainingConfig
from bench.data.loader import set_epoch
from bench.training.evaluation import Evaluation, evaluate
from bench.training.step import Batch, learning_rate, make_optimizer, to_device, training_step
from gnnmoe.head import IGNORED
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed


class Diverged(Exception):
    """The loss is no longer a finite number."""


@dataclass
class Trained:
    """What the training did, counted from the tensors it saw."""

    steps: int = 0
    tokens: int = 0
    epoch: int = 0
    """The epoch it is in, from 0."""
    batch_shapes: dict[str, int] = field(default_factory=dict)
    """How many batches had which shape, by "BxL"."""
    best_step: int = 0
    best: Evaluation | None = None


def total_steps(config: TrainingConfig, batches: int) -> int:
    """Return the number of optimizer steps for a loader of this many batches an epoch."""
    limits = []
    if config.epochs is not None:
        limits.append(config.epochs * batches_per_epoch(config, batches))
    if config.max_steps is not None or config.epochs is None:
        limits.append(config.max_steps or DEFAULT_MAX_STEPS)
    return min(limits)


def batches_per_epoch(config: TrainingConfig, batches: int) -> int:
    """Return how many of the loader's batches an epoch uses."""
    return min(batches, config.max_batches_per_epoch or batches)


class Trainer:
    """Trains a model in place; the state that is best on validation is what it ends with.

    ``on_step(row)`` and ``on_evaluation(row)`` receive the rows of history.jsonl.
    """

    def __init__(
        self,
        model: GNNMoEModel,
        train_loader: DataLoader,
        val_loader: DataLoader,
        config: TrainingConfig,
        device: torch.device,
        on_step: Callable[[dict[str, Any]], None],
        on_evaluation: Callable[[dict[str, Any]], None],
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.train_loader, self.val_loader = train_loader, val_loader
        self.on_step, self.on_evaluation = on_step, on_evaluation
        self.optimizer = make_optimizer(model, config)
        self.total_steps = total_steps(config, len(train_loader))
        self.batches_per_epoch = batches_per_epoch(config, len(train_loader))
        self.done = Trained()
        self._best_state: dict[str, Tensor] = {}

    def run(self) -> Trained:
        """Train to the end and load the best state.

        Raises:
            Diverged: a loss is NaN or infinite; the model keeps its last state.
        """
        torch.manual_seed(stream_seed(self.config.seed, "dropout"))
        self.model.train()
        for batch in self._batches():
            self._step(batch)
            if self.done.steps % self.config.eval_every == 0 or self.done.steps == self.total_steps:
                self._evaluate()
        self.model.load_state_dict(self._best_state)
        return self.done

    def _batches(self) -> Iterator[Batch]:
        while self.done.steps < self.total_steps:
            set_epoch(self.train_loader, self.done.epoch)
            for number, batch in enumerate(self.train_loader):
                if number == self.batches_per_epoch or self.done.steps == self.total_steps:
                    break
                yield batch
            self.done.epoch += 1

    def _step(self, batch: Batch) -> None:
        shape = "x".join(map(str, batch["input_ids"].shape))
        tokens = int((batch["targets"] != IGNORED).sum())
        rate = learning_rate(self.done.steps, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, norm = training_step(
            self.model, to_device(batch, self.device), self.optimizer, self.config.max_grad_norm
        )
        self.done.steps += 1
        self.done.tokens += tokens
        self.done.batch_shapes[shape] = self.done.batch_shapes.get(shape, 0) + 1
        self._check(float(loss), "training loss")
        self.on_step({"kind": "train", "step": self.done.steps, "epoch": self.done.epoch,
                      "loss": float(loss), "learning_rate": rate, "gradient_norm": float(norm),
                      "tokens": tokens})  # fmt: skip

    def _evaluate(self) -> None:
        result = evaluate(self.model, self.val_loader, self.device)
        self._check(result.nll_sum, "validation loss")
        if self.done.best is None or result.nll_sum < self.done.best.nll_sum:
            self.done.best, self.done.best_step = result, self.done.steps
            self._best_state = copy.deepcopy(self.model.state_dict())
        self.on_evaluation({"kind": "validation", "step": self.done.steps, "epoch": self.done.epoch,
                            "nll_sum": result.nll_sum, "tokens": result.tokens})  # fmt: skip

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise Diverged(f"the {what} is {value} at step {self.done.steps}")
