"""A coupler that leaks, to see the leak check catch it.

``python -m bench.check --coupler examples.leaking_coupler:LeakingCoupler --num-experts 4``

It is not registered, and nothing may be concluded from what it scores: it reads its own labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import HypergraphConv

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.hypergraph.propagation import hyperedge_index
from gnnmoe.hypergraph.strategies import static_hyperedges


class LeakingCoupler(Coupler):
    r"""Hypergraph convolutions over the experts of each token, batched in the obvious, wrong way.

    .. math:: X \leftarrow D^{-1} H B^{-1} H^\top X \Theta + b

    A hypergraph is put into PyG's ``Data`` as if its ``edge_index`` held two rows of nodes.
    ``Batch`` therefore shifts both rows of token n by n·E, while hyperedge ids need a shift by
    n·M. With more hyperedges than experts (all pairs from E = 4, all triplets from E = 5) the last
    ids of token n are the first ids of token n + 1: their hyperedges merge, and every token hears
    from its future and, at the ends, from the neighbouring sequence. With M ≤ E nothing merges,
    and the coupler is honest.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: the batching that code for coupling experts by hypergraphs has used in public.
    """

    hyperedge_index: Tensor

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        members = static_hyperedges(config.num_experts, config.static_hyperedge_strategy)
        self.register_buffer("hyperedge_index", hyperedge_index(members), persistent=False)
        width, depth = config.embed_dim, config.gnn_layers if members else 0
        self.layers = nn.ModuleList(HypergraphConv(width, width) for _ in range(depth))

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D), letting tokens see each other."""
        del layer_input
        graphs = [Data(x=x_ED, edge_index=self.hyperedge_index) for x_ED in expert_outputs.flatten(0, 1)]
        batch = Batch.from_data_list(graphs)  # pyright: ignore[reportArgumentType]
        x = self._convolve(batch.x, batch.edge_index)  # pyright: ignore[reportAttributeAccessIssue]
        return self.combiner(x.view(expert_outputs.shape).mean(2))

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Convolve the hypergraph of each token by itself: what ``forward`` was meant to do."""
        del layer_input
        tokens = [self._convolve(x_ED, self.hyperedge_index) for x_ED in expert_outputs.flatten(0, 1)]
        return self.combiner(torch.stack(tokens).view(expert_outputs.shape).mean(2))

    def _convolve(self, x: Tensor, index: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, index)
        return x
