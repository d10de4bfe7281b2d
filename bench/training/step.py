"""How a model is built and computed, and one optimizer step.

Training and the speed pass call the same ``training_step``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.config import ExecutionConfig, RunConfig, TrainingConfig, in_steps
from bench.device import is_out_of_memory, resolve_device
from bench.training.ranks import ALONE, Ranks
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.registry import refuse_other_types
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
    warmup = in_steps(config.warmup_steps, total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


class UpdateOutOfMemory(MemoryError):
    """Memory ran out inside the optimizer's update, which may be half done: the step cannot be repeated."""


def training_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    micro_batch_size: int | None = None,
    shapes: list[tuple[int, ...]] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """Do forward, backward, clipping and update; return the nll and the gradient norm as tensors.

    The function reads neither tensor, so a GPU does not wait. On several ``ranks``, ``model`` comes from
    ``Ranks.parallel`` and ``batch`` is the part of this rank; both results are for the whole batch.
    If ``micro_batch_size`` is smaller than the batch, the batch runs in pieces of that many rows. Their
    gradients add up to the gradient of the whole batch: see ``add_gradients``. The shape of each piece is
    appended to ``shapes``. Running out of memory before the update leaves parameters and optimizer
    unchanged.

    Raises:
        UpdateOutOfMemory: memory ran out inside the update.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = add_gradients(model, batch, micro_batch_size, [] if shapes is None else shapes, ranks)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UpdateOutOfMemory(f"in the optimizer's update: {error}") from error
        raise
    return loss, norm.detach()


def add_gradients(
    model: nn.Module,
    batch: Batch,
    micro_batch_size: int | None,
    shapes: list[tuple[int, ...]],
    ranks: Ranks = ALONE,
) -> Tensor:
    """Add the gradients of a batch to those of the parameters; return its nll, detached.

    In pieces or on several ranks, the loss is Σ nll of all targets / number of all targets. It is not a mean
    of means: the mean of a piece is weighted by the piece's share of the targets that are not −100.
    An auxiliary loss of a coupler has the same weights. If it is no mean over tokens (such as a load
    balance), it is computed for each piece, not for the whole batch.
    """
    rows = len(batch["input_ids"])
    if ranks.alone and (micro_batch_size is None or micro_batch_size >= rows):
        shapes.append(tuple(batch["input_ids"].shape))
        output = model(batch["input_ids"], targets=batch["targets"], return_logits=False)
        (output["loss"] + output["auxiliary_loss"]).backward()
        return output["loss"].detach().clone()  # a CUDA graph writes the next loss into the same memory
    total = ranks.sum((batch["targets"] != IGNORED).sum())
    losses, pieces = [], split(batch, micro_batch_size)
    for number, piece in enumerate(pieces, 1):
        input_ids, targets = piece["input_ids"], piece["targets"]
        count = (targets != IGNORED).sum()
        # A piece without targets would have the mean 0/0. With made-up targets its weight is 0.
        targets = targets.masked_fill(count == 0, 0)
        shapes.append(tuple(input_ids.shape))
        with ranks.in_one_backward(model, last=number == len(pieces)):
            output = model(input_ids, targets=targets, return_logits=False)
            share = count.to(output["loss"].dtype) / total
            loss = (output["loss"] + output["auxiliary_loss"]) * share
            (loss * ranks.world_size).backward()  # DDP takes the mean over the ranks
        if not losses and len(pieces) > 1 and _is_compiled(model):
            _own_gradients(model)
        losses.append(output["loss"].detach() * share)
        del output, loss
    return ranks.sum(torch.stack(losses).sum())


def _is_compiled(model: nn.Module) -> bool:
    return any(module.is_compiled for module in model.modules() if isinstance(module, GNNMoEModel))


def _own_gradients(model: nn.Module) -> None:
    """Copy the gradients: a CUDA graph writes the gradients of the next piece into the same memory."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def split(batch: Batch, rows: int | None) -> list[Batch]:
    """Return a batch in pieces of ``rows`` rows; the last may be smaller. None: one piece."""
    if rows is None or rows >= len(batch["input_ids"]):
        return [batch]
    pieces = zip(*(tensor.split(rows) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]


def real_targets(batch: Batch) -> int:
    """Return the number of targets that are not −100."""
    return int((batch["targets"] != IGNORED).sum())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# --- how a model is computed ----------------------------------------------------------------------

TF32_CAPABILITY = (8, 0)  # NVIDIA GPUs have TF32 from this capability on


@dataclass(frozen=True)
class Execution:
    """How a model is computed on a device: form of the experts, precision, compilation.

    Raises:
        Refused: the device cannot do what is asked.
    """

    config: ExecutionConfig
    device: torch.device

    def __post_init__(self) -> None:
        asked, kind = self.config, self.device.type
        if asked.precision == "tf32" and not (
            kind == "cuda" and torch.cuda.get_device_capability(self.device) >= TF32_CAPABILITY
        ):
            raise Refused(
                f"precision tf32 is for NVIDIA GPUs from the A100 on, and means nothing on this {kind}; "
                "use fp32 or bf16."
            )
        if asked.compile_mode == "reduce-overhead" and kind != "cuda":
            raise Refused(
                f"compile_mode reduce-overhead replays CUDA graphs, and means nothing on this {kind}; "
                "use default."
            )

    @classmethod
    def of(cls, config: RunConfig, ranks: Ranks = ALONE) -> Execution:
        """Return how the run of this config is computed on this rank; raises as the class."""
        return cls(config.execution, ranks.device(resolve_device(config.places.device)))

    @property
    def experts(self) -> str:
        """The form of the experts, ``loop`` or ``batched``."""
        return self.config.experts_on(self.device.type)

    @property
    def precision(self) -> str:
        """``fp32``, ``tf32`` or ``bf16``."""
        return self.config.precision

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None without autocast."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def model(self, model_config: GNNMoEConfig, seed: int) -> GNNMoEModel:
        """Return a new model on torch's default device; on ``meta`` it has no numbers.

        Raises:
            Refused: a parameter or a buffer is not float32. Every precision needs float32 parameters.
        """
        model = GNNMoEModel(model_config, seed=seed, experts=self.experts, precision=self.precision)
        refuse_other_types(model, torch.float32, "the model")
        return model

    def set_products(self) -> None:
        """Set how torch computes products of float32 in the whole process."""
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")

    def build(self, model_config: GNNMoEConfig, seed: int) -> GNNMoEModel:
        """Return the model on the device, not compiled, with torch's products set for it; see ``model``."""
        self.set_products()
        return self.model(model_config, seed).to(self.device)

    def compile(self, model: GNNMoEModel) -> None:
        """Compile the forward of ``model`` if the config asks for it; a copy of the model is not compiled.

        ``token_nll`` (evaluation) and ``analyze_expert_communication`` are not compiled.
        """
        if self.config.compile:
            model.compile(mode=self.config.compile_mode)

    def compile_now(self, model: GNNMoEModel, batch: Batch, rows: int | None = None) -> None:
        """Compile ``model`` by a forward and backward on a batch, in pieces of ``rows``; drop the gradients.

        Then no training step contains the compilation.
        """
        self.compile(model)
        add_gradients(model.train(), to_device(batch, self.device), rows, [])
        model.zero_grad(set_to_none=True)

    def to_record(self) -> dict[str, Any]:
        """Return the settings for the record; ``compile`` is the mode, or None."""
        mode = self.config.compile_mode if self.config.compile else None
        return {"experts": self.experts, "precision": self.precision, "compile": mode}
