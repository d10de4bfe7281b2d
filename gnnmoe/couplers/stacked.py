"""The base of couplers whose experts exchange messages in several rounds: attention and GNN.

Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler, linear_flops


class Round(nn.Module, ABC):
    """One round of messages between the experts of a token, with the residual."""

    @abstractmethod
    def forward(self, x_NED: Tensor) -> Tensor:
        """Return the updated features (N, E, D)."""

    @abstractmethod
    def mean(self, x_NED: Tensor) -> Tensor:
        """Return the mean over the experts of the updated features (N, D)."""

    @abstractmethod
    def pairwise(self, features: list[Tensor]) -> list[Tensor]:
        """Update a list of E features (B, L, D) by the formula, one pair of experts after another."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Return the FLOPs of ``forward`` for this many tokens."""

    def mean_flops(self, tokens: int) -> int:
        """Return the FLOPs of ``mean`` for this many tokens."""
        return self.flops(tokens)

    @abstractmethod
    def inert_without_neighbours(self) -> dict[str, str]:
        """Return the parameters that have no gradient where there is one expert: name → the reason."""


class StackedCoupler(Coupler):
    """``gnn_layers`` rounds of messages, then the mean over experts, then the combiner.

    The last round computes only the mean over its results. A subclass gives ``make_round``.
    """

    layers: Sequence[Round]

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        rounds = [self.make_round(config) for _ in range(config.gnn_layers)]
        self.layers = nn.ModuleList(rounds)  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    @abstractmethod
    def make_round(config: GNNMoEConfig) -> Round:
        """Build one round."""

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        B, L, E, D = expert_outputs.shape
        x_NED = expert_outputs.reshape(B * L, E, D)
        *rounds, last = self.layers
        for layer in rounds:
            x_NED = layer(x_NED)
        return self.combiner(last.mean(x_NED)).view(B, L, D)

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Loop over pairs of experts."""
        features = list(expert_outputs.unbind(2))
        for layer in self.layers:
            features = layer.pairwise(features)
        return self.combiner(torch.stack(features).mean(0))

    def flops(self, tokens: int) -> int:
        """Count all rounds, the last with its mean, and the combiner."""
        *rounds, last = self.layers
        own = sum(layer.flops(tokens) for layer in rounds) + last.mean_flops(tokens)
        return own + linear_flops(tokens, self.config.embed_dim, self.config.embed_dim)

    def inert_parameters(self) -> dict[str, str]:
        """Declare the parameters that only weigh messages, where a single expert receives none."""
        if self.config.num_experts > 1:
            return {}
        return {
            f"layers.{number}.{name}": reason
            for number, layer in enumerate(self.layers)
            for name, reason in layer.inert_without_neighbours().items()
        }
