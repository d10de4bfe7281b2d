"""Every ``hgnn_conv_type``: its formula, its dense oracle, and what must hold on any hypergraph."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.nn import HypergraphConv
from torch_geometric.utils import scatter

from gnnmoe.hypergraph.propagation import FORMULAS, hyperedge_index
from gnnmoe.hypergraph.strategies import static_hyperedges
from gnnmoe.layers.base import LAYERS
from tests.gnnmoe._support import (
    DEFAULT_STRATEGIES,
    NO_HYPEREDGES,
    assert_near,
    assert_same_function,
    dense_oracle,
    every_conv_type,
    gradients,
    hear,
    make_coupler,
    make_layer,
    normal,
)

HYPERGRAPHS = {  # nothing, M below, at and above E; then graphs with isolated experts
    **{
        f"{strategy} E={E}": (E, static_hyperedges(E, strategy))
        for strategy, E in (("all", 0), ("ring", 1), ("all", 2), ("ring", 4), ("all_triplets", 5), ("all", 8))
    },
    "isolated last": (4, [(0, 1), (1, 2)]),
    "as many experts as hyperedges, one isolated": (3, [(0, 1), (0, 1), (0,)]),
    "more hyperedges than experts, isolated": (3, [(0, 2), (0,), (2,), (0, 2), (0, 2)]),
}
MIXED = [(0, 1), (1, 2, 3), (0, 1, 3), (3,)]  # sizes 1 to 3, degrees 2 and 3, one hyperedge of one expert
NOT_STATIC = ("HNHN", "HypergraphAttention", "AllDeepSets", "AllSetTransformer", "EDHNN")


def naive(layer, x: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    found = layer.naive(list(x.unbind(1)), weights, list(start.unbind(1)))
    return torch.stack(found, dim=1) if found else x


@pytest.mark.parametrize("name", HYPERGRAPHS)
@every_conv_type
def test_forward_is_the_formula_with_all_gradients_on_any_hypergraph(conv_type, name):
    """No NaN where a set is empty."""
    E, members = HYPERGRAPHS[name]
    layer = make_layer(members, E, conv_type, D=4)
    inputs = [normal(2, E, 4), normal(len(members), seed=3).exp(), normal(2, E, 4, seed=4)]
    if E == 0:
        assert hear(layer, *inputs).shape == (2, 0, 4)
        return
    parameters = dict(layer.named_parameters())
    assert_same_function(
        lambda *values: hear(layer, *values), lambda *values: naive(layer, *values), inputs, parameters
    )
    for gradient in gradients(hear(layer, *inputs), parameters.values()):
        assert gradient.isfinite().all()


@every_conv_type
def test_gradcheck(conv_type):
    layer = make_layer(MIXED, 4, conv_type, D=2)
    values = [normal(1, 4, 2), normal(4).exp(), normal(1, 4, 2, seed=6)]
    assert torch.autograd.gradcheck(lambda *v: hear(layer, *v), [v.requires_grad_(True) for v in values])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.permutations(range(5)), st.integers(0, 2**16))
@every_conv_type
def test_permuted_experts_together_with_their_hypergraph_permute_the_output(conv_type, order, seed):
    members = [*static_hyperedges(5, f"random:k=3,m=4,seed={seed}"), (0, 4)]
    place = {expert: position for position, expert in enumerate(order)}
    moved = [tuple(sorted(place[expert] for expert in edge)) for edge in members]
    x, start, weights = normal(2, 5, 4), normal(2, 5, 4, seed=2), normal(5, seed=3).exp()
    before = hear(make_layer(members, 5, conv_type, D=4), x, weights, start)
    after = hear(make_layer(moved, 5, conv_type, D=4), x[:, order], weights, start[:, order])
    assert_near(after, before[:, order])


@every_conv_type
def test_a_common_factor_of_all_weights_changes_nothing_but_in_pygs_formula(conv_type):
    layer = make_layer(MIXED, 4, conv_type, D=4)
    x, w = normal(2, 4, 4), normal(4, seed=3).exp()
    before, after = hear(layer, x, w, x), hear(layer, x, 3.7 * w, x)
    if conv_type == "PyGHypergraphConv":
        assert_near(after - layer.bias, (before - layer.bias) / 3.7)
    else:
        assert_near(after, before)
    assert (hear(layer, x, w.flip(0), x) - before).abs().max() > 1e-3  # but their ratios matter


@every_conv_type
def test_weights_towards_zero_stay_finite(conv_type):
    dtype = torch.float32
    layer = make_layer(MIXED, 4, conv_type, D=4).to(dtype)
    x = normal(2, 4, 4, dtype=dtype)
    for pushed in (1, 2, 4):
        w = normal(4, dtype=dtype).exp()
        w[:pushed] = 1e-6
        w.requires_grad_(True)
        output = hear(layer, x, w, x)
        assert output.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(output, [w, *layer.parameters()]))


def depends_on_the_order(conv_type: str) -> bool:
    """Whether pairs and triplets differ as functions of the experts, through the coupler's readout.

    Same parameters, unweighted, no activation and no residual: what is left is the layer itself.
    """
    outputs = []
    for strategy in ("all_pairs", "all_triplets"):
        coupler = make_coupler(
            num_experts=5, hgnn_conv_type=conv_type, static_hyperedge_strategy=strategy,
            hgnn_learnable_edge_weights=False, coupler_options={"activation": "none", "residual": False},
        )  # fmt: skip
        outputs.append(coupler(normal(2, 3, 5, 6)))
    return bool((outputs[0] - outputs[1]).abs().max() > 1e-6)


def test_fact_3_only_an_activation_at_the_hyperedge_sees_the_hyperedge_order():
    """Linear static layers are mean + Linear for pairs and triplets alike; HNHN is not."""
    assert all(map(depends_on_the_order, NOT_STATIC))
    assert not any(map(depends_on_the_order, (*FORMULAS, "MeanPooling")))


def means(members, E, w) -> tuple[Tensor, Tensor]:
    """B⁻¹ Hᵀ and D⁻¹ H W as dense matrices."""
    H = make_layer(members, E, "HypergraphConv").incidence_EM
    return (H / H.sum(0)).T, (H * w) / (H @ w)[:, None]


def mlp(part, x: Tensor) -> Tensor:
    return F.gelu(x @ part.first.weight.T + part.first.bias) @ part.second.weight.T + part.second.bias


X, W = normal(2, 4, 4), normal(4, seed=3).exp()


def test_dense_oracle_of_hnhn():
    layer = make_layer(MIXED, 4, "HNHN", D=4)
    to_edges, to_experts = means(MIXED, 4, W)
    z = F.gelu(to_edges @ X @ layer.to_hyperedges.weight.T + layer.to_hyperedges.bias)
    expected = to_experts @ z @ layer.to_experts.weight.T + layer.to_experts.bias
    assert_near(hear(layer, X, W, X), expected)


def test_dense_oracle_of_all_deep_sets():
    layer = make_layer(MIXED, 4, "AllDeepSets", D=4)
    to_edges, to_experts = means(MIXED, 4, W)
    z = mlp(layer.to_hyperedges, to_edges @ mlp(layer.of_members, X))
    assert_near(hear(layer, X, W, X), mlp(layer.to_experts, to_experts @ mlp(layer.of_hyperedges, z)))


def test_dense_oracle_of_all_set_transformer():
    """Both poolings by torch's own attention, with a mask and log w as an additive bias, in two heads."""
    layer = LAYERS["AllSetTransformer"](MIXED, 4, 4, 2).double()
    H = layer.incidence_EM

    def pooled(part, x, bias):
        def heads(y):
            return y.view(2, -1, 2, 2).transpose(1, 2)

        query = part.query[None, :, None].expand(2, -1, bias.shape[0], -1)
        found = F.scaled_dot_product_attention(
            query, heads(part.key(x)), heads(part.value(x)), attn_mask=bias, scale=1.0
        )
        y = part.norm1(found.transpose(1, 2).flatten(2) + part.query.flatten())
        return part.norm2(y + mlp(part, y))

    z = pooled(layer.to_hyperedges, X, H.T.log())
    assert_near(hear(layer, X, W, X), pooled(layer.to_experts, z, (H * W).log()))


def test_dense_oracle_of_edhnn():
    layer = make_layer(MIXED, 4, "EDHNN", D=4)
    to_edges, to_experts = means(MIXED, 4, W)
    start = normal(2, 4, 4, seed=8)
    m = to_edges @ mlp(layer.of_members, X)
    pairs = F.gelu(layer.from_expert(X)[:, :, None] + layer.from_hyperedge(m)[:, None])  # (N, E, M, D)
    heard = layer.message((to_experts[:, :, None] * pairs).sum(2))
    assert_near(hear(layer, X, W, start), layer.update(0.5 * heard + 0.5 * start))


PARITY_SUITE = {
    "M=2": [[0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 0, 1]],
    "M=5": [[0, 0, 1, 1, 2, 3, 3, 3, 2, 1, 2], [0, 1, 2, 1, 2, 1, 0, 3, 3, 4, 4]],
}


@pytest.mark.parametrize("index", PARITY_SUITE.values(), ids=PARITY_SUITE)
def test_parity_suite_hypergraph_attention_is_pygs_with_attention(index):
    """PyG's ``use_attention=True, attention_mode="edge"`` with mean hyperedge features, all weights 1."""
    experts, edges = torch.tensor(index)
    M = int(edges.max()) + 1
    members = [tuple(sorted(experts[edges == edge].tolist())) for edge in range(M)]
    layer = make_layer(members, 4, "HypergraphAttention", D=4)
    conv = HypergraphConv(4, 4, use_attention=True, attention_mode="edge").double()
    with torch.no_grad():
        conv.lin.weight.copy_(layer.weight)
        conv.att.copy_(layer.scores.view(1, 1, 8))
        assert conv.bias is not None
        conv.bias.copy_(layer.bias)
    node, edge = hyperedge_index(members)

    def pyg(x: Tensor) -> Tensor:
        features = scatter(x[node], edge, dim_size=M, reduce="mean")
        return conv(x, torch.stack([node, edge]), hyperedge_attr=features, num_edges=M)

    ones = torch.ones(M).double()
    assert_same_function(lambda x: hear(layer, x[None], ones)[0], pyg, [normal(4, 4)])


@pytest.mark.filterwarnings(NO_HYPEREDGES)
@every_conv_type
def test_inert_parameters_are_right_on_every_strategy(conv_type):
    """What is declared has no gradient, and everything else has one."""
    strategies = [*DEFAULT_STRATEGIES, "k_subsets:4", "random:k=2,m=1"]
    pairs = zip(itertools.cycle((4, 2, 3)), strategies, strict=False)
    for E, strategy in [*pairs, (3, "all_pairs"), (3, "all"), (2, "ring"), (4, "ring")]:
        coupler = make_coupler(num_experts=E, hgnn_conv_type=conv_type, static_hyperedge_strategy=strategy)
        inert, parameters = coupler.inert_parameters(), dict(coupler.named_parameters())
        found = gradients(coupler(normal(2, 3, E, 6)), parameters.values())
        for name, gradient in zip(parameters, found, strict=True):
            assert bool(gradient.abs().max() > 1e-9) == (name not in inert), (strategy, E, name)


@every_conv_type
def test_communication_tells_weights_adjacency_and_what_a_layer_attends_to(conv_type):
    """By member names, adjacency and mixing; the membership where it depends on the content."""
    coupler = make_coupler(hgnn_conv_type=conv_type, num_experts=4)
    x = normal(2, 3, 4, 6)
    found = coupler.communication(x)
    attends = conv_type in ("HypergraphAttention", "AllSetTransformer")
    memberships = {"membership_0", "membership_1"} if attends else set()
    assert found.keys() == {"hyperedge_weights", "adjacency", "mixing"} | memberships
    H, w = coupler.layers[0].incidence_EM, coupler.effective_hyperedge_weights()
    formula = conv_type if conv_type not in NOT_STATIC else "HypergraphConv"
    assert_near(found["adjacency"], dense_oracle(H, w, formula))
    for name in memberships:
        assert found[name].shape == (4, 6)
        assert_near(found[name].sum(1), torch.ones(4))
        assert torch.count_nonzero(found[name] * (1 - H)) == 0
        uniform = H / H.sum(1, keepdim=True)
        assert (found[name] - uniform).abs().max() > 1e-3


def test_membership_is_the_mean_over_tokens_of_the_formulas_softmax():
    layer = make_layer(MIXED, 4, "HypergraphAttention", D=4)
    mapped = X @ layer.weight.T
    to_edges, _ = means(MIXED, 4, W)
    scores = (mapped @ layer.scores[0])[:, :, None] + (to_edges @ mapped @ layer.scores[1])[:, None, :]
    H = layer.incidence_EM
    expected = F.leaky_relu(scores, 0.2).masked_fill(H == 0, -torch.inf).softmax(-1).mean(0)
    assert_near(layer.membership(X, W), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hgnn_conv_type": "HNHN", "coupler_options": {"backend": "pyg"}}, "HNHN has vectorized only"),
        ({"hgnn_conv_type": "HGNNConv", "coupler_options": {"edge_weights": "raw"}}, "raw may be negative"),
        ({"hgnn_conv_type": "HNNH"}, "mean 'HNHN'"),
    ],
)
def test_what_a_layer_cannot_do_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_coupler(**fields)
