"""What the portrait says of couplers that are known beforehand."""

import math
import re

import pytest
import torch

from bench.check.mixing import (
    NOT_LAST,
    NOT_USED,
    NoMixing,
    Readout,
    deviation,
    draw,
    effective_rank,
    jacobians,
    largest_entries,
    measure_mixing,
)
from bench.check.portrait import MEAN_ALONE, Portrait, draw_portrait
from bench.check.subject import Subject
from gnnmoe.config import GNNMoEConfig
from gnnmoe.hypergraph.propagation import hyperedge_index, incidence, propagation_matrix
from gnnmoe.hypergraph.strategies import static_hyperedges
from tests.check.portrait_couplers import WEIGHTS

HERE = "tests.check.portrait_couplers:"
SHORT = {"embed_dim": 8, "max_seq_length": 6}
LINEAR = {"activation": "none", "residual": False}
CPU = torch.device("cpu")


def config(coupler: str, **fields) -> GNNMoEConfig:
    return GNNMoEConfig(coupler_type=coupler, **{**SHORT, **fields})


def portrait(coupler: str, **fields) -> Portrait:
    return draw_portrait(config(coupler, **fields))


def original(**fields) -> GNNMoEConfig:
    """The original experiments' stack without weights."""
    return config("HGNN", hgnn_learnable_edge_weights=False, coupler_options=LINEAR, **fields)


@pytest.mark.parametrize(
    ("strategy", "layers", "conv_type"),
    [("all_pairs", 1, "PyGHypergraphConv"), ("all_triplets", 2, "HypergraphConv"),
     ("all_triplets", 3, "PyGHypergraphConv")],
)  # fmt: skip
def test_the_originals_linear_unweighted_stack_is_named_mean_and_linear(strategy, layers, conv_type):
    shape = {"static_hyperedge_strategy": strategy, "gnn_layers": layers, "hgnn_conv_type": conv_type}
    drawn = draw_portrait(original(**shape))
    assert re.fullmatch(r"equals mean \+ Linear to 1e-1[456]", drawn.verdict)
    assert drawn.sentence == f"before the combiner, this coupler {drawn.verdict}"
    assert drawn.mixing.effective_rank == pytest.approx(1, abs=1e-9)
    assert len(drawn.mixing.one_map.weights) == 36
    for weights in drawn.mixing.one_map.weights:
        assert weights == pytest.approx((0.25,) * 4)


@pytest.mark.parametrize(("strategy", "alone"), [("all", True), ("all_pairs", False)])
def test_one_hyperedge_of_all_experts_sees_their_mean_alone(strategy, alone):
    drawn = portrait("HGNN", static_hyperedge_strategy=strategy, gnn_layers=2)
    assert ("but sees only their mean" in drawn.verdict) == alone
    assert ("a mean or a linear layer cannot" in drawn.sentence) != alone


@pytest.mark.parametrize("formula", ["HypergraphConv", "PyGHypergraphConv"])
def test_the_weighted_linear_stack_has_the_weights_of_its_propagation_matrix(formula):
    fields = config("HGNN", hgnn_conv_type=formula, coupler_options=LINEAR, gnn_layers=3)
    mixing = measure_mixing(Subject(fields, 0, CPU))
    raw = Subject(fields, 0, CPU).perturbed_coupler().get_parameter("hyperedge_weights").detach()
    members = static_hyperedges(4, "all_pairs")
    H = incidence(hyperedge_index(members), 4, len(members))
    P = propagation_matrix(H, torch.nn.functional.softplus(raw), formula)
    expected = torch.linalg.matrix_power(P, 3).sum(0)
    assert mixing.one_map.weights[0] == pytest.approx((expected / expected.sum()).tolist(), rel=1e-10)
    assert re.match(r"equals a static weighted mean \+ Linear to 1e-1[456]$", draw_portrait(fields).verdict)


@pytest.mark.parametrize("num_experts", [1, 2])
@pytest.mark.filterwarnings("ignore:HGNN")
def test_without_hyperedges_it_is_the_mean(num_experts):
    fields = {"static_hyperedge_strategy": "all_triplets", "num_experts": num_experts}
    assert portrait("HGNN", **fields).verdict.startswith("equals the mean over experts to 1e-1")


VERDICTS = [
    ("mean", "equals the mean over experts to 1e-16"),
    (HERE + "Static", "equals a static weighted mean of the experts to 1e-16"),
    (HERE + "StaticLinear", "equals a static weighted mean + Linear to 1e-16"),
    (HERE + "BothSigns", "equals a static weighted sum of the experts to 1e-16"),
    (HERE + "Sum", "equals 4 times the mean over experts to 1e-16"),
    (HERE + "PlusConstant", "equals the mean over experts + a constant to 1e-16"),
    (HERE + "PlusInput", "equals the mean over experts + a term that depends on the token to 1e-16"),
    (HERE + "PlusPosition", "equals the mean over experts + a term that depends on the token to 1e-16"),
    (HERE + "PlusLargeInput", "is the mean over experts + a term that depends on the token (to 1e-16 at 1536 "
                              "tokens; not affine in the layer input, so others may differ)"),
    (HERE + "Gate", "is a weighted mean whose weights depend on the token (to 1e-16)"),
    (HERE + "GatePlusInput", "is a weighted mean whose weights depend on the token, "
                             "+ a term that depends on the token (to 1e-16)"),
    (HERE + "GateLinear", "is a weighted mean whose weights depend on the token, + Linear (to 1e-16)"),
    (HERE + "Switch", "is a weighted sum whose weights depend on the token (to 1e-16)"),
    (HERE + "TokenMaps", "is linear in the experts, by maps that depend on the token (effective rank 1.00)"),
    (HERE + "TinyNonlinearity", "is not linear in the experts (by 0.0006)" + MEAN_ALONE),
    (HERE + "LateKink", "is not linear in the experts (by 0.04 at inputs of size 1000)" + MEAN_ALONE),
    (HERE + "LateKinkOfOne", "is not linear in the experts (by 0.4 at inputs of size 1000)"),
    (HERE + "OrthogonalMaps", "is linear and static, but treats experts by different maps "
                              "(effective rank 2.00; off one map by 1)"),
    (HERE + "WithoutOne", "equals a static weighted mean of the experts to 1e-16; it ignores expert 1"),
    (HERE + "Deaf", "does not depend on the experts at all"),
    (HERE + "SquaredWhereLarge", "is not linear in the experts (by 1)"),
    (HERE + "OneExpertWhereLarge", "is a weighted mean whose weights depend on the token (to 1e-16)"),
    (HERE + "OneExpertInAWindow", "is the mean over experts + a term that depends on the token at most "
                                  "tokens, but not at all (off by 1 at another)"),
    (HERE + "OneSmallTanh", "is not linear in the experts (by 0.4)" + MEAN_ALONE),
    (HERE + "OneSmallExpert", "is linear and static, but treats experts by different maps "
                              "(effective rank 1.00; off one map by 0.8)"),
    (HERE + "OneSmallGate", "is linear in the experts, by maps that depend on the token "
                            "(effective rank 1.00)"),
    (HERE + "OneSmallPosition", "equals mean + Linear + a term that depends on the token to 1e-16"),
    ("tests.check.couplers:OtherGradient", "is linear in the experts, but its gradients are not those of its "
                                          "values (off by 0.5)"),
]  # fmt: skip


def without_size(verdict: str) -> str:
    """Forget digits: rounding differs between machines, and how nonlinear it is follows from the draw."""
    return re.sub(r"1e-1[456]", "1e-16", re.sub(r"by 0\.0*[1-9]|by 1\b", "by some", verdict))


@pytest.mark.parametrize(("coupler", "expected"), VERDICTS)
def test_verdicts(coupler, expected):
    assert without_size(portrait(coupler).verdict) == without_size(expected)


@pytest.mark.parametrize(("coupler", "size"), [("TinyNonlinearity", 1.0), ("LateKink", 1000.0)])
def test_nonlinearity_is_measured_at_every_scale(coupler, size):
    found = portrait(HERE + coupler).mixing.nonlinearity
    assert found[size] > 1e-4
    if coupler == "TinyNonlinearity":
        assert 1e-4 < found[1.0] < 2e-3
    else:
        assert found[1.0] < 1e-14


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    J = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    J[:, 0, 0, 0], J[0, 1, 1, 2] = 3.0, 1.0  # singular values (3, 1) and (3, 0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(J) == pytest.approx((math.exp(entropy) + 1) / 2, rel=1e-12)
    assert effective_rank(torch.zeros_like(J)) == 0


def test_weights_are_the_couplers_own():
    for weights in portrait(HERE + "Static").mixing.one_map.weights:
        assert weights == pytest.approx(WEIGHTS, rel=1e-12)
    gate = portrait(HERE + "Gate").mixing
    subject = Subject(config(HERE + "Gate"), 0, CPU)
    coupler, (_, layer_input) = subject.perturbed_coupler(), draw(subject)
    expected = coupler.gate(layer_input).softmax(-1).flatten(0, 1).detach()  # pyright: ignore
    assert torch.allclose(torch.tensor(gate.one_map.weights, dtype=torch.float64), expected, atol=1e-12)
    largest = (expected.amax(0) - expected.amin(0)).max() / expected.max()
    assert gate.token_dependence == pytest.approx(float(largest))


@pytest.mark.parametrize("coupler", ["HGNN", "GNN"])
def test_jacobians_are_the_differences_of_values(coupler):
    subject = Subject(config(coupler), 0, CPU)
    built = subject.perturbed_coupler().eval()
    x, layer_input = subject.inputs(2, 3)
    readout = Readout(built, (x, layer_input))
    assert not readout.why_output
    J = jacobians(readout, (x, layer_input))
    step = torch.zeros_like(x)
    step[:, :, 2, 5] = 1e-5
    with torch.no_grad():
        column = (readout(x + step, layer_input) - readout(x - step, layer_input)).flatten(0, 1) / 2e-5
    assert torch.allclose(J[:, 2, :, 5], column, atol=1e-8)


@pytest.mark.parametrize(
    ("coupler", "reason"),
    [
        ("NoCombiner", NOT_USED),
        ("OwnCombiner", NOT_USED),
        ("CombinesTwice", NOT_USED),
        ("AfterCombiner", NOT_LAST),
    ],
)
def test_what_does_not_end_in_the_shared_combiner_is_judged_by_its_output(coupler, reason):
    drawn = portrait(HERE + coupler)
    linear = coupler == "NoCombiner"
    assert drawn.sentence.startswith(f"its output ({reason}) {'equals the mean' if linear else 'is not lin'}")


@pytest.mark.parametrize("coupler", ["HiddenLeak", "PastMixing", "AcrossBatch", "InputLeak"])
def test_what_mixes_tokens_has_no_portrait(coupler):
    with pytest.raises(NoMixing, match="it mixes tokens"):
        portrait("tests.check.couplers:" + coupler)


def test_global_random_state_is_left_alone_and_the_seed_decides():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = draw_portrait(config("HGNN"), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw_portrait(config("HGNN"), seed=1) == first
    assert draw_portrait(config("HGNN"), seed=2) != first


def test_no_coordinate_hides_behind_a_larger_one_and_rounding_is_not_blown_up():
    size = torch.tensor([[1e12, 1.0], [-1e12, 0.5]], dtype=torch.float64)
    assert deviation(torch.tensor([[0.0, 0.25], [0.0, 0.0]]).double(), size) == 0.25
    assert deviation(torch.tensor([[0.0, 1e-3]]).double(), size) == pytest.approx(1e-15)
    assert deviation(torch.tensor([[0.0, 0.1]]).double(), size, beside=1e3 * size) == pytest.approx(1e-16)
    assert deviation(torch.zeros(1, 2), torch.zeros(1, 2)) == 0


def test_jacobians_are_measured_by_the_largest_entry_of_each_output_coordinate():
    J = torch.zeros(2, 3, 3, 3, dtype=torch.float64)
    J[1, 2, 0, 1], J[0, 1, 1, 0], J[0, 0, 2, 2] = -4e12, 2.0, 1e-3
    assert largest_entries(J).flatten().tolist() == [4e12, 2.0, 4e12]
    assert largest_entries(torch.zeros_like(J)).flatten().tolist() == [1.0] * 3


@pytest.mark.parametrize(("coupler", "reads"), [("Static", False), ("Gate", True), ("PlusLargeInput", True)])
def test_whether_it_reads_the_layer_input(coupler, reads):
    assert portrait(HERE + coupler).mixing.reads_layer_input == reads
