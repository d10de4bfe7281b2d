"""Meters (E2): what each reads; and the prediction, which must equal the reading (D4)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench.config import TrainingConfig
from bench.device import host_memory_bytes, is_out_of_memory
from bench.measure import memory as memory_module
from bench.measure.memory import (
    CannotPredict,
    CudaMeter,
    meter_for,
    nvml_used_bytes,
    predict_peak,
    process_peak_bytes,
)
from bench.record import Memory, NotMeasured, not_measured
from bench.training.step import Batch, make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.couplers.mean import MeanCoupler

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TRAINING = TrainingConfig()
NULL = not_measured("for the test")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def small(coupler: str = "mean", **fields) -> GNNMoEConfig:
    values: dict[str, Any] = {"coupler_type": coupler}
    values |= {"embed_dim": 16, "num_layers": 1, "num_experts": 3, "max_seq_length": 24, "vocab_size": 300}
    return GNNMoEConfig(**values | fields)


def reading(config: GNNMoEConfig, batch_size: int, length: int, micro=None, device=CPU) -> Memory:
    """Measure the second of two real steps: the first makes the optimizer's state."""
    model = GNNMoEModel(config, seed=0).to(device)
    optimizer = make_optimizer(model, TRAINING)
    ids = torch.randint(config.vocab_size, (batch_size, length), device=device)
    batch: Batch = {"input_ids": ids, "targets": ids.clone()}

    def step() -> None:
        training_step(model, batch, optimizer, 1.0, micro)

    step()
    return meter_for(torch.device(device)).measure(step, (model, optimizer, [batch]))


# --- the prediction --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coupler", "rows", "length"),
    [("gate", 2, 8), ("GNN", 2, 8), ("HGNN", 5, 24), ("topk", 3, 24)],
)
def test_d4_the_predicted_peak_is_the_measured_one(coupler, rows, length):
    """D4: to the byte, on the CPU, where 10 % are allowed."""
    measured = reading(small(coupler), rows, length).judged_bytes
    assert predict_peak(small(coupler), rows, length, TRAINING) == measured


@pytest.mark.parametrize(
    ("fields", "micro"),
    [
        ({"dropout_rate": 0.1}, 3), ({"vocab_size": 40_000, "embed_dim": 4}, None),
        ({"coupler_type": "HGNN", "hgnn_conv_type": "PyGHypergraphConv", "gnn_layers": 1,
          "coupler_options": {"backend": "pyg"}}, None),
    ],
    ids=["pieces of 3 and 1, dropout", "chunks of logits", "PyG's own"],
)  # fmt: skip
def test_d4_the_prediction_in_pieces_with_dropout_and_through_pyg(fields, micro):
    config = small(**fields)
    predicted = predict_peak(config, 4, 12, TRAINING, micro_batch_size=micro)
    assert predicted == reading(config, 4, 12, micro).judged_bytes


def test_d4_a_large_batch_lies_on_the_line_through_two_smaller_ones(monkeypatch):
    """D4: within 1 % of the step done in full, here and in general where both have full chunks."""
    config = small(embed_dim=8)
    exact = predict_peak(config, 96, 24, TRAINING, micro_batch_size=32)
    monkeypatch.setattr(memory_module, "EXACT_TOKENS", 1200)
    assert predict_peak(config, 96, 24, TRAINING, micro_batch_size=32) == pytest.approx(exact, rel=0.01)


@pytest.mark.slow
def test_a_prediction_takes_no_memory_and_draws_no_random_number():
    """A step that the machine could never run is predicted in seconds, and leaves no trace."""
    config = small(embed_dim=2048, max_seq_length=512, dropout_rate=0.1)
    before, random_state = process_peak_bytes(), torch.get_rng_state()
    assert predict_peak(config, 4096, 512, TRAINING) > 2 * host_memory_bytes()
    after = process_peak_bytes()
    assert isinstance(before, int)
    assert isinstance(after, int)
    assert after - before < 2**27
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_sequence_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="length 25; max_seq_length is 24"):
        predict_peak(small(), 1, 25, TRAINING)


def test_a_coupler_that_reads_its_numbers_cannot_be_predicted(monkeypatch):
    forward = MeanCoupler.forward

    def reads(self, expert_outputs, layer_input=None):
        expert_outputs.sum().item()
        return forward(self, expert_outputs, layer_input)

    monkeypatch.setattr(MeanCoupler, "forward", reads)
    with pytest.raises(CannotPredict, match="coupler mean cannot be predicted, since it reads") as error:
        predict_peak(small(), 1, 8, TRAINING)
    assert not is_out_of_memory(error.value)


# --- the meters ------------------------------------------------------------------------------------


def test_e2_the_record_has_every_quantity_and_the_meter():
    """E2: allocated, reserved, device-used and the meter; what was not measured is null with a reason."""
    layer = torch.nn.Linear(4, 4)
    record = meter_for(CPU).measure(lambda: layer(torch.zeros(2, 4)).sum().backward(), (layer,))
    record = record.model_dump(mode="json")
    assert record["meter"] == "tracked_tensors"
    assert {"peak_allocated_bytes", "peak_reserved_bytes", "peak_active_bytes", "allocator_retries",
            "device_used_bytes", "nvml_used_bytes", "peak_by_part_bytes", "process_peak_bytes",
            "meter", "by_part", "by_phase", "rank", "remark"} == set(record)  # fmt: skip
    for name in ("peak_reserved_bytes", "allocator_retries", "device_used_bytes", "nvml_used_bytes"):
        assert record[name]["value"] is None
        assert len(record[name]["reason"]) > 10
    assert record["peak_allocated_bytes"] == sum(record["peak_by_part_bytes"].values())
    assert record["peak_allocated_bytes"] == sum(record["by_part"].values())
    assert set(record["by_part"]) == {"model", "gradients", "optimizer", "activations"}
    json.dumps(record)


def test_a_system_without_proc_says_so(monkeypatch):
    peak = process_peak_bytes()
    assert isinstance(peak, int)
    assert peak > 2**26
    monkeypatch.setattr("bench.measure.memory.Path.exists", lambda _: False)
    found = process_peak_bytes()
    assert isinstance(found, NotMeasured)
    assert "no /proc" in found.reason


def fields(**known) -> Memory:
    names = ("peak_allocated_bytes peak_reserved_bytes peak_active_bytes allocator_retries device_used_bytes "
             "nvml_used_bytes peak_by_part_bytes process_peak_bytes by_part by_phase").split()  # fmt: skip
    values: dict[str, Any] = dict.fromkeys(names, NULL) | known
    return Memory(meter="made up", **values)


def test_what_fits_is_judged_by_reserved_then_allocated_then_the_process():
    assert fields(peak_reserved_bytes=3, peak_allocated_bytes=2, process_peak_bytes=9).judged_bytes == 3
    assert fields(peak_allocated_bytes=2, process_peak_bytes=9).judged_bytes == 2
    assert fields(process_peak_bytes=9).judged_bytes == 9
    with pytest.raises(ValueError, match="made up read no peak"):
        _ = fields().judged_bytes


class FakeCuda:
    """What ``CudaMeter`` calls of ``torch.cuda``, in the order of its calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.retries = 5  # from before
        answers = {
            "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
            "max_memory_allocated": 4096, "max_memory_reserved": 8192, "mem_get_info": (100, 1000),
            "device_memory_used": 950,
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(f"torch.cuda.{name}", self._call(name, answer))
        patch.setattr("torch.cuda.memory_stats", self.memory_stats)

    def _call(self, name, answer):
        return lambda *_: (self.calls.append(name), answer)[1]

    def memory_stats(self, device):
        return {"num_alloc_retries": self.retries, "active_bytes.all.peak": 5000}


def test_e2_the_cuda_meter_resets_waits_and_takes_the_retries_of_this_step(monkeypatch):
    """E2 with a made-up ``torch.cuda``: reset → wait → step → wait → read."""
    cuda = FakeCuda(monkeypatch)

    def step():
        cuda.calls.append("step")
        cuda.retries += 2

    layer = torch.nn.Linear(16, 16, bias=False)
    read = CudaMeter(CUDA).measure(step, (layer,))
    assert isinstance(meter_for(CUDA), CudaMeter)
    assert cuda.calls[:5] == ["synchronize", "empty_cache", "reset_peak_memory_stats", "step", "synchronize"]
    assert read.peak_by_part_bytes == {
        "parameter": 1024, "buffer": 0, "optstate": 0, "other": 0, "gradient": 0, "rest": 3072,
    }  # fmt: skip
    assert (read.meter, read.peak_allocated_bytes, read.peak_reserved_bytes, read.peak_active_bytes,
            read.allocator_retries, read.device_used_bytes, read.nvml_used_bytes, read.judged_bytes) == (
            "cuda_allocator", 4096, 8192, 5000, 2, 900, 950, 8192)  # fmt: skip


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ModuleNotFoundError("x"), "pip install 'gnnmoe[gpu]'"), (RuntimeError("driver"), "driver")],
)
def test_nvml_that_does_not_answer_is_null_with_a_reason(error, reason, monkeypatch):
    def fails(device):
        raise error

    monkeypatch.setattr("torch.cuda.device_memory_used", fails)
    found = nvml_used_bytes(CUDA)
    assert isinstance(found, NotMeasured)
    assert reason in found.reason


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("coupler", ["mean", "GNN", "HGNN", "topk"])
def test_d4_gpu_the_prediction_is_within_ten_per_cent(coupler):
    """D4 (gpu): the tracker's sum against the allocator's peak."""
    config = small(coupler, embed_dim=128, max_seq_length=128, num_layers=2, vocab_size=10_000)
    read = reading(config, 32, 128, device=CUDA)
    predicted = predict_peak(config, 32, 128, TRAINING, device=CUDA)
    assert predicted == pytest.approx(read.peak_allocated_bytes, rel=0.1)


@pytest.mark.gpu
@needs_gpu
def test_e2_gpu_allocated_reserved_and_device_used():
    """E2 (gpu): allocated ≤ active ≤ reserved ≤ used, and an earlier larger step does not count."""
    large = CudaMeter(CUDA).measure(lambda: torch.zeros(2**28, device=CUDA))
    read = CudaMeter(CUDA).measure(lambda: torch.zeros(2**22, device=CUDA))
    numbers = [read.peak_allocated_bytes, read.peak_active_bytes, read.peak_reserved_bytes,
               read.device_used_bytes]  # fmt: skip
    assert all(isinstance(number, int) for number in numbers)
    assert numbers == sorted(numbers)  # pyright: ignore[reportArgumentType]
    assert read.judged_bytes < large.judged_bytes - 2**29
    assert read.allocator_retries == 0
