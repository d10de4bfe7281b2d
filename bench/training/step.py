"""One optimizer step: the same function trains the model and is timed by the speed pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bench.config import TrainingConfig
from bench.device import is_out_of_memory
from gnnmoe.head import IGNORED
from gnnmoe.model import GNNMoEModel

Batch = dict[str, Tensor]


def make_optimizer(model: GNNMoEModel, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = model.matrices()
    decayed = set(map(id, matrices))
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.adam_betas, fused=True)


def learning_rate(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Return the rate of step 0, 1, …: linear warm-up, then a cosine to ``min_lr_ratio`` of the peak.

    Source of the cosine: Loshchilov and Hutter, "SGDR", 2017 (arXiv:1608.03983), without restarts.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


class UpdateOutOfMemory(MemoryError):
    """Memory ran out inside the optimizer's update, which may be half done: the step cannot be repeated."""


def training_step(
    model: GNNMoEModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    micro_batch_size: int | None = None,
    shapes: list[tuple[int, ...]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Do forward, backward, clipping and update; return the nll and the gradient norm as tensors.

    Neither is read here, so on a GPU nothing waits. With a ``micro_batch_size`` below the batch's the
    batch is run in pieces of so many rows, whose gradients add up to those of the whole: see
    ``add_gradients``. The shape of what the model is given is appended to ``shapes``, piece by piece.
    An out of memory before the update leaves parameters and optimizer as they were.

    Raises:
        UpdateOutOfMemory: memory ran out inside the update.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = add_gradients(model, batch, micro_batch_size, [] if shapes is None else shapes)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UpdateOutOfMemory(f"in the optimizer's update: {error}") from error
        raise
    return loss, norm.detach()


def add_gradients(
    model: GNNMoEModel, batch: Batch, micro_batch_size: int | None, shapes: list[tuple[int, ...]]
) -> Tensor:
    """Add the gradients of a batch to those of the parameters; return its nll, detached.

    In pieces, the loss is the sum of the nll of all targets over the number of all targets, not a mean
    of means: a piece's mean counts by its share of the targets that are not −100. The couplers' own
    losses count by the same shares, so one that is no mean over tokens (a balance of the load, say) is
    that of the pieces rather than of the batch, as it is on several ranks.
    """
    rows = len(batch["input_ids"])
    if micro_batch_size is None or micro_batch_size >= rows:
        shapes.append(tuple(batch["input_ids"].shape))
        output = model(batch["input_ids"], targets=batch["targets"], return_logits=False)
        (output["loss"] + output["auxiliary_loss"]).backward()
        return output["loss"].detach().clone()  # CUDA graphs write the next one into the same memory
    total = (batch["targets"] != IGNORED).sum()
    losses = []
    for piece in split(batch, micro_batch_size):
        input_ids, targets = piece["input_ids"], piece["targets"]
        count = (targets != IGNORED).sum()
        # A piece without targets would have the mean 0/0; with any, its share of 0 takes it out.
        targets = targets.masked_fill(count == 0, 0)
        shapes.append(tuple(input_ids.shape))
        output = model(input_ids, targets=targets, return_logits=False)
        share = count.to(output["loss"].dtype) / total
        ((output["loss"] + output["auxiliary_loss"]) * share).backward()
        if model.is_compiled and not losses:
            _own_gradients(model)
        losses.append(output["loss"].detach() * share)
        del output
    return torch.stack(losses).sum()


def _own_gradients(model: GNNMoEModel) -> None:
    """Copy the gradients: of CUDA graphs they lie where the next piece's will be written."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def split(batch: Batch, rows: int | None) -> list[Batch]:
    """Return a batch in pieces of ``rows`` rows, the last perhaps smaller; whole where ``rows`` is None."""
    if rows is None or rows >= len(batch["input_ids"]):
        return [batch]
    pieces = zip(*(tensor.split(rows) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]


def real_targets(batch: Batch) -> int:
    """Return how many targets of a batch count: those that are not −100."""
    return int((batch["targets"] != IGNORED).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
