"""The leak check passes honest couplers, and names what is wrong with the others."""

import json

import pytest
import torch

from bench.check.leak_check import CHECKS, run_leak_check
from bench.check.subject import CheckReport
from gnnmoe.config import GNNMoEConfig
from tests.gnnmoe._support import every_coupler

HERE = "tests.check.couplers:"
SHORT = {"embed_dim": 16, "max_seq_length": 12}


def checked(coupler: str, **fields) -> CheckReport:
    return run_leak_check(GNNMoEConfig(coupler_type=coupler, **{**SHORT, **fields}))


def failures(report: CheckReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.failures}


@every_coupler
def test_every_coupler_of_the_project_passes(fields):
    fields = dict(fields)
    report = checked(fields.pop("coupler_type", "HGNN"), embed_dim=8, max_seq_length=4, **fields)
    assert not failures(report)
    assert report.passed
    assert [check.name for check in report.checks] == list(CHECKS)


@pytest.mark.parametrize("options", [{"backend": "pyg"}, {"activation": "none", "residual": False}])
def test_options_and_formulas_of_the_coupler_are_the_ones_checked(options):
    assert not failures(checked("HGNN", hgnn_conv_type="PyGHypergraphConv", coupler_options=options))
    (detail,) = set(failures(checked("HGNN", coupler_options={"backend": "no such"})).values())
    assert detail.startswith("it raised Refused: unknown backend")


@pytest.mark.parametrize(
    ("coupler", "num_experts"),
    [("mean", 1), ("GNN", 2), ("HGNN", 1), ("HGNN", 2), ("HGNN", 10),
     ("examples.leaking_coupler:LeakingCoupler", 3)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:HGNN")
def test_few_and_many_experts(coupler, num_experts):
    """The wrong batching of the example leaks nothing at three experts."""
    report = checked(coupler, num_experts=num_experts, embed_dim=8)
    assert not failures(report)
    (gradients,) = [check.detail for check in report.checks if check.name == "gradients"]
    assert ("hyperedge_weights is inert" in gradients) == (coupler == "HGNN" and num_experts == 2)


@pytest.mark.parametrize("length", [1, 3, 17])
def test_any_length(length):
    assert not failures(checked("mean", max_seq_length=length))
    assert "token_isolation" in failures(checked(HERE + "AcrossBatch", max_seq_length=length))


def test_noise_and_own_dropout_are_no_leak():
    assert not failures(checked(HERE + "NoisyInTraining"))


def test_leak_of_wrong_batching_is_caught():
    found = failures(checked("examples.leaking_coupler:LeakingCoupler", num_experts=4))
    assert "sees the expert outputs of token" in found["token_isolation"]
    assert "(its future)" in found["token_isolation"]
    assert "when tokens from" in found["causality"]
    assert {"batch_isolation", "reference"} <= set(found)


WRONG = [
    ("HiddenLeak", "token_isolation", "sees the expert outputs of token 1 of sequence 0 (its future)"),
    ("HiddenLeak", "causality", "the logits at position 0 move when tokens from 1 on change"),
    ("BatchNorm", "token_isolation", "(in train mode only)"),
    ("BatchNorm", "batch_isolation", "in train mode"),
    ("BatchNorm", "no_memory", "other inputs in train mode changed it"),
    ("BatchNorm", "causality", "in train mode"),
    ("PastMixing", "token_isolation", "causal but not token-isolated: it mixes a token's own past; refused"),
    ("InputLeak", "token_isolation", "sees the layer input of token 11 of sequence 0 (its future)"),
    ("AcrossBatch", "token_isolation", "sees the expert outputs of token 0 of sequence 1 (another sequence)"),
    ("AcrossBatch", "batch_isolation", "a sequence alone gives another result than in the batch"),
    ("GradientLeak", "token_isolation", "token 0 of sequence 0 sees the expert outputs of token 1"),
    ("DetachedLeak", "token_isolation", "(its future)"),
    ("ExpertChoice", "token_isolation", "(its future)"),
    ("Memory", "token_isolation", "the same input gives different outputs in train mode"),
    ("Memory", "no_memory", "the output depends on earlier calls"),
    ("OtherReference", "reference", "forward and reference() differ in the output by 1.0e-06"),
    ("OtherGradient", "reference", "forward and reference() differ in the gradient of expert outputs"),
    ("Dead", "gradients", "no gradient reaches unread after 2 steps"),
    ("NotANumberInBf16", "bf16", "not finite"),
    ("Raising", "token_isolation", "it raised KeyError: 'no such expert'"),
    ("WrongShape", "token_isolation", "the output is (2, 12, 4, 16); it must be (B, L, D) = (2, 12, 16)"),
]  # fmt: skip


@pytest.mark.parametrize(("coupler", "check", "text"), WRONG)
def test_wrong_couplers_are_caught(coupler, check, text):
    assert text in failures(checked(HERE + coupler))[check]


@pytest.mark.parametrize("coupler", ["OtherReference", "OtherGradient", "Dead", "NotANumberInBf16"])
def test_only_the_wrong_thing_is_named(coupler):
    assert len(failures(checked(HERE + coupler))) == 1


def test_raising_coupler_fails_everything_and_crashes_nothing():
    assert set(failures(checked(HERE + "Raising"))) == set(CHECKS)


def test_declared_parameters():
    dead, alive = (checked(HERE + name).checks for name in ("DeclaredDead", "DeclaredAlive"))
    (detail,) = [check.detail for check in dead if check.name == "gradients" and check.passed]
    assert "unread is inert: kept for old checkpoints" in detail
    (detail,) = [check.detail for check in alive if check.name == "gradients" and check.passed]
    assert "declared inert, yet it is not: combiner.0.weight" in detail


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad():
        checked(HERE + "NoisyInTraining")
    assert torch.equal(torch.get_rng_state(), before)


def test_record_is_json():
    record = json.loads(json.dumps(checked(HERE + "PastMixing").to_record()))
    assert record["passed"] is False
    assert list(record["checks"]) == list(CHECKS)
    assert set(record["checks"]["causality"]) == {"passed", "detail", "seconds"}
    assert record["checks"]["causality"]["passed"] is True


def test_running_out_of_memory_is_no_verdict_on_the_coupler(monkeypatch):
    """A sweep records it as oom: the machine was too small, and nothing is known of the coupler."""

    def greedy(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    monkeypatch.setitem(CHECKS, "token_isolation", greedy)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run_leak_check(GNNMoEConfig(coupler_type="mean", embed_dim=8, max_seq_length=8))
