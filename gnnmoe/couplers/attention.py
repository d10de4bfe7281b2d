"""Self-attention over the experts: the complete graph, learned.

Shapes: B batch, L length, N = B·L tokens, E experts, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gnnmoe.couplers._base import Coupler, linear_flops
from gnnmoe.couplers._registry import register_coupler
from gnnmoe.mixing import mean_over_experts, rowwise

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


class ExpertAttention(nn.Module):
    """One round of multi-head self-attention over the experts of a token, the residual included."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim, bias=False)  # softmax would cancel a key's bias
        self.value = nn.Linear(embed_dim, embed_dim)
        self.output = nn.Linear(embed_dim, embed_dim)
        for linear in (self.query, self.key, self.value):  # the start of nn.MultiheadAttention
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))
        for linear in (self.query, self.value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(self, x_NED: Tensor) -> tuple[Tensor, Tensor]:
        """Return the updated features (N, E, D) and the attention (N, H, E, E)."""
        attention_NHEE = self._attention(x_NED)
        heard_NED = (attention_NHEE @ self._heads(self.value, x_NED)).transpose(1, 2).reshape(x_NED.shape)
        return self.output(heard_NED) + x_NED, attention_NHEE

    def mean(self, x_NED: Tensor) -> Tensor:
        """Return the mean over the experts of the updated features (N, D), heard and mapped once for all."""
        attention_NH1E = self._attention(x_NED).mean(2, keepdim=True)
        heard_ND = (attention_NH1E @ self._heads(self.value, x_NED)).flatten(1)
        return mean_over_experts(x_NED) + self.output(heard_ND)

    def _attention(self, x_NED: Tensor) -> Tensor:
        q_NHEd, k_NHEd = self._heads(self.query, x_NED), self._heads(self.key, x_NED)
        return (q_NHEd @ k_NHEd.mT / math.sqrt(q_NHEd.shape[-1])).softmax(-1)

    def _heads(self, part: nn.Linear, x_NED: Tensor) -> Tensor:
        return rowwise(part, x_NED).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def pairwise(self, features: list[Tensor]) -> list[Tensor]:
        """Update a list of E features (B, L, D), one head and one pair of experts after the other."""
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


@register_coupler("attention")
class AttentionCoupler(Coupler):
    r"""Rounds of self-attention over the E experts of a token, then their mean, then the combiner.

    .. math:: A^h_{ij} = \mathrm{softmax}_j\big((Q^h x_i + b_Q^h) \cdot K^h x_j / \sqrt{d}\big)
    .. math:: x_i \leftarrow x_i + O\, \big[\textstyle\sum_j A^h_{ij} (V^h x_j + b_V^h)\big]_h + b_O

    with :math:`[\cdot]_h` the heads side by side, ``num_heads`` of them, and ``gnn_layers`` rounds.
    Experts have no positions: in another order they give the same.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: Vaswani et al., "Attention is all you need", 2017 (arXiv:1706.03762); over a set as in
    Lee et al., "Set transformer", 2019 (arXiv:1810.00825), without its feed-forward parts.
    """

    config_fields = ("gnn_layers",)

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            ExpertAttention(config.embed_dim, config.num_heads) for _ in range(config.gnn_layers)
        )

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        del layer_input
        B, L, E, D = expert_outputs.shape
        x_NED = expert_outputs.reshape(B * L, E, D)
        *rounds, last = self.layers
        for layer in rounds:
            x_NED, _ = layer(x_NED)
        return self.combiner(last.mean(x_NED)).view(B, L, D)  # pyright: ignore[reportCallIssue]

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Loop over heads and pairs of experts."""
        del layer_input
        features = list(expert_outputs.unbind(2))
        for layer in self.layers:
            features = layer.pairwise(features)  # pyright: ignore[reportCallIssue]
        return self.combiner(torch.stack(features).mean(0))

    def flops(self, tokens: int) -> int:
        """Count each round's four maps, scores and weighted sums, and the combiner.

        The last round hears and maps once for all experts.
        """
        E, D = self.config.num_experts, self.config.embed_dim
        attention = 3 * linear_flops(tokens * E, D, D) + linear_flops(tokens * E, D, E)
        of_each = linear_flops(tokens, E, D) + linear_flops(tokens, D, D)
        rounds = len(self.layers)
        return rounds * attention + ((rounds - 1) * E + 1) * of_each + linear_flops(tokens, D, D)

    def communication(
        self, expert_outputs: Tensor | None = None, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Add ``adjacency_k`` (E, E) of each round k where there are inputs: row i listens to column j.

        The mean over heads and over the tokens given.
        """
        parts = super().communication(expert_outputs, layer_input)
        if expert_outputs is not None:
            with torch.no_grad():
                x_NED = expert_outputs.flatten(0, 1)
                for k, layer in enumerate(self.layers):
                    x_NED, attention_NHEE = layer(x_NED)
                    parts[f"adjacency_{k}"] = attention_NHEE.mean((0, 1))
        return parts

    def inert_parameters(self) -> dict[str, str]:
        """Declare what only forms the attention, where one expert can only listen to itself."""
        if self.config.num_experts > 1:
            return {}
        parts = ("query.weight", "query.bias", "key.weight")
        names = (f"layers.{k}.{part}" for k in range(len(self.layers)) for part in parts)
        return dict.fromkeys(names, "a single expert listens to itself only")
