"""Five ways to compute a static layer: PyG for each token, PyG once, scatter, sparse, and one matrix.

Each backend takes the layer, its input ``x`` (N, E, D) and the hyperedge weights (M); ``vectorized`` takes P
(E, E) instead of the weights. All agree in float64 to 1e-10. The original experiments ran ``loop``, which is
kept as the baseline of the benchmark. Only ``vectorized`` also runs under ``torch.func.vmap`` with stacked
parameters. No other file of gnnmoe imports PyG.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.config import Refused
from gnnmoe.hypergraph.propagation import propagation_factors
from gnnmoe.mixing import mix, rowwise


class StaticLayer(Protocol):
    """What a backend reads of a layer: Θ and b, the hypergraph, the formula, and its own PyG convolution."""

    weight: nn.Parameter
    bias: nn.Parameter
    index: Tensor
    incidence_EM: Tensor
    formula: str
    pyg_conv: list[nn.Module]


def vectorized(layer: StaticLayer, x_NED: Tensor, P_EE: Tensor) -> Tensor:
    """Apply P to all tokens at once: no index, no gathering. (P X) Θ + b is one matrix product."""
    return rowwise(lambda x: F.linear(x, layer.weight, layer.bias), mix(P_EE, x_NED))


def scatter(layer: StaticLayer, x_NED: Tensor, weights_M: Tensor) -> Tensor:
    """Gather the members and sum them into hyperedges with torch_scatter; then back the same way."""
    scatter_sum = _optional("torch_scatter").scatter_sum
    experts, edges = layer.index
    before_E, per_edge_M, after_E = propagation_factors(layer.incidence_EM, weights_M, layer.formula)
    mapped_NED = F.linear(x_NED, layer.weight) * before_E[:, None]
    z_NMD = scatter_sum(mapped_NED[:, experts], edges, dim=1, dim_size=len(per_edge_M))
    z_NMD = z_NMD * per_edge_M[:, None]
    heard_NED = scatter_sum(z_NMD[:, edges], experts, dim=1, dim_size=x_NED.shape[1])
    return heard_NED * after_E[:, None] + layer.bias


def sparse(layer: StaticLayer, x_NED: Tensor, weights_M: Tensor) -> Tensor:
    """Multiply by the sparse incidence with torch_sparse; all tokens stand side by side as columns."""
    spmm = _optional("torch_sparse").spmm
    N, E, D = x_NED.shape
    M = len(weights_M)
    before_E, per_edge_M, after_E = propagation_factors(layer.incidence_EM, weights_M, layer.formula)
    mapped_NED = F.linear(x_NED, layer.weight) * before_E[:, None]
    ones = mapped_NED.new_ones(layer.index.shape[1])
    columns = mapped_NED.transpose(0, 1).reshape(E, N * D)
    z = spmm(layer.index.flip(0), ones, M, E, columns) * per_edge_M[:, None]
    heard_NED = spmm(layer.index, ones, E, M, z).view(E, N, D).transpose(0, 1)
    return heard_NED * after_E[:, None] + layer.bias


def pyg(layer: StaticLayer, x_NED: Tensor, weights_M: Tensor) -> Tensor:
    """Call PyG once: expert ids of token n are shifted by n·E, hyperedge ids by n·M.

    ``torch_geometric.data.Batch`` would shift both by E. Hyperedges of different tokens would then merge
    where M > E: this is the leak that the leak check catches.
    """
    N, E, D = x_NED.shape
    M = weights_M.shape[0]
    index = layer.index
    per_token = torch.tensor([[E], [M]], device=index.device)
    shift = torch.arange(N, device=index.device)[:, None] * per_token[:, None]
    batched = (index[:, None, :] + shift).reshape(2, -1)
    return _convolve(layer, x_NED.reshape(N * E, D), batched, weights_M, tokens=N).view(N, E, D)


def loop(layer: StaticLayer, x_NED: Tensor, weights_M: Tensor) -> Tensor:
    """Call PyG once per token, as the original experiments did."""
    return torch.stack([_convolve(layer, x_ED, layer.index, weights_M, tokens=1) for x_ED in x_NED])


BACKENDS = {"vectorized": vectorized, "pyg": pyg, "loop": loop, "scatter": scatter, "sparse": sparse}
OPTIONAL_PACKAGES = {"scatter": "torch_scatter", "sparse": "torch_sparse"}
"""The package that a backend needs beyond the project's own dependencies."""


def require_backend(backend: str) -> None:
    """Check that the package of a backend can be imported.

    Raises:
        Refused: it cannot be imported; says how to install it.
    """
    if backend in OPTIONAL_PACKAGES:
        _optional(OPTIONAL_PACKAGES[backend])


def missing_backends() -> list[str]:
    """Return the backends whose package cannot be imported here."""
    missing = []
    for backend in OPTIONAL_PACKAGES:
        try:
            require_backend(backend)
        except Refused:
            missing.append(backend)
    return missing


@cache
def _optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except (ImportError, OSError) as error:  # OSError: built for another torch
        backend = next(name for name, needed in OPTIONAL_PACKAGES.items() if needed == package)
        raise Refused(
            f"backend {backend} needs {package}, which cannot be imported ({error}); install it with "
            "pip install --no-build-isolation 'gnnmoe[scatter]' (without a ready wheel it is compiled, "
            "which takes 10 to 40 minutes), or choose backend vectorized."
        ) from error


def _convolve(layer: StaticLayer, x: Tensor, index: Tensor, weights_M: Tensor, tokens: int) -> Tensor:
    """Run the layer's PyG convolution on the features (nodes, D) of this many tokens."""
    conv: Any = _shared_conv(layer)
    if layer.formula == "PyGHypergraphConv":
        return conv(x, index, weights_M.repeat(tokens), num_edges=tokens * len(weights_M))
    factors = propagation_factors(layer.incidence_EM, weights_M, layer.formula)
    return conv(x, index, *(factor.repeat(tokens) for factor in factors))


def _shared_conv(layer: StaticLayer) -> nn.Module:
    """Return a PyG convolution whose parameters are the layer's own, made once per layer.

    It is kept outside the module tree, where the layer's parameters appear already.
    """
    if not layer.pyg_conv:
        with torch.random.fork_rng(devices=[]):  # PyG draws parameters, which are replaced at once
            conv = _conv_class(layer.formula)(*layer.weight.shape[::-1])
        layer.pyg_conv.append(conv)
    conv: Any = layer.pyg_conv[0]
    conv.lin.weight, conv.bias = layer.weight, layer.bias
    return conv


@cache
def _conv_class(formula: str) -> type[nn.Module]:
    from torch_geometric.nn import HypergraphConv

    if formula == "PyGHypergraphConv":
        return HypergraphConv

    class FactoredHypergraphConv(HypergraphConv):
        """PyG's two propagations with the factors of another formula."""

        def forward(self, x, hyperedge_index, before, per_edge, after):  # pyright: ignore
            x = self.lin(x) * before[:, None]
            nodes, edges = x.shape[0], per_edge.shape[0]
            x = self.propagate(hyperedge_index, x=x, norm=per_edge, alpha=None, size=(nodes, edges))
            x = self.propagate(hyperedge_index.flip(0), x=x, norm=after, alpha=None, size=(edges, nodes))
            return x.view(-1, self.out_channels) + self.bias

    return FactoredHypergraphConv


class PyGHypergraphConvWrapper(nn.Module):
    """PyG's ``HypergraphConv`` under its name in the original experiments.

    It computes PyG's formula (``PyGHypergraphConv``): hyperedge weights enter only the degree.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _conv_class("PyGHypergraphConv")(in_channels, out_channels)

    def forward(self, x: Tensor, hyperedge_index: Tensor, hyperedge_weight: Tensor | None = None) -> Tensor:
        """Return (nodes, out_channels) for ``x`` (nodes, in_channels) and an index (2, nnz).

        Raises:
            ValueError: the index names a node or a hyperedge weight that does not exist.
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
