"""Two lower bounds on the time of a coupler's forward + backward, from the bytes it moves and its FLOPs.

Shapes: N tokens, E experts, D width, M hyperedges. Bytes are counted in *rows*, tensors (N, D): the expert
outputs are E rows.

The **floor** knows only the FLOPs of the coupler. The forward reads the expert outputs and writes the
output: E + 1 rows. The backward reads the expert outputs and the output's gradient, and writes the gradient
of the expert outputs: 2·E + 1 rows. Its time is the larger of bytes / copy bandwidth and FLOPs / matrix rate.

The **roofline** follows the algorithm, with one kernel for each matrix product. A product reads its inputs
and writes its output. The operations before it (an activation) and after it (activation, residual, mean over
experts, norm) are fused into the kernel. The forward writes the pre-activation, which the backward needs
again. Each product has two in the backward: one for the gradient of its input, one for the gradient of its
weights. Small numbers (E × E per token: P, gates, scores) and everything of hyperedges live in registers.
The time of the roofline is the sum over products of the larger of their two times. A kernel that joins two
products may be faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import linear_flops
from gnnmoe.couplers.registry import resolved_options
from gnnmoe.hypergraph.propagation import FORMULAS
from gnnmoe.hypergraph.strategies import static_hyperedges


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do, in the process that also measured the times beside it."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """Return the larger of the two times."""
        return max(flops / self.flops_per_second, moved_bytes / self.bytes_per_second)


@dataclass(frozen=True)
class Product:
    """One matrix product of the forward or of the backward, with the operations that are fused to it."""

    name: str
    flops: int
    rows: int
    """Tensors (N, D) that it reads and writes."""


def floor_bytes(tokens: int, experts: int, width: int, element_bytes: int) -> int:
    """Return the fewest bytes that a coupler moves in forward + backward: 3·E + 2 rows."""
    return (3 * experts + 2) * tokens * width * element_bytes


def roofline_seconds(config: GNNMoEConfig, tokens: int, element_bytes: int, rates: Rates) -> float | None:
    """Return the roofline of forward + backward, or None for a coupler without one here."""
    products = roofline(config, tokens)
    if products is None:
        return None
    row_bytes = tokens * config.embed_dim * element_bytes
    return sum(rates.seconds(product.flops, product.rows * row_bytes) for product in products)


def roofline(config: GNNMoEConfig, tokens: int) -> list[Product] | None:
    """Return the products of static, gate, GNN and the hypergraph stacks of static layers and HNHN.

    Among the hypergraph stacks these are the stack with activation and residual, and the linear stack, which
    folds into a weighted sum over experts and maps of one row. None for everything else.
    """
    kind, E, D = config.coupler_type, config.num_experts, config.embed_dim
    weighted_sum = linear_flops(tokens, E, D)
    if kind in ("static", "gate"):
        gate = int(kind == "gate")  # reads the layer's input u too, and maps it to the E weights
        return [
            Product("sum", (1 + gate) * weighted_sum, E + 1 + gate),  # x (and u); m
            Product("sum, input", (2 + gate) * weighted_sum, 2 * E + 1 + gate),  # dm, x; dx (and du)
            *[Product("gate, weights", weighted_sum, 1)] * gate,  # u
            *_combiner(tokens, D),
        ]
    if kind == "GNN":
        return [*_stack(_graph_layer(config, tokens), config.gnn_layers, E), *_combiner(tokens, D)]
    if kind != "HGNN" or not static_hyperedges(E, config.static_hyperedge_strategy):
        return None
    options = resolved_options(config)
    form = options.get("activation"), options.get("residual")
    if form == ("gelu", True) and config.hgnn_conv_type in (*FORMULAS, "HNHN"):
        layer = _node_layer if config.hgnn_conv_type == "HNHN" else _static_layer
        return [*_stack(layer(config, tokens), config.gnn_layers, E), *_combiner(tokens, D)]
    if form == ("none", False) and config.hgnn_conv_type in FORMULAS:
        maps = [Product(f"map{part}", linear_flops(tokens, D, D), 2) for part in ("", ", input", ", weights")]
        return [
            Product("sum", weighted_sum, E + 1),
            Product("sum, input", 2 * weighted_sum, 2 * E + 1),
            *maps * config.gnn_layers,
            *_combiner(tokens, D),
        ]
    return None


@dataclass(frozen=True)
class _Counted:
    """A product of a layer: its FLOPs, and its rows in units of (N, E, D).

    The ``outer`` rows belong to the layer's output or its gradient. In the last layer these are one row each,
    the mean over experts.
    """

    name: str
    flops: int
    inner: int
    outer: int


def _stack(layer: list[_Counted], layers: int, experts: int) -> Iterator[Product]:
    for number in range(layers):
        last = number == layers - 1
        for one in layer:
            rows = one.inner * experts + one.outer * (1 if last else experts)
            yield Product(f"layer {number}: {one.name}", one.flops, rows)


def _static_layer(config: GNNMoEConfig, tokens: int) -> list[_Counted]:
    """x' = x + GELU(h), h = P x Θ + b. Saved: x and h."""
    E, D = config.num_experts, config.embed_dim
    flops = linear_flops(tokens * E, D, D) + linear_flops(tokens * E, E, D)
    return [
        _Counted("Θ", flops, 2, 1),  # x; h, x'
        _Counted("Θ, input", flops, 2, 1),  # h, dx'; dx
        _Counted("Θ, weights", flops, 2, 1),  # x, h, dx'
    ]


def _node_layer(config: GNNMoEConfig, tokens: int) -> list[_Counted]:
    """a = x Θ_E; h = mean(GELU(mean(a) + b_E)) Θ_V + b_V; x' = x + GELU(h). Saved: x, a and h."""
    E, D = config.num_experts, config.embed_dim
    M = len(static_hyperedges(E, config.static_hyperedge_strategy))
    flops = linear_flops(tokens * E, D, D) + linear_flops(tokens * E, M, D)
    return [
        _Counted("Θ_E", flops, 2, 0),  # x; a
        _Counted("Θ_V", flops, 3, 1),  # a, x; h, x'
        _Counted("Θ_V, input", flops, 3, 1),  # h, dx', a; da
        _Counted("Θ_V, weights", flops, 2, 1),  # a, h, dx'
        _Counted("Θ_E, input", flops, 2, 1),  # da, dx'; dx
        _Counted("Θ_E, weights", flops, 2, 0),  # x, da
    ]


def _graph_layer(config: GNNMoEConfig, tokens: int) -> list[_Counted]:
    """x' = x + GELU(h), h = [m, x] W with m = gates · x, the gates from two scores of x. Saved: x and h."""
    E, D = config.num_experts, config.embed_dim
    flops = 2 * tokens * (2 * E * D + E * E * D + 2 * E * D * D)
    return [
        _Counted("W", flops, 2, 1),  # x; h, x'
        _Counted("W, input", flops, 3, 1),  # h, dx', x; dx
        _Counted("W, weights", flops, 2, 1),  # x, h, dx'
    ]


def _combiner(tokens: int, width: int) -> list[Product]:
    """y = LayerNorm(GELU(h)), h = m W + b. Saved: m and h."""
    flops = linear_flops(tokens, width, width)
    return [
        Product("combiner", flops, 3),  # m; h, y
        Product("combiner, input", flops, 3),  # h, dy; dm
        Product("combiner, weights", flops, 3),  # m, h, dy
    ]
