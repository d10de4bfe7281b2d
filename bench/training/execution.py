"""The one place that builds a model to train, to evaluate or to measure: form, precision, compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench.config import ExecutionConfig, RunConfig
from bench.device import resolve_device
from bench.training.ranks import ALONE, Ranks
from bench.training.step import Batch, add_gradients, to_device
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.registry import refuse_other_types
from gnnmoe.model import GNNMoEModel

TF32_CAPABILITY = (8, 0)  # of an NVIDIA GPU, from which on it has TF32


@dataclass(frozen=True)
class Execution:
    """How models are computed on a device.

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
        """The type of the products under autocast; None where there is none."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def model(self, model_config: GNNMoEConfig, seed: int) -> GNNMoEModel:
        """Return the model where torch puts new tensors: on the CPU, or on ``meta`` without any numbers.

        Raises:
            Refused: a parameter or a buffer is not float32, which it is in every precision.
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
        """Make calls of ``model`` compiled ones, where that is asked for; a copy of it is not.

        Evaluation by ``token_nll`` and what a model says of its experts are no calls, and stay as they are.
        """
        if self.config.compile:
            model.compile(mode=self.config.compile_mode)

    def compile_now(self, model: GNNMoEModel, batch: Batch, rows: int | None = None) -> None:
        """Compile ``model`` by the forward and backward of a batch, in pieces of ``rows``; gradients go.

        So that no step of the training is slower for it.
        """
        self.compile(model)
        add_gradients(model.train(), to_device(batch, self.device), rows, [])
        model.zero_grad(set_to_none=True)

    def to_record(self) -> dict[str, Any]:
        """Return what is used, ready for JSON; ``compile`` is the mode, or None."""
        mode = self.config.compile_mode if self.config.compile else None
        return {"experts": self.experts, "precision": self.precision, "compile": mode}
