"""Flags of execution: in which form, precision and way the same model is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gnnmoe.config import Refused


@dataclass(kw_only=True)
class ExecutionConfig:
    """How the model is computed; what it computes is the same up to the rounding."""

    experts: Literal["auto", "loop", "batched"] = "auto"
    """The experts one after the other, or all in a few large products (auto: batched on CUDA, else loop)."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: products under autocast, parameters and optimizer in float32; tf32: products of rounded
    float32, on NVIDIA GPUs."""
    compile: bool = False
    """Compile the training step's forward and backward with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    """reduce-overhead: replay the compiled step as CUDA graphs."""

    def __post_init__(self) -> None:
        if self.compile_mode != "default" and not self.compile:
            raise Refused(
                f"compile_mode {self.compile_mode} does nothing without --compile: add that, or drop it."
            )

    def experts_on(self, device_type: str) -> str:
        """Return the form of the experts on this device: ``auto`` takes what was measured faster."""
        if self.experts == "auto":
            return "batched" if device_type == "cuda" else "loop"
        return self.experts

    def identity(self, device_type: str) -> dict[str, Any]:
        """Return what can move a number: nothing for a plain loop in float32, as runs were before."""
        form = {
            "experts": self.experts_on(device_type), "precision": self.precision,
            "compile": self.compile_mode if self.compile else None,
        }  # fmt: skip
        plain = {"experts": "loop", "precision": "fp32", "compile": None}
        return {name: value for name, value in form.items() if value != plain[name]}
