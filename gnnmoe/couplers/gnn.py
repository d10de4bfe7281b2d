"""The graph coupler of the original experiments: every pair of experts, gated by content.

Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.registry import register_coupler
from gnnmoe.couplers.stacked import Round, StackedCoupler
from gnnmoe.mixing import mean_over_experts, mix_by_token, scores


class ExpertGraphConv(Round):
    """One round of messages between all pairs of experts, with the residual."""

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
        """Return the updated features (N, E, D)."""
        return self._message(x_NED) + x_NED

    def mean(self, x_NED: Tensor) -> Tensor:
        """Return the mean over the experts of the updated features (N, D)."""
        return mean_over_experts(x_NED) + mean_over_experts(self._message(x_NED))

    def adjacency(self) -> Tensor:
        """Return σ(A) without its diagonal (E, E): row i has the weights of what expert i receives."""
        return torch.sigmoid(self.adjacency_logits) * self.off_diagonal_EE

    def _message(self, x_NED: Tensor) -> Tensor:
        """Return what the round adds to the features (N, E, D)."""
        receiver_NE, sender_NE = scores(self.edge_score.weight.view(2, -1), x_NED).unbind(-1)
        gate_NEE = torch.sigmoid(receiver_NE[:, :, None] + sender_NE[:, None, :] + self.edge_score.bias)
        heard_NED = mix_by_token(self.adjacency() * gate_NEE, x_NED)
        both_D2D = torch.cat([self.neighbor_map.weight, self.self_map.weight], dim=1)  # one product, K = 2·D
        return F.gelu(F.linear(torch.cat([heard_NED, x_NED], dim=-1), both_D2D, self.self_map.bias))

    def pairwise(self, features: list[Tensor]) -> list[Tensor]:
        """Update a list of E features (B, L, D), one pair of experts after another."""
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

    def flops(self, tokens: int) -> int:
        """Count the two scores, the messages and the two maps of E experts."""
        E, D = self.adjacency_logits.shape[0], self.self_map.in_features
        return 2 * tokens * (2 * E * D + E * E * D + 2 * E * D * D)

    def inert_without_neighbours(self) -> dict[str, str]:
        """Declare the parts that only weigh or map messages."""
        parts = ("adjacency_logits", "edge_score.weight", "edge_score.bias", "neighbor_map.weight")
        return dict.fromkeys(parts, "a single expert has no neighbours")


@register_coupler("GNN")
class GNNExpertCoupler(StackedCoupler):
    r"""A stack of graph convolutions over all pairs of experts, then their mean, then the combiner.

    .. math:: M_{ij} = \sigma(A_{ij})\, \sigma(w_a \cdot x_i + w_b \cdot x_j + b), \quad i \ne j
    .. math:: x_i \leftarrow \mathrm{GELU}(W_n \sum_j M_{ij} x_j + W_s x_i) + x_i

    The score of a pair is a sum of two scalars, so the features of a pair are never concatenated: beside the
    features there is only one gate (N, E, E). :math:`A` starts at 0: no pair is preferred. With
    ``initialization = original`` it is drawn from N(0, 1).

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: the graph coupler of the original GNN-MoE experiments, which looped over pairs and drew the start
    of :math:`A` at random.
    """

    config_fields = ("gnn_layers",)
    layers: Sequence[ExpertGraphConv]

    @staticmethod
    def make_round(config: GNNMoEConfig) -> ExpertGraphConv:
        """Build one graph convolution."""
        return ExpertGraphConv(config.embed_dim, config.num_experts, config.initialization)

    def static_communication(self) -> dict[str, Tensor]:
        """Return ``adjacency_k`` (E, E) of each round k: σ(A), where row i receives from column j."""
        return {f"adjacency_{k}": layer.adjacency() for k, layer in enumerate(self.layers)}
