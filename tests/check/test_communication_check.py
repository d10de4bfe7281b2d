"""What a coupler says of itself is checked before a run, and the clause that it breaks is named."""

import re

import pytest
import torch

from bench.check.communication import communication
from bench.check.leak_check import CHECKS, run_leak_check
from bench.check.subject import Subject
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.registry import coupler_names
from tests.check.telling_couplers import WRONG

HERE = "tests.check.telling_couplers:"


def subject(coupler: str, num_experts: int = 4, length: int = 12, **fields) -> Subject:
    small = {"embed_dim": 8, "max_seq_length": length, "num_experts": num_experts}
    return Subject(GNNMoEConfig(coupler_type=coupler, **{**small, **fields}), 0, torch.device("cpu"))


@pytest.mark.parametrize(("coupler", "text"), [(name, said) for name, (_, said) in WRONG.items()])
def test_each_clause_is_named(coupler, text):
    with pytest.raises(Exception, match=re.escape(text)) as caught:
        communication(subject(HERE + coupler))
    assert type(caught.value).__name__ == "CheckFailed"


@pytest.mark.parametrize("coupler", ["Unnamed", "Attached", "FloatFlops", "InertNobody"])
def test_nothing_else_fails_and_the_record_names_the_check(coupler):
    report = run_leak_check(GNNMoEConfig(coupler_type=HERE + coupler, embed_dim=16, max_seq_length=12))
    assert [check.name for check in report.failures] == ["communication"]
    assert list(report.to_record()["checks"]) == list(CHECKS)


@pytest.mark.parametrize("length", [1, 12])
def test_one_of_each_passes_and_is_listed(length):
    told = communication(subject(HERE + "Honest", length=length))
    assert told == "mixing, pairs, scale, rows: finite, detached, of one shape for any number of tokens"


@pytest.mark.parametrize("coupler", ["mean", "tests.check.portrait_couplers:NeedsWidth"])
def test_it_is_looked_at_narrow_where_it_can_be(coupler, monkeypatch):
    widths = []
    monkeypatch.setattr(
        "bench.check.communication._flops", lambda coupler: widths.append(coupler.config.embed_dim)
    )
    communication(subject(coupler, embed_dim=36, num_heads=3))
    assert widths == [18 if coupler == "mean" else 36]


def test_out_of_memory_is_no_failure_of_the_coupler(monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("gnnmoe.couplers.mean.MeanCoupler.member_names", full)
    with pytest.raises(torch.OutOfMemoryError):
        communication(subject("mean"))


@pytest.mark.parametrize("coupler", coupler_names())
@pytest.mark.filterwarnings("ignore:(HGNN|topk)")
def test_couplers_of_the_project_pass_with_few_experts(coupler):
    """With four they do in test_leak_check.py."""
    for num_experts in (1, 2):
        assert "mixing" in communication(subject(coupler, num_experts))


def test_a_hypergraph_layer_passes_with_arguments_of_its_strategy():
    ring = subject("HGNN", 5, hgnn_conv_type="HypergraphAttention", static_hyperedge_strategy="ring:k=3")
    assert "hyperedge_weights" in communication(ring)
