"""What the portrait says of couplers that differ at few tokens, or in one small coordinate."""

import pytest
import torch

from bench.check.mixing import deviation, largest_entries
from bench.check.portrait import MEAN_ALONE
from tests.check.test_portrait import portrait, without_size

HERE = "tests.check.hiding_couplers:"
VERDICTS = [
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
]  # fmt: skip


@pytest.mark.parametrize(("coupler", "expected"), VERDICTS)
def test_verdicts(coupler, expected):
    assert without_size(portrait(coupler).verdict) == without_size(expected)


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
