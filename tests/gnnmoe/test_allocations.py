"""The fast forms hold no features of hyperedges and of pairs of experts (spec, "The fast forms").

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

import pytest
import torch

from gnnmoe.hypergraph.strategies import static_hyperedges
from tests.gnnmoe._memory import Allocations, saved_elements
from tests.gnnmoe._support import make_coupler, make_layer, normal

B, L, D = 4, 16, 64
N = B * L


def expert_major(E: int) -> torch.Tensor:
    """Expert outputs (B, L, E, D) as the experts write them."""
    return normal(E, B, L, D).permute(1, 2, 0, 3).requires_grad_(True)


def watched(coupler, x: torch.Tensor, backward: bool = True) -> Allocations:
    layer_input, cotangent = normal(*x.shape[:2], D, seed=5), normal(*x.shape[:2], D, seed=6)
    watch = Allocations([x, layer_input, cotangent, *coupler.parameters(), *coupler.buffers()])
    with watch:
        output = coupler(x, layer_input)
        if backward:
            torch.autograd.grad(output, [x, *coupler.parameters()], cotangent, allow_unused=True)
    return watch


SIX_BY_TWENTY = {"num_experts": 6, "static_hyperedge_strategy": "all_triplets", "embed_dim": D}
SMALL = [{"hgnn_conv_type": conv} for conv in ("HypergraphConv", "HGNNConv", "HNHN", "HypergraphAttention")]
SMALL += [{"coupler_options": {"activation": "none", "residual": residual}} for residual in (True, False)]


@pytest.mark.parametrize("fields", SMALL, ids=lambda fields: str(*fields.values()))
def test_hypergraph_layers_hold_nothing_larger_than_the_experts(fields):
    """20 hyperedges on 6 experts: (N, M, D) would be 3.3 times as large, (N, E, E, D) 6 times."""
    watch = watched(make_coupler(**SIX_BY_TWENTY, **fields), expert_major(6))
    assert N * D <= watch.largest <= N * 6 * D


def test_graph_layers_hold_nothing_larger_than_the_input_of_their_one_product():
    """(N, E, 2·D): what an expert hears beside what it is."""
    watch = watched(make_coupler(coupler_type="GNN", num_experts=6, embed_dim=D), expert_major(6))
    assert watch.largest == N * 6 * 2 * D


def test_graph_layers_keep_an_eighth_of_what_pairs_would():
    """For each token, at 16 experts of width 256; the product's joined weights are kept once for all."""
    coupler = make_coupler(coupler_type="GNN", num_experts=16, embed_dim=256)

    def kept(call, tokens: int) -> int:
        x = normal(16, 1, tokens, 256).permute(1, 2, 0, 3).requires_grad_(True)
        return saved_elements(lambda: call(x), [x, *coupler.parameters()])

    fast, pairwise = (kept(call, 3) - kept(call, 2) for call in (coupler, coupler.reference))
    assert 16 * 256 < fast <= pairwise / 8


@pytest.mark.parametrize("name", ["mean", "mean_linear", "static", "gate", "topk"])
def test_weighted_sums_read_the_experts_where_they_are(name):
    """No copy of the experts forward; backward their gradient alone, which for a mean is one row."""
    coupler, x = make_coupler(coupler_type=name, num_experts=6, embed_dim=D), expert_major(6)
    assert watched(coupler, x, backward=False).largest <= N * D
    watch = watched(coupler, x)
    assert watch.largest == (N * D if name.startswith("mean") else N * 6 * D)
    assert watch.peak < 2 * N * 6 * D


def chunked(conv_type: str, E: int, strategy: str, tokens: int) -> tuple[Allocations, int]:
    members = static_hyperedges(E, strategy)
    layer = make_layer(members, E, conv_type, D=D)
    x, start = (normal(E, tokens, D, seed=k).transpose(0, 1).requires_grad_(True) for k in (1, 2))
    weights, cotangent = normal(len(members)).exp().requires_grad_(True), normal(tokens, E, D)
    parameters = list(layer.parameters())
    from_weights = layer.from_weights(weights)
    watch = Allocations([x, start, cotangent, from_weights, *parameters, *layer.buffers()])
    with watch:
        output = layer(x, from_weights, start)
        leaves = [x, start, from_weights, *parameters]
        torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    return watch, sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("conv_type", "E", "strategy"),
    [("AllDeepSets", 6, "all_triplets"), ("AllSetTransformer", 4, "all_pairs"),
     ("AllSetTransformer", 4, "all"), ("EDHNN", 6, "all_triplets"), ("EDHNN", 4, "all")],
)  # fmt: skip
def test_layers_that_need_a_row_for_each_hyperedge_go_over_the_tokens_in_pieces(conv_type, E, strategy):
    """Peak at most 4·N·E·D, output and gradients of the inputs included, beside those of the parameters."""
    tokens = 512
    watch, parameters = chunked(conv_type, E, strategy, tokens)
    assert 2 * tokens * E * D < watch.peak <= 4 * tokens * E * D + 2 * parameters
