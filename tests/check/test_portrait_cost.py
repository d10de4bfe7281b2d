"""What the portrait says that known couplers cost."""

import pytest

from bench.check.leak_check import run_leak_check
from tests.check.test_portrait import HERE, config, portrait


def test_a_coupler_without_parameters_passes_the_leak_check_and_costs_nothing():
    report = run_leak_check(config(HERE + "NoCombiner"))
    assert not [check.name for check in report.failures if check.name in ("gradients", "no_memory")]
    cost = portrait(HERE + "NoCombiner").cost
    assert (cost.parameters, cost.dead_parameters) == (0, {})


def test_costs_are_those_of_the_real_width_although_mixing_is_looked_at_in_a_narrow_copy():
    drawn = portrait("mean", embed_dim=64)
    assert drawn.cost.parameters == 64 * 64 + 64 + 2 * 64
    assert drawn.cost.flops_per_token == 2 * 64 * 64
    assert drawn.mixing.width == 16
    assert portrait("mean", embed_dim=48, num_heads=12).mixing.width == 24
    assert portrait(HERE + "NeedsWidth", embed_dim=32).mixing.width == 32


@pytest.mark.parametrize(
    ("coupler", "counted", "mismatch"),
    [
        ("mean", False, ""),
        (HERE + "NoFlops", True, ""),
        (HERE + "WrongFlops", False, "it returns 6 for 6 tokens; PyTorch counts 768"),
    ],
)
def test_flops_formula_is_compared_with_the_counter(coupler, counted, mismatch):
    cost = portrait(coupler).cost
    assert (cost.flops_counted, cost.flops_mismatch) == (counted, mismatch)
    assert cost.flops_per_token == (1 if mismatch else 2 * 8 * 8)


@pytest.mark.parametrize(
    ("coupler", "dead"),
    [
        ("mean", {}),
        ("tests.check.couplers:Dead", {"unread": "not declared in inert_parameters()"}),
        ("tests.check.couplers:DeclaredDead", {"unread": "kept for old checkpoints"}),
    ],
)
def test_dead_parameters_are_named_with_the_reason(coupler, dead):
    assert portrait(coupler).cost.dead_parameters == dead


@pytest.mark.slow
def test_flops_of_another_backend_are_those_of_the_default():
    loop = portrait("HGNN", num_experts=3, coupler_options={"backend": "loop"}).cost
    assert loop == portrait("HGNN", num_experts=3).cost
    assert not loop.flops_mismatch
