"""The plainest hypergraph layer, and the one to copy.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

from torch import Tensor

from gnnmoe.layers.base import HypergraphLayer, naive_mean, naive_weighted_mean, register_layer
from gnnmoe.mixing import mix


@register_layer("MeanPooling")
class MeanPooling(HypergraphLayer):
    r"""The mean of an expert's hyperedges, each the mean of its members; no parameters.

    .. math:: z_e = \tfrac{1}{|e|} \sum_{j \in e} x_j, \quad
              x_i' = \sum_{e \ni i} w_e\, z_e \big/ \sum_{e \ni i} w_e

    Shapes:
        - **x_NED**, the features of the experts: :math:`(N, E, D)`
        - **output:** :math:`(N, E, D)`

    Source: ``HypergraphConv`` without its linear map, as a baseline for the layers with parameters.
    """

    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return (N, E, D); ``from_weights`` (E, M) has the share of each hyperedge in each expert."""
        z_NMD = self.mean_of_members(x_NED)
        return mix(from_weights, z_NMD)

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor]:
        """Follow the formula hyperedge by hyperedge, then expert by expert."""
        z = [naive_mean([x[member] for member in members]) for members in self.members]
        heard = []
        for expert, own in enumerate(x):
            edges = self.hyperedges_of(expert)
            heard.append(naive_weighted_mean([z[e] for e in edges], [weights[e] for e in edges], own))
        return heard

    def flops(self, tokens: int) -> int:
        """Count the two means, each a product with an E × M matrix."""
        return 2 * tokens * 2 * self.num_experts * self.num_hyperedges * self.embed_dim
