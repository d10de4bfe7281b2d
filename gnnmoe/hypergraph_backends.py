"""The same static propagation three ways: PyG token by token, one PyG call, one matrix product.

All take ``x`` (N, E, D), the layer's weight and bias, the hyperedge index and the hyperedge
weights, and agree in float64 to 1e-10. ``loop`` is what the original experiments ran; it is kept
as the thing to be replaced.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.hypergraph import propagation_matrix, safe_reciprocal

if TYPE_CHECKING:
    from gnnmoe.couplers.hgnn import HypergraphLayer


def vectorized(layer: HypergraphLayer, x_NED: Tensor, weights_M: Tensor) -> Tensor:
    """Apply P (E, E) to all tokens at once: no index is built, nothing is gathered."""
    P_EE = propagation_matrix(layer.incidence_EM, weights_M, layer.formula)
    return torch.matmul(P_EE, F.linear(x_NED, layer.weight)) + layer.bias


def pyg(layer: HypergraphLayer, x_NED: Tensor, weights_M: Tensor) -> Tensor:
    """Call PyG once: hyperedge ids of token n are shifted by n·M, expert ids by n·E.

    ``torch_geometric.data.Batch`` would shift both by E, and hyperedges of different tokens would
    merge wherever M > E: that is the leak which the gate catches.
    """
    N, E, D = x_NED.shape
    M = weights_M.shape[0]
    index = layer.index
    shift = (
        torch.arange(N, device=index.device)[:, None] * torch.tensor([[E], [M]], device=index.device)[:, None]
    )
    batched = (index[:, None, :] + shift).reshape(2, -1)
    conv = _shared_conv(layer)
    return conv(x_NED.reshape(N * E, D), batched, weights_M.repeat(N), num_edges=N * M).view(
        N, E, layer.weight.shape[0]
    )


def loop(layer: HypergraphLayer, x_NED: Tensor, weights_M: Tensor) -> Tensor:
    """Call PyG once a token, as the original experiments did."""
    conv = _shared_conv(layer)
    M = weights_M.shape[0]
    return torch.stack([conv(x_ED, layer.index, weights_M, num_edges=M) for x_ED in x_NED])


BACKENDS = {"vectorized": vectorized, "pyg": pyg, "loop": loop}


def _shared_conv(layer: HypergraphLayer) -> nn.Module:
    """Return a PyG convolution whose parameters are the layer's own, made once a layer.

    It is kept outside the module tree: the layer's parameters appear there already.
    """
    if not layer.pyg_conv:
        with torch.random.fork_rng(devices=[]):  # PyG initialises what is replaced right away
            conv = _conv_class(layer.formula)(*layer.weight.shape[::-1])
        layer.pyg_conv.append(conv)
    conv: Any = layer.pyg_conv[0]
    conv.lin.weight, conv.bias = layer.weight, layer.bias
    return conv


@cache
def _conv_class(formula: str) -> type[nn.Module]:
    from torch_geometric.nn import HypergraphConv
    from torch_geometric.utils import scatter

    if formula == "PyGHypergraphConv":
        return HypergraphConv

    class DocumentedHypergraphConv(HypergraphConv):
        """PyG's layer with the weights in the message too, as its documentation says."""

        def forward(self, x, hyperedge_index, hyperedge_weight, num_edges):  # pyright: ignore
            experts, edges = hyperedge_index
            size = scatter(x.new_ones(edges.shape[0]), edges, dim_size=num_edges)
            degree = scatter(hyperedge_weight[edges], experts, dim_size=x.shape[0])
            to_edges = hyperedge_weight * safe_reciprocal(size)
            x = self.lin(x)
            x = self.propagate(hyperedge_index, x=x, norm=to_edges, alpha=None, size=(x.shape[0], num_edges))
            x = self.propagate(hyperedge_index.flip(0), x=x, norm=safe_reciprocal(degree), alpha=None,
                               size=(num_edges, degree.shape[0]))  # fmt: skip
            return x.view(-1, self.out_channels) + self.bias

    return DocumentedHypergraphConv


class PyGHypergraphConvWrapper(nn.Module):
    """PyG's ``HypergraphConv`` under its name in the original experiments.

    It computes PyG's formula (``PyGHypergraphConv`` here), in which hyperedge weights enter the
    degree only.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv_class("PyGHypergraphConv")(in_channels, out_channels)

    def forward(self, x: Tensor, hyperedge_index: Tensor, hyperedge_weight: Tensor | None = None) -> Tensor:
        """Return (nodes, out_channels) for ``x`` (nodes, in_channels) and an index (2, nnz).

        Raises:
            ValueError: the index names a node or a hyperedge weight that is not there.
        """
        nodes, edges = hyperedge_index
        if nodes.numel() and int(nodes.max()) >= x.shape[0]:
            raise ValueError(f"hyperedge_index names node {int(nodes.max())}; x has {x.shape[0]} nodes.")
        num_edges = int(edges.max()) + 1 if edges.numel() else 0
        if hyperedge_weight is not None:
            if num_edges > hyperedge_weight.shape[0]:
                raise ValueError(
                    f"hyperedge_index names hyperedge {num_edges - 1}; "
                    f"there are {hyperedge_weight.shape[0]} hyperedge weights."
                )
            num_edges = hyperedge_weight.shape[0]
        return self.conv(x, hyperedge_index, hyperedge_weight, num_edges=num_edges)
