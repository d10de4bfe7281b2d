"""One optimizer step: the same function trains the model and is timed by the speed pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bench.config import TrainingConfig
from gnnmoe.head import IGNORED
from gnnmoe.model import GNNMoEModel

Batch = dict[str, Tensor]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
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


def training_step(
    model: GNNMoEModel, batch: Batch, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """Do forward, backward, clipping and update; return the nll and the gradient norm as tensors.

    Neither is read here, so on a GPU nothing waits.
    """
    optimizer.zero_grad(set_to_none=True)
    output = model(batch["input_ids"], targets=batch["targets"], return_logits=False)
    (output["loss"] + output["auxiliary_loss"]).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return output["loss"].detach(), norm.detach()


def real_targets(batch: Batch) -> int:
    """Return how many targets of a batch count: those that are not −100."""
    return int((batch["targets"] != IGNORED).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
