"""Golden losses: five training steps of each coupler in float64, so that a refactor may not move them.

``python -m tests.bench.test_golden`` writes the entries that are missing and leaves the others. Where
a number is meant to move, delete its entry first, and say in the commit why it moves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.config import TrainingConfig
from bench.training.step import make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel, coupler_names
from gnnmoe.layers.base import LAYERS

GOLDEN = Path(__file__).with_name("golden.json")
COMMAND = "python -m tests.bench.test_golden"
STEPS, RELATIVE = 5, 1e-12
VOCABULARY, BATCH, LENGTH = 40, 4, 8


def cases() -> dict[str, dict[str, Any]]:
    """Return the config of each case: every coupler discovered, HGNN in all of its forms."""
    found: dict[str, dict[str, Any]] = {
        name: {"coupler_type": name} for name in coupler_names() if name != "HGNN"
    }
    forms = {(conv, strategy) for conv in LAYERS for strategy in ("all_pairs", "all_triplets", "all")}
    others = {("HypergraphConv", name) for name in ("pairs_and_triplets", "ring", "random:k=2,m=4")}
    for conv, strategy in sorted(forms | others):
        found[f"HGNN {conv} {strategy}"] = {
            "coupler_type": "HGNN", "hgnn_conv_type": conv, "static_hyperedge_strategy": strategy,
        }  # fmt: skip
    return found


def losses(**fields: Any) -> list[float]:
    """Return the nll of each of five steps on the CPU, on one made-up batch.

    Drawn in float64 too: float32 draws differ in the last digit between processors.
    """
    shape = {"embed_dim": 8, "num_heads": 2, "num_layers": 2, "max_seq_length": LENGTH}
    config = GNNMoEConfig(vocab_size=VOCABULARY, **{**shape, **fields})
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        model = GNNMoEModel(config, seed=0).double()
    finally:
        torch.set_default_dtype(before)
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=1e-2))
    tokens = (torch.arange(BATCH * (LENGTH + 1)) ** 2 * 7).view(BATCH, -1) % VOCABULARY
    batch = {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    return [float(training_step(model, batch, optimizer, max_grad_norm=1.0)[0]) for _ in range(STEPS)]


def check(name: str, found: list[float], golden: dict[str, list[float]]) -> None:
    """Fail where ``name`` has no golden losses, or others."""
    if name not in golden:
        pytest.fail(f"{name} has no golden losses; write them with: {COMMAND}")
    assert found == pytest.approx(golden[name], rel=RELATIVE, abs=0), f"the losses of {name} have moved"


@pytest.fixture(scope="module")
def golden() -> dict[str, list[float]]:
    return json.loads(GOLDEN.read_text())


def quick(name: str) -> bool:
    """Say whether a case is the one of its coupler or layer, or one of a strategy with the plain layer."""
    _, *form = name.split(" ")
    return not form or form[0] == "HypergraphConv" or form[1] == "all_pairs"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (not quick(name))) for name in cases()]
)
def test_five_steps_give_the_golden_losses(name, golden):
    check(name, losses(**cases()[name]), golden)


def test_the_golden_losses_tell_the_cases_apart_and_are_those_of_a_model_that_learns(golden):
    assert set(golden) <= set(cases()), "none are left of what is gone"
    assert len({tuple(values) for values in golden.values()}) == len(golden)
    for values in golden.values():
        assert len(values) == STEPS
        assert values[-1] < values[0]


def test_missing_losses_fail_with_the_command_that_writes_them_and_moved_losses_fail(golden):
    with pytest.raises(pytest.fail.Exception, match=f"new has no golden losses.*{COMMAND}"):
        check("new", [], golden)
    moved = [*golden["mean"][:-1], golden["mean"][-1] * (1 + 1e-9)]
    with pytest.raises(AssertionError, match="losses of mean have moved"):
        check("mean", moved, golden)


def write_missing() -> None:
    """Add what golden.json lacks; what it holds stays."""
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    missing = {name: losses(**fields) for name, fields in cases().items() if name not in known}
    rows = [
        f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted({**known, **missing}.items())
    ]
    GOLDEN.write_text("{\n  " + ",\n  ".join(rows) + "\n}\n")
    print(f"{GOLDEN}: added {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    write_missing()
