"""The bounds that couplers are held against: bytes and FLOPs counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.measure.timing import TRAINING
from bench.speed.floors import Rates, floor_bytes, roofline, roofline_seconds
from gnnmoe import GNNMoEConfig
from gnnmoe.couplers.registry import build_coupler

SLOW_MEMORY, SLOW_ARITHMETIC = Rates(1e30, 1.0), Rates(1.0, 1e30)


def config(coupler: str, **changes) -> GNNMoEConfig:
    return replace(GNNMoEConfig(coupler_type=coupler, embed_dim=64), **changes)


HNHN = config("HGNN", hgnn_conv_type="HNHN")
LINEAR = config("HGNN", coupler_options={"activation": "none", "residual": "false"})


def test_the_floor_of_the_specification():
    """Speed: E 4, D 256, N 131,072 in bf16: 939 MB forward and backward."""
    assert floor_bytes(131_072, 4, 256, 2) == 939_524_096


def test_the_slower_of_bytes_and_flops_decides():
    assert Rates(10.0, 2.0).seconds(100, 10) == 10.0
    assert Rates(10.0, 2.0).seconds(100, 30) == 15.0


@pytest.mark.parametrize(
    ("coupler", "layers", "inner", "outer"),
    [
        # rows of E and rows of one: the sum over experts, then the combiner's 9
        (config("static"), 1, 3, 2),
        (config("gate"), 1, 3, 5),
        (LINEAR, 1, 3, 2 + 6),
        (LINEAR, 3, 3, 2 + 18),
        # a layer's products; its output and output gradient are one row in the last layer
        (config("HGNN"), 1, 6, 3),
        (config("HGNN"), 2, 6 + 9, 3),
        (HNHN, 1, 14, 4),
        (HNHN, 3, 14 + 2 * 18, 4),
        (config("GNN"), 1, 7, 3),
        (config("GNN"), 2, 7 + 10, 3),
    ],
)
@pytest.mark.parametrize("experts", [4, 16])
def test_the_rows_that_the_roofline_moves(coupler, layers, inner, outer, experts):
    sized = replace(coupler, gnn_layers=layers, num_experts=experts)
    expected = (inner * experts + outer + 9) * 1000 * 64 * 2  # 1,000 tokens of width 64 in two bytes
    assert roofline_seconds(sized, 1000, 2, SLOW_MEMORY) == pytest.approx(expected)


@pytest.mark.parametrize("coupler", [config("static"), config("gate"), config("HGNN"), HNHN, config("GNN")])
def test_the_roofline_has_the_flops_of_the_coupler_three_times(coupler):
    """The small ones apart: P is E × E, and what a gate or a score costs is left to the sums."""
    wanted = TRAINING * build_coupler(coupler).flops(1000)  # pyright: ignore[reportOperatorIssue]
    assert roofline_seconds(coupler, 1000, 2, SLOW_ARITHMETIC) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("coupler", [config("static"), config("gate"), config("HGNN"), HNHN, config("GNN"),
                                     LINEAR])  # fmt: skip
@pytest.mark.parametrize("experts", [2, 8, 64])
def test_no_roofline_is_below_the_floor(coupler, experts):
    sized = replace(coupler, num_experts=experts)
    floor = SLOW_MEMORY.seconds(0, floor_bytes(1000, experts, 64, 2))
    assert roofline_seconds(sized, 1000, 2, SLOW_MEMORY) >= floor  # pyright: ignore[reportOptionalOperand]


@pytest.mark.parametrize("coupler", [config("mean"), config("HGNN", hgnn_conv_type="EDHNN"),
                                     config("HGNN", coupler_options={"residual": "false"}),
                                     config("HGNN", num_experts=1)])  # fmt: skip
def test_what_has_no_roofline_says_so(coupler):
    assert roofline(coupler, 1000) is None
    assert roofline_seconds(coupler, 1000, 2, SLOW_MEMORY) is None
