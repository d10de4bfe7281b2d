"""The graph coupler of the original experiments: every pair of experts, gated by content.

Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.couplers._base import Coupler, linear_flops
from gnnmoe.couplers._registry import register_coupler
from gnnmoe.mixing import mean_over_experts, mix_by_token, scores

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


class ExpertGraphConv(nn.Module):
    """One round of messages between all pairs of experts."""

    off_diagonal_EE: Tensor

    def __init__(self, embed_dim: int, num_experts: int, initialization: str = "project") -> None:
        super().__init__()
        start = torch.randn if initialization == "original" else torch.zeros
        self.adjacency_logits = nn.Parameter(start(num_experts, num_experts))
        self.edge_score = nn.Linear(2 * embed_dim, 1)  # [w_a, w_b] and b
        self.neighbor_map = nn.Linear(embed_dim, embed_dim, bias=False)  # W_n
        self.self_map = nn.Linear(embed_dim, embed_dim)  # W_s
        ones_EE = torch.ones(num_experts, num_experts)
        self.register_buffer("off_diagonal_EE", ones_EE.fill_diagonal_(0.0), persistent=False)

    def forward(self, x_NED: Tensor) -> Tensor:
        """Return the updated features (N, E, D), the residual included."""
        return self.update(x_NED) + x_NED

    def update(self, x_NED: Tensor) -> Tensor:
        """Return what a round adds to the features (N, E, D)."""
        adjacency_EE = torch.sigmoid(self.adjacency_logits) * self.off_diagonal_EE
        receiver_NE, sender_NE = scores(self.edge_score.weight.view(2, -1), x_NED).unbind(-1)
        gate_NEE = torch.sigmoid(receiver_NE[:, :, None] + sender_NE[:, None, :] + self.edge_score.bias)
        heard_NED = mix_by_token(adjacency_EE * gate_NEE, x_NED)
        both_D2D = torch.cat([self.neighbor_map.weight, self.self_map.weight], dim=1)  # one product, K = 2·D
        return F.gelu(F.linear(torch.cat([heard_NED, x_NED], dim=-1), both_D2D, self.self_map.bias))

    def flops(self, tokens: int) -> int:
        """Count the two scores, the messages and the two maps of E experts."""
        E, D = self.adjacency_logits.shape[0], self.self_map.in_features
        return 2 * tokens * (2 * E * D + E * E * D + 2 * E * D * D)

    def pairwise(self, features: list[Tensor]) -> list[Tensor]:
        """Update a list of E features (B, L, D), one pair of experts after the other."""
        adjacency = torch.sigmoid(self.adjacency_logits)
        updated = []
        for i, x_i in enumerate(features):
            total = torch.zeros_like(x_i)
            for j, x_j in enumerate(features):
                if i != j:
                    score = self.edge_score(torch.cat([x_i, x_j], dim=-1))
                    total = total + adjacency[i, j] * torch.sigmoid(score) * x_j
            updated.append(F.gelu(self.neighbor_map(total) + self.self_map(x_i)) + x_i)
        return updated


@register_coupler("GNN")
class GNNExpertCoupler(Coupler):
    r"""A stack of graph convolutions over all pairs of experts, then their mean, then the combiner.

    .. math:: M_{ij} = \sigma(A_{ij})\, \sigma(w_a \cdot x_i + w_b \cdot x_j + b), \quad i \ne j
    .. math:: x_i \leftarrow \mathrm{GELU}(W_n \sum_j M_{ij} x_j + W_s x_i) + x_i

    The score of a pair is a sum of two scalars, so no pair's concatenation is ever built: beside
    the features there is one (N, E, E) gate. :math:`A` starts at 0: no pair is preferred. With
    ``initialization = original`` it is drawn from N(0, 1).

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: the graph coupler of the original GNN-MoE experiments, which looped over pairs and
    started :math:`A` at random.
    """

    config_fields = ("gnn_layers",)

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            ExpertGraphConv(config.embed_dim, config.num_experts, config.initialization)
            for _ in range(config.gnn_layers)
        )

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        del layer_input
        B, L, E, D = expert_outputs.shape
        x_NED = expert_outputs.reshape(B * L, E, D)
        *rounds, last = self.layers
        for layer in rounds:
            x_NED = layer(x_NED)
        mean_ND = mean_over_experts(x_NED) + mean_over_experts(last.update(x_NED))  # pyright: ignore
        return self.combiner(mean_ND).view(B, L, D)

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Loop over pairs of experts and concatenate their features, as the original did."""
        del layer_input
        features = list(expert_outputs.unbind(2))
        for layer in self.layers:
            features = layer.pairwise(features)  # pyright: ignore[reportCallIssue]
        return self.combiner(torch.stack(features).mean(0))

    def flops(self, tokens: int) -> int:
        """Count every graph layer and the combiner."""
        own = sum(layer.flops(tokens) for layer in self.layers)  # pyright: ignore[reportCallIssue]
        return own + linear_flops(tokens, self.config.embed_dim, self.config.embed_dim)

    def static_communication(self) -> dict[str, Tensor]:
        """Return ``adjacency_k`` (E, E) of each graph layer k: σ(A), row i listens to column j."""
        return {
            f"adjacency_{k}": torch.sigmoid(layer.adjacency_logits) * layer.off_diagonal_EE  # pyright: ignore
            for k, layer in enumerate(self.layers)
        }

    def inert_parameters(self) -> dict[str, str]:
        """Declare what weighs messages, where one expert has nobody to hear from."""
        if self.config.num_experts > 1:
            return {}
        parts = ("adjacency_logits", "edge_score.weight", "edge_score.bias", "neighbor_map.weight")
        names = (f"layers.{k}.{part}" for k in range(len(self.layers)) for part in parts)
        return dict.fromkeys(names, "a single expert has no neighbours")
