"""The contract of a coupler: what it takes, what it gives, and what it tells about itself.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


COUPLER_FIELDS = ("gnn_layers", "hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights")
"""The fields of the config that are there for some couplers only."""


class Coupler(nn.Module, ABC):
    """Mixes the outputs of E experts, token by token: (B, L, E, D) → (B, L, D).

    A subclass takes the config and its own options with defaults, keyword-only:
    ``def __init__(self, config, *, k: int = 2)``. It keeps no state between calls, and it never
    mixes tokens: the leak check (``python -m bench.check``) proves that before every run.
    """

    name: ClassVar[str] = ""
    """Set by ``@register_coupler``."""
    config_fields: ClassVar[tuple[str, ...] | None] = None
    """Which of ``COUPLER_FIELDS`` it reads; None: perhaps all of them. Two configs that differ in other
    fields only are one run. Like the two methods below it counts for this class, not for its subclasses."""

    @classmethod
    def fields_read(cls, options: dict[str, Any]) -> tuple[str, ...] | None:
        """Return ``config_fields`` as they are with these options of its own."""
        del options
        return cls.config_fields

    @classmethod
    def canonical_options(cls, config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
        """Return ``options`` in one form for all that give the same model, less what has no effect."""
        del config
        return options

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.combiner = combiner(config.embed_dim)

    @abstractmethod
    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D), of any stride, into (B, L, D).

        ``layer_input`` (B, L, D) is what the experts read; couplers that route by it need it.
        """

    @abstractmethod
    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Compute the same as ``forward``, naively: written from the formula, loops allowed."""

    def expert_shape(self) -> tuple[int, int]:
        """Return how many experts the layer has and the hidden width of each; dense has its own."""
        return self.config.num_experts, self.config.expert_width

    def auxiliary_losses(
        self, expert_outputs: Tensor, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return scalar losses to add while training, by name; pure, and empty for most."""
        del expert_outputs, layer_input
        return {}

    def flops(self, tokens: int) -> int | None:
        """Return the FLOPs of ``forward`` on this many tokens: 2 a multiply-add of a matrix product.

        None where nobody wrote the formula down; ``torch.utils.flop_counter`` counts them then.
        """
        del tokens
        return None

    def static_communication(self) -> dict[str, Tensor]:
        """Return what is the same for every token (hyperedge weights, adjacency), by name."""
        return {}

    def communication(
        self, expert_outputs: Tensor | None = None, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return who talks to whom: small, detached tensors by name.

        The static parts always; with ``expert_outputs`` (B, L, E, D) also ``mixing`` (E), the
        share of each expert in the output, averaged over the tokens given.
        """
        parts = {name: value.detach() for name, value in self.static_communication().items()}
        if expert_outputs is not None:
            parts["mixing"] = effective_mixing(self, expert_outputs, layer_input)
        return parts

    def get_expert_communication_matrices(self) -> list[Tensor]:
        """Return the static parts of ``communication`` as a list, as the original experiments did."""
        return list(self.communication().values())

    def inert_parameters(self) -> dict[str, str]:
        """Return parameters that can have no gradient by construction: name → the reason."""
        return {}

    def member_names(self) -> dict[str, list[str]]:
        """Return, for an entry of ``communication``, a name for each position of its first axis.

        Entries that are missing here are read as one value (or row) an expert.
        """
        return {}


def linear_flops(rows: int, in_features: int, out_features: int) -> int:
    """Return the FLOPs of a matrix product (rows, in) × (in, out), as ``flop_counter`` counts them."""
    return 2 * rows * in_features * out_features


def combiner(embed_dim: int) -> nn.Sequential:
    """Return Linear–GELU–LayerNorm, which follows the readout of every coupler."""
    return nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.LayerNorm(embed_dim))


def effective_mixing(coupler: Coupler, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ‖∂y/∂x_e‖ (Frobenius), normalised token by token: shape (E,).

    A token whose output depends on no expert counts as zeros; where none is like that, the sum is 1.

    For a coupler that maps a weighted sum of a token's experts, these are the weights' absolute values
    over their sum, averaged over the tokens. Costs one backward pass for each of the D outputs.
    """
    inputs = expert_outputs.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        output = coupler(inputs, None if layer_input is None else layer_input.detach())
        squared = torch.zeros(
            inputs.shape[:3], device=inputs.device, dtype=_accumulation_dtype(inputs.device)
        )
        for column in output.flatten(0, 1).sum(0).unbind():
            (gradient,) = torch.autograd.grad(
                column, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            squared += gradient.to(squared.dtype).square().sum(-1)
    norm_BLE = squared.sqrt()
    total_BL1 = norm_BLE.sum(-1, keepdim=True).clamp_min(torch.finfo(norm_BLE.dtype).tiny)
    return (norm_BLE / total_BL1).mean((0, 1)).to(expert_outputs.dtype)


def _accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64
