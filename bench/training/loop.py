"""The training loop: steps, regular evaluations, and the best state on validation."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.config import DEFAULT_MAX_STEPS, TrainingConfig, in_steps
from bench.data.loader import BlockLoader, set_epoch
from bench.training.evaluation import Progress, evaluate
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, learning_rate, make_optimizer, to_device, training_step
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed


class Diverged(Exception):
    """The loss is no longer a finite number."""


@dataclass
class Trained:
    """How many steps are done, and which step was best on validation."""

    steps: int = 0
    best_step: int = 0
    best_nll_sum: float = math.inf


Shapes = list[tuple[int, ...]]
"""The shapes of the pieces of a batch."""
Step = Callable[[Batch, int | None, Shapes], tuple[Tensor, Tensor]]
"""Trains on a batch in pieces of so many rows and appends their shapes; returns loss and gradient norm."""


class Steps:
    """Runs each step once, in pieces of ``micro_batch_size`` rows (None: the whole batch).

    ``bench.tune.control`` has subclasses that continue after running out of memory.
    """

    def __init__(self, micro_batch_size: int | None = None) -> None:
        self.micro_batch_size = micro_batch_size

    def begin_epoch(self, steps_done: int) -> None:
        """Note that an epoch begins after ``steps_done`` steps."""

    def run(
        self, step: Step, batch: Batch, number: int, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor, Shapes]:
        """Do step ``number`` (from 1) on a batch; return loss, gradient norm and the shapes of the pieces.

        ``optimizer`` updates the model; its state needs memory too.
        """
        del number, optimizer
        shapes: Shapes = []
        return *step(batch, self.micro_batch_size, shapes), shapes

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""


class Hooks(Protocol):
    """What a trainer reports; the rows are the rows of history.jsonl."""

    def on_epoch(self, plan: EpochPlan) -> None:
        """Take the plan of an epoch that begins or continues."""

    def on_batch(self, batch: Batch) -> int:
        """Count a batch before its step; return its number of real targets over all ranks."""
        ...

    def on_update(self, shapes: Shapes) -> None:
        """Count an optimizer step and the shapes of its pieces."""

    def on_step(self, row: dict[str, Any]) -> None:
        """Take the numbers of one step."""

    def after_epoch(self) -> None:
        """Compare the epoch with its plan."""

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """Take the sums of one evaluation."""

    def after_step(self) -> None:
        """Do what is due after a step and its evaluation, such as saving a checkpoint."""


class Trainer:
    """Trains a model in place and ends with the state that was best on validation.

    ``steps`` runs the steps; evaluations use the same micro-batch size. On several ``ranks`` each rank
    trains on the batches of its own loader, and all ranks have the same losses and parameters. ``progress``
    is told how far each evaluation is.
    """

    def __init__(
        self,
        model: GNNMoEModel,
        train_loader: BlockLoader,
        val_loader: BlockLoader,
        config: TrainingConfig,
        device: torch.device,
        hooks: Hooks,
        *,
        steps: Steps | None = None,
        ranks: Ranks = ALONE,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress
        self.model, self.config, self.device, self.hooks = model, config, device, hooks
        self.ranks, self._parallel = ranks, ranks.parallel(model)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.optimizer = make_optimizer(model, config)
        self.plan = TrainingPlan(train_loader, config)
        self.steps = Steps() if steps is None else steps
        self.done = Trained()
        self._late = device.type == "cuda"
        """Whether the loss of a step is read during the next step, so that the device never waits."""
        self._unread: tuple[dict[str, Any], Tensor, Tensor] | None = None
        self._best_state: dict[str, Tensor] = {}
        self._random: tuple[Tensor, Tensor | None] | None = None

    def run(self) -> Trained:
        """Train from the current step to the end, and load the best state.

        Raises:
            Diverged: a loss is NaN or infinite; the model keeps its last state.
        """
        torch.manual_seed(stream_seed(self.config.seed, self.ranks.stream("dropout")))
        if self._random is not None:
            set_random_state(self._random, self.device)
        self.model.train()
        every = in_steps(self.config.eval_every, self.plan.total_steps)
        for batch in self._batches():
            self._step(batch)
            if self.done.steps % every == 0 or self.done.steps == self.plan.total_steps:
                self.report()
                self._evaluate()
            self.hooks.after_step()
        self.model.load_state_dict(self._best_state)
        set_epoch(
            self.train_loader, self.plan.place(self.plan.total_steps - 1)[0]
        )  # also where nothing was left
        return self.done

    def release(self) -> None:
        """Free gradients, optimizer state and the copy of the best state; training ends here."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self._best_state, self._parallel = {}, self.model

    def state_dict(self) -> dict[str, Any]:
        """Return the state after a step, from which training continues bit for bit.

        The hooks have seen all steps up to this one. Random states are a list with one entry per rank.
        """
        self.report()
        cpu, cuda = random_state(self.device)
        return {
            "model": self.model.state_dict(), "best_model": self._best_state,
            "optimizer": self.optimizer.state_dict(), "done": asdict(self.done),
            "random": self.ranks.gather(cpu), "random_cuda": self.ranks.gather(cuda),
            **self.steps.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._best_state = {name: value.to(self.device) for name, value in state["best_model"].items()}
        self.done = Trained(**state["done"])
        self.steps.load_state_dict(state)
        self._random = state["random"][self.ranks.rank], state["random_cuda"][self.ranks.rank]

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches from step ``done.steps`` on; the step gives the epoch and the place in it."""
        while self.done.steps < self.plan.total_steps:
            epoch, start = self.plan.place(self.done.steps)
            planned = self.plan.epoch(epoch)
            set_epoch(self.train_loader, epoch, start * planned.batch_size)
            self.hooks.on_epoch(planned)
            if start == 0:
                self.steps.begin_epoch(self.done.steps)
            yield from islice(self.train_loader, planned.batches - start if planned.cut else None)
            self.hooks.after_epoch()

    def _step(self, batch: Batch) -> None:
        tokens = self.hooks.on_batch(batch)
        rate = learning_rate(self.done.steps, self.plan.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        def step(batch: Batch, micro_batch_size: int | None, shapes: Shapes) -> tuple[Tensor, Tensor]:
            there = to_device(batch, self.device)
            return training_step(
                self._parallel, there, self.optimizer, self.config.max_grad_norm, micro_batch_size, shapes,
                self.ranks,
            )  # fmt: skip

        loss, norm, shapes = self.steps.run(step, batch, self.done.steps + 1, self.optimizer)
        self.done.steps += 1
        self.hooks.on_update(shapes)
        self.report()
        self._unread = self._row("train") | {"learning_rate": rate, "tokens": tokens}, loss, norm
        if not self._late:
            self.report()

    def report(self) -> None:
        """Read the loss of the last step, if that is not done yet, and tell the hooks.

        Raises:
            Diverged: it is NaN or infinite.
        """
        if self._unread is None:
            return
        (row, loss, norm), self._unread = self._unread, None
        self._check(float(loss), "training loss", row["step"])
        self.hooks.on_step(row | {"loss": float(loss), "gradient_norm": float(norm)})

    def _evaluate(self) -> None:
        rows = self.steps.micro_batch_size
        result = evaluate(self.model, self.val_loader, self.device, rows, self.ranks, self._progress)
        self._check(result.nll_sum, "validation loss", self.done.steps)
        if result.nll_sum < self.done.best_nll_sum:
            self.done.best_nll_sum, self.done.best_step = result.nll_sum, self.done.steps
            self._best_state = copy.deepcopy(self.model.state_dict())
        sums = {"nll_sum": result.nll_sum, "tokens": result.tokens}
        self.hooks.on_evaluation(self._row("validation") | sums)

    def _row(self, kind: str) -> dict[str, Any]:
        step = self.done.steps
        return {"kind": kind, "step": step, "epoch": self.plan.place(step - 1)[0]}

    def _check(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise Diverged(f"the {what} is {value} at step {step}")


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return torch's random state on the CPU and, for a CUDA device, on that device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


# --- the plan of the epochs -----------------------------------------------------------------------


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch contains, over all ranks."""

    epoch: int
    batch_size: int
    batches: int
    samples: int
    tokens: int
    cut: bool = False
    """Whether the training leaves out some batches of the loader."""


class TrainingPlan:
    """The epochs of a training in order; with a curriculum or a batch schedule they differ."""

    def __init__(self, loader: BlockLoader, config: TrainingConfig) -> None:
        self._sampler, self._length = loader.sampler_obj, loader.dataset_obj.length
        self._most = config.max_batches_per_epoch
        steps = config.max_steps
        if steps is None and config.epochs is None:
            steps = DEFAULT_MAX_STEPS
        self._ends: list[int] = []  # steps done at the end of each epoch
        while (config.epochs is None or len(self._ends) < config.epochs) and (
            steps is None or not self._ends or self._ends[-1] < steps
        ):
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + self.batches_in(len(self._ends)))
        self.total_steps = self._ends[-1] if steps is None else min(steps, self._ends[-1])

    def batches_in(self, epoch: int) -> int:
        """Return the batches of a whole epoch."""
        batches = self._sampler.batches_in(epoch)
        return batches if self._most is None else min(batches, self._most)

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch of step 0, 1, … and the number of batches before that step in the epoch."""
        epoch = bisect_right(self._ends, step)
        return epoch, step - self._before(epoch)

    def epoch(self, number: int) -> EpochPlan:
        """Return the plan of an epoch; the last epoch ends with the training."""
        batches = min(self.batches_in(number), self.total_steps - self._before(number))
        size, world = self._sampler.size_in(number), self._sampler.shard.world_size
        samples = min(batches * size, self._sampler.share_in(number)) * world  # ranks have equal shares
        cut = batches < self._sampler.batches_in(number)
        return EpochPlan(number, size * world, batches, samples, samples * self._length, cut)

    def batch_sizes(self) -> list[int]:
        """Return the distinct batch sizes of the epochs on this rank, in order."""
        return list(dict.fromkeys(self._sampler.size_in(epoch) for epoch in range(len(self._ends))))

    def epochs(self) -> float:
        """Return the number of epochs; the last may be a fraction."""
        epoch, before = self.place(self.total_steps - 1)
        return epoch + (before + 1) / self.batches_in(epoch)

    def _before(self, epoch: int) -> int:
        return self._ends[epoch - 1] if epoch else 0
