"""AllSetTransformer: attention with a learned query pools each set.

Shapes: N tokens, E experts, M hyperedges, S elements of a set, D width, H heads, K = D / H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph.strategies import Members
from gnnmoe.layers.base import HypergraphLayer, over_token_chunks, register_layer

FEATURES = 10
"""Feature vectors of an expert and of a hyperedge in memory at once: inside a pooling, with gradients."""


class AttentionPooling(nn.Module):
    r"""Pooling by multi-head attention with one learned query :math:`\theta`.

    .. math:: Y = \mathrm{LN}(\theta + \mathrm{MH}(\theta, S, S)), \quad
              \mathrm{LN}(Y + \mathrm{MLP}(Y))

    The keys have no bias: softmax would cancel it.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(embed_dim, embed_dim, bias=False), nn.Linear(embed_dim, embed_dim)
        self.query = nn.Parameter(torch.empty(num_heads, embed_dim // num_heads))
        nn.init.xavier_uniform_(self.query)
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.first, self.second = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, x_NSD: Tensor, sets_TS: Tensor, log_weights_S: Tensor | None = None) -> Tensor:
        """Return T pooled sets (N, T, D) of the elements (N, S, D); booleans (T, S) say what a set contains.

        An empty set gives the result of the query alone.
        """
        (N, S, D), (H, K) = x_NSD.shape, self.query.shape
        values_NHSK = self.value(x_NSD).view(N, S, H, K).transpose(1, 2)
        shares_NHTS = self.shares(x_NSD, sets_TS, log_weights_S)
        pooled_NHTK = torch.matmul(shares_NHTS.to(values_NHSK.dtype), values_NHSK)
        return self.finish(pooled_NHTK.transpose(1, 2).reshape(N, len(sets_TS), D))

    def shares(self, x_NSD: Tensor, sets_TS: Tensor, log_weights_S: Tensor | None = None) -> Tensor:
        """Return the weight of each element in each set, by head (N, H, T, S); zeros for an empty set."""
        (N, S, _), (H, K) = x_NSD.shape, self.query.shape
        scores_NSH = (self.key(x_NSD).view(N, S, H, K) * self.query).sum(-1)
        scores_NHTS = scores_NSH.mT[:, :, None, :]
        if log_weights_S is not None:
            scores_NHTS = scores_NHTS + log_weights_S
        masked_NHTS = scores_NHTS.masked_fill(~sets_TS, torch.finfo(scores_NHTS.dtype).min)
        return masked_NHTS.softmax(-1) * sets_TS

    def finish(self, pooled: Tensor) -> Tensor:
        """Return the result (…, D) of adding the query and the feed-forward part to the attended values."""
        y = self.norm1(pooled + self.query.flatten())
        return self.norm2(y + self.second(F.gelu(self.first(y))))

    def naive(self, elements: list[Tensor], like: Tensor, log_weights: list[Tensor] | None = None) -> Tensor:
        """Pool one set, given as a list of features (…, D), head by head."""
        if not elements:
            return self.finish(torch.zeros_like(like))
        heads = []
        for head, query in enumerate(self.query):
            columns = slice(head * len(query), (head + 1) * len(query))
            scores = [(self.key(x)[..., columns] * query).sum(-1) for x in elements]
            if log_weights is not None:
                scores = [score + weight for score, weight in zip(scores, log_weights, strict=True)]
            shares = torch.stack(scores).softmax(0)
            values = [self.value(x)[..., columns] for x in elements]
            heads.append(sum(share[..., None] * v for share, v in zip(shares, values, strict=True)))
        return self.finish(torch.cat(heads, dim=-1))

    def flops(self, tokens: int, elements: int, sets: int) -> int:
        """Count keys and values of the elements, the attention, and the feed-forward part of the sets."""
        D = self.norm1.normalized_shape[0]
        return 2 * tokens * (2 * elements * D * D + sets * elements * D + 2 * sets * D * D)


@register_layer("AllSetTransformer")
class AllSetTransformer(HypergraphLayer):
    r"""Two set functions, each an attention pooling: members to hyperedge, hyperedges to expert.

    .. math:: z_e = \mathrm{Pool}_1(\{x_i : i \in e\}), \quad x_i' = \mathrm{Pool}_2(\{z_e : e \ni i\})

    A hyperedge weight multiplies the attention weight of its hyperedge: :math:`\log w_e` is added to the
    score.

    Shapes:
        - **x_NED**, the features of the experts: :math:`(N, E, D)`
        - **output:** :math:`(N, E, D)`

    Source: Chien, Pan, Peng and Milenkovic, "You are AllSet", 2022 (arXiv:2106.13264), equations 7
    and 8.
    """

    def __init__(self, members: list[Members], num_experts: int, embed_dim: int, num_heads: int = 1) -> None:
        super().__init__(members, num_experts, embed_dim, num_heads)
        self.to_hyperedges = AttentionPooling(embed_dim, num_heads)
        self.to_experts = AttentionPooling(embed_dim, num_heads)

    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return (N, E, D)."""
        belongs_EM = self.incidence_EM > 0

        def piece(x_NED: Tensor) -> Tensor:
            return self.to_experts(self.to_hyperedges(x_NED, belongs_EM.T), belongs_EM, from_weights)

        features = FEATURES * (self.num_experts + self.num_hyperedges)
        return over_token_chunks(piece, x_NED, features=features)

    def from_weights(self, weights_M: Tensor) -> Tensor:
        """Return log w (M), which is added to the scores."""
        return weights_M.log()

    def membership(self, x_NED: Tensor, weights_M: Tensor) -> Tensor:
        """Return the attention weights of the second pooling (E, M), averaged over tokens and heads."""
        belongs_EM = self.incidence_EM > 0
        z_NMD = self.to_hyperedges(x_NED, belongs_EM.T)
        return self.to_experts.shares(z_NMD, belongs_EM, weights_M.log()).mean((0, 1))

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Pool set by set."""
        z = [self.to_hyperedges.naive([x[member] for member in members], x[0]) for members in self.members]
        heard = []
        for expert, own in enumerate(x):
            edges = self.hyperedges_of(expert)
            log_weights = [weights[edge].log() for edge in edges]
            heard.append(self.to_experts.naive([z[edge] for edge in edges], own, log_weights))
        return heard

    def flops(self, tokens: int) -> int:
        """Count both poolings."""
        E, M = self.num_experts, self.num_hyperedges
        return self.to_hyperedges.flops(tokens, E, M) + self.to_experts.flops(tokens, M, E)

    def inert_parameters(self) -> dict[str, str]:
        """Declare keys inert where no set has two elements."""
        inert = {}
        if bool((self.incidence_EM.sum(0) <= 1).all()):
            inert["to_hyperedges.key.weight"] = "no hyperedge has two members to choose from"
        if self.one_hyperedge_each():
            inert["to_experts.key.weight"] = "no expert has two hyperedges to choose from"
        return inert
