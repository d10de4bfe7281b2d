"""Budgets: what a user may write, what it comes to, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch

from bench.config import TrainingConfig
from bench.device import format_bytes, host_memory_bytes
from bench.measure.memory import tracked_peaks
from bench.training.step import make_optimizer, training_step
from bench.tune import find
from bench.tune.find import MemoryBudget, training_state_bytes
from gnnmoe import GNNMoEConfig, GNNMoEModel

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1GiB", 2**30), ("512MiB", 512 * 2**20), ("2.5GB", 2_500_000_000), ("1 kb", 1000),
        ("  7 B ", 7), (".5KiB", 512), ("3.TB", 3 * 10**12), ("1tib", 2**40), ("2MB", 2_000_000),
        ("0.1GB", 100_000_000),
    ],
)  # fmt: skip
def test_an_amount_is_read_to_the_byte(text, expected):
    budget = MemoryBudget.parse(text)
    assert (budget.explicit_bytes, budget.text) == (expected, text)


@pytest.mark.parametrize(("text", "share"), [("device", 1.0), ("Device", 1.0), ("0.5", 0.5), ("1", 1.0)])
def test_a_share_is_one_of_the_device(text, share, monkeypatch):
    monkeypatch.setattr(find, "device_memory_bytes", lambda device: 1001)
    budget = MemoryBudget.parse(text)
    assert budget.explicit_bytes is None
    assert budget.resolve(CPU) == int(1001 * share)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, "no amount of memory") for text in ("", "plenty", "-1GiB", "1,5GiB", "85%", "nan", "16Gb2")),
        ("16", "has no unit and is no share in (0, 1]"), ("0", "has no unit and is no share in (0, 1]"),
        ("1.01", "has no unit and is no share"),
        ("16GiBi", "unknown unit 'GiBi'; allowed: B, GB, GiB, KiB, MB, MiB, TB, TiB, kB. Did you mean 'GiB'"),
        ("16G", "unknown unit 'G'"), ("0GiB", "less than a byte"), ("0.5B", "less than a byte"),
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused_with_what_is(text, said):
    with pytest.raises(ValueError, match="memory budget") as refused:
        MemoryBudget.parse(text)
    assert said in str(refused.value)
    if "unknown unit" not in said:
        assert "16GiB, 512MiB, 2.5GB" in str(refused.value)


def test_a_budget_larger_than_the_device_is_refused(monkeypatch):
    monkeypatch.setattr(find, "device_memory_bytes", lambda device: 8 * 2**30)
    assert MemoryBudget.parse("8GiB").resolve(CPU) == 8 * 2**30
    with pytest.raises(ValueError, match=r"16GiB is more than the 8\.0 GiB of device cpu; lower it"):
        MemoryBudget.parse("16GiB").resolve(CPU)


def test_the_whole_device_of_a_cpu_is_the_host():
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = MemoryBudget.parse("device").resolve(CPU)
    assert 2**28 < found == host_memory_bytes() <= physical + 2**20


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "3000000"}, 3_000_000),
        ("0::/job\n", {"job/memory.max": "4000000", "memory.max": "5000000"}, 4_000_000),
        ("0::/not/mounted/here\n", {"memory.max": "6000000"}, 6_000_000),  # as a container sees it
        ("3:cpu:/a\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "7000000"}, 7_000_000),
        ("3:cpu:/a\n", {"a/memory.max": "1"}, None),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": str(2**63 - 4096)}, None),
    ],
)
def test_a_control_group_limits_the_host(membership, limits, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.device.OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr("bench.device.GROUPS", tmp_path / "cgroup")
    physical = host_memory_bytes()
    (tmp_path / "own").write_text(membership)
    for name, limit in limits.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
    found = host_memory_bytes()
    assert found == (physical if expected is None else expected)


def test_the_state_of_a_training_is_what_the_tracker_sees():
    """Parameters, buffers, gradients and AdamW's state, to the byte; also of a model without memory."""
    config = GNNMoEConfig(embed_dim=8, num_layers=1, max_seq_length=8, vocab_size=50)
    model = GNNMoEModel(config, seed=0)
    optimizer = make_optimizer(model, TrainingConfig())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    training_step(model, {"input_ids": ids, "targets": ids}, optimizer, 1.0)
    held, _ = tracked_peaks(lambda: None, (model, optimizer))
    assert training_state_bytes(model) == held
    with torch.device("meta"):
        assert training_state_bytes(GNNMoEModel(config, seed=0)) == held


def test_frozen_parameters_have_no_gradient_and_no_moments():
    model = torch.nn.Linear(10, 10, bias=False).requires_grad_(False)
    assert training_state_bytes(model) == 400
    assert training_state_bytes(model.requires_grad_(True)) == 4 * 400 + 4


def test_bytes_for_people():
    assert [format_bytes(n) for n in (812, 1536, 160 * 2**20, 5000 * 2**30)] == [
        "812 B", "1.5 KiB", "160.0 MiB", "5,000.0 GiB",
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_whole_device_of_a_gpu():
    total = torch.cuda.get_device_properties(0).total_memory
    assert MemoryBudget.parse("device").resolve(torch.device("cuda", 0)) == pytest.approx(total, rel=0.01)
    assert MemoryBudget.parse("0.5").resolve(torch.device("cuda", 0)) == pytest.approx(total / 2, rel=0.01)
