"""Memory by part and by phase: what the peak of a step is made of, and how it grows from the start."""

from __future__ import annotations

import pytest
import torch

from bench.config import TrainingConfig
from bench.measure.memory import (
    CudaMeter,
    GradientsAtPeak,
    TrackedMeter,
    built_bytes,
    by_part,
    held_bytes,
    meter_for,
)
from bench.record import is_measured
from bench.training.step import make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def made(device: torch.device, rows: int = 2, **fields):
    config = GNNMoEConfig(embed_dim=16, num_layers=1, max_seq_length=16, vocab_size=300, **fields)
    model = GNNMoEModel(config, seed=0).to(device)
    optimizer = make_optimizer(model, TrainingConfig())
    ids = torch.zeros(rows, 16, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "targets": ids.clone()}

    def step() -> None:
        training_step(model, batch, optimizer, 1.0)

    parameters, buffers = (sum(t.nbytes for t in of()) for of in (model.parameters, model.buffers))
    return step, (model, optimizer, [batch]), parameters, buffers


def test_held_bytes_count_a_storage_once_in_blocks_of_512():
    first, second = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(8, 16, bias=False)
    second.weight = first.weight  # 512 bytes, shared
    model = torch.nn.Sequential(first, second)
    model.register_buffer("counts", torch.zeros(129))  # 516 bytes
    optimizer = torch.optim.Adam(list(model.parameters()))
    batch = [{"input_ids": torch.zeros(1, dtype=torch.int64)}]
    assert held_bytes((model, optimizer, batch)) == {
        "parameter": 512, "buffer": 1024, "optstate": 0, "other": 512,
    }  # fmt: skip
    parts = {"parameter": 5, "buffer": 2, "gradient": 3, "optstate": 10, "activation": 20, "temp": 4}
    assert by_part(parts) == {"model": 7, "gradients": 3, "optimizer": 10, "activations": 24}
    first.weight.grad = torch.zeros_like(first.weight)
    optimizer.step()
    assert held_bytes((optimizer,))["optstate"] == 3 * 512  # two moments and a step counter
    assert held_bytes((model, optimizer, batch), block=1) == {
        "parameter": 512, "buffer": 516, "optstate": 2 * 512 + 4, "other": 8,
    }  # fmt: skip


def test_model_and_optimizer_are_as_large_as_they_are_and_activations_grow_with_the_batch():
    found = []
    for rows in (2, 8):
        step, owners, parameters, buffers = made(CPU, rows)
        step()
        memory = meter_for(CPU).measure(step, owners).model_dump(mode="json")
        assert memory["by_part"]["model"] == parameters + buffers
        assert memory["by_part"]["optimizer"] == pytest.approx(2 * parameters, abs=1000)
        found.append(memory["by_part"]["activations"])
    assert found[1] > 2 * found[0]


def test_before_the_first_step_there_are_parameters_and_batches_only():
    step, owners, parameters, buffers = made(CPU)
    assert built_bytes(owners, CPU) == parameters + buffers + 2 * 2 * 16 * 8
    first = meter_for(CPU).measure(step, owners).model_dump()["peak_allocated_bytes"]
    steady = meter_for(CPU).measure(step, owners).model_dump()["peak_allocated_bytes"]
    assert built_bytes(owners, CPU) == pytest.approx(3 * parameters, rel=0.05)  # between steps, Adam's too
    assert 3 * parameters < first <= steady


def test_the_gradients_at_the_peak_are_those_handed_over_before_it(monkeypatch):
    """A made-up allocator: the peak is reached after the first of two gradients, or after both."""
    for peaks, expected in (([10, 10, 10], 0), ([10, 20, 20], 512), ([10, 20, 30], 1536)):
        layers = torch.nn.ParameterList([torch.zeros(128), torch.zeros(256)])  # 512 and 1024 bytes
        answers = iter(peaks)
        monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda _, answers=answers: next(answers))
        with GradientsAtPeak((layers,), CUDA) as watch:
            layers[0].sum().backward()
            layers[1].sum().backward()
        assert watch.at_peak_bytes == expected


def test_pieces_of_a_batch_add_to_the_same_gradients_and_no_hook_stays(monkeypatch):
    peak = iter(range(1, 9))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda _: next(peak))
    layer = torch.nn.Linear(16, 16, bias=False)
    with GradientsAtPeak((layer,), CUDA) as watch:
        for _ in range(3):
            layer(torch.ones(1, 16)).sum().backward()
    assert (watch.at_peak_bytes, next(peak)) == (1024, 5)  # three hooks and the end
    layer(torch.ones(1, 16)).sum().backward()
    assert next(peak) == 6


@pytest.mark.gpu
@needs_gpu
def test_gpu_the_parts_are_those_of_the_tracker():
    """The allocator's peak, split by its own account, against the tracker's on the same step."""
    for fields in ({"ffn_dim": 40_000}, {"num_experts": 8}):
        step, owners, *_ = made(CUDA, rows=16, **fields)
        step()
        ours = CudaMeter(CUDA).measure(step, owners).by_part
        theirs = TrackedMeter(CUDA).measure(step, owners).by_part
        assert is_measured(ours)
        assert is_measured(theirs)
        total = sum(theirs.values())
        for name in ("model", "gradients", "optimizer", "activations"):
            assert ours[name] == pytest.approx(theirs[name], abs=0.1 * total), name
