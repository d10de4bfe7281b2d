"""Self-attention over the experts: the complete graph, learned.

Shapes: B batch, L length, N = B·L tokens, E experts, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import linear_flops
from gnnmoe.couplers.registry import register_coupler
from gnnmoe.couplers.stacked import Round, StackedCoupler
from gnnmoe.mixing import mean_over_experts, rowwise


class ExpertAttention(Round):
    """One round of multi-head self-attention over the experts of a token, with the residual."""

    def __init__(self, embed_dim: int, num_experts: int, num_heads: int) -> None:
        super().__init__()
        self.num_experts, self.num_heads = num_experts, num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)  # softmax would cancel a key's bias
        self.value = nn.Linear(embed_dim, embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)
        for linear in (self.query, self.key, self.value):  # the start of nn.MultiheadAttention
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))
        for linear in (self.query, self.value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(self, x_NED: Tensor) -> Tensor:
        """Return the updated features (N, E, D)."""
        attention_NHEE = self.attention(x_NED)
        heard_NED = (attention_NHEE @ self._heads(self.value, x_NED)).transpose(1, 2).reshape(x_NED.shape)
        return self.output(heard_NED) + x_NED

    def mean(self, x_NED: Tensor) -> Tensor:
        """Return the mean over the experts of the updated features (N, D): one sum and one map for all."""
        attention_NH1E = self.attention(x_NED).mean(2, keepdim=True)
        heard_ND = (attention_NH1E @ self._heads(self.value, x_NED)).flatten(1)
        return mean_over_experts(x_NED) + self.output(heard_ND)

    def attention(self, x_NED: Tensor) -> Tensor:
        """Return the attention (N, H, E, E): row i has the weights of what expert i receives."""
        q_NHEd, k_NHEd = self._heads(self.query, x_NED), self._heads(self.key, x_NED)
        return (q_NHEd @ k_NHEd.mT / math.sqrt(q_NHEd.shape[-1])).softmax(-1)

    def _heads(self, part: nn.Linear, x_NED: Tensor) -> Tensor:
        return rowwise(part, x_NED).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def pairwise(self, features: list[Tensor]) -> list[Tensor]:
        """Update a list of E features (B, L, D), one head and one pair of experts after another."""
        queries, keys, values = (
            [part(x).chunk(self.num_heads, -1) for x in features]
            for part in (self.query, self.key, self.value)
        )
        updated = []
        for i, x in enumerate(features):
            heads = []
            for h in range(self.num_heads):
                total, scale = torch.zeros_like(values[i][h]), torch.zeros_like(x[..., :1])
                for j in range(len(features)):
                    score = (queries[i][h] * keys[j][h]).sum(-1, keepdim=True)
                    weight = (score / math.sqrt(keys[j][h].shape[-1])).exp()
                    total, scale = total + weight * values[j][h], scale + weight
                heads.append(total / scale)
            updated.append(x + self.output(torch.cat(heads, -1)))
        return updated

    def flops(self, tokens: int) -> int:
        """Count the four maps, the scores and the weighted sums of E experts."""
        return self._flops(tokens, receivers=self.num_experts)

    def mean_flops(self, tokens: int) -> int:
        """Count one weighted sum and one output map in place of E."""
        return self._flops(tokens, receivers=1)

    def _flops(self, tokens: int, receivers: int) -> int:
        E, D = self.num_experts, self.query.in_features
        attention = 3 * linear_flops(tokens * E, D, D) + linear_flops(tokens * E, D, E)
        return attention + receivers * (linear_flops(tokens, E, D) + linear_flops(tokens, D, D))

    def inert_without_neighbours(self) -> dict[str, str]:
        """Declare queries and keys: they only form the attention."""
        parts = ("query.weight", "query.bias", "key.weight")
        return dict.fromkeys(parts, "a single expert listens to itself only")


@register_coupler("attention")
class AttentionCoupler(StackedCoupler):
    r"""Rounds of self-attention over the E experts of a token, then their mean, then the combiner.

    .. math:: A^h_{ij} = \mathrm{softmax}_j\big((Q^h x_i + b_Q^h) \cdot K^h x_j / \sqrt{d}\big)
    .. math:: x_i \leftarrow x_i + O\, \big[\textstyle\sum_j A^h_{ij} (V^h x_j + b_V^h)\big]_h + b_O

    with :math:`[\cdot]_h` the ``num_heads`` heads side by side, and ``gnn_layers`` rounds. Experts have no
    positions: their order does not matter.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: Vaswani et al., "Attention is all you need", 2017 (arXiv:1706.03762); over a set as in
    Lee et al., "Set transformer", 2019 (arXiv:1810.00825), without its feed-forward parts.
    """

    config_fields = ("gnn_layers",)
    layers: Sequence[ExpertAttention]

    @staticmethod
    def make_round(config: GNNMoEConfig) -> ExpertAttention:
        """Build one round of self-attention."""
        return ExpertAttention(config.embed_dim, config.num_experts, config.num_heads)

    @torch.no_grad()
    def communication(
        self, expert_outputs: Tensor | None = None, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return, with ``expert_outputs``, also ``adjacency_k`` (E, E) of each round k.

        Row i has the weights of what expert i receives: the mean over the heads and over these tokens.
        """
        parts = super().communication(expert_outputs, layer_input)
        if expert_outputs is not None:
            x_NED = expert_outputs.flatten(0, 1)
            for k, layer in enumerate(self.layers):
                parts[f"adjacency_{k}"] = layer.attention(x_NED).mean((0, 1))
                x_NED = layer(x_NED)
        return parts
