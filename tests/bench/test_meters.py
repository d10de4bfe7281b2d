"""Meters (E2): what each reads, by part and by phase; the prediction must equal the reading (D4)."""

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
    GradientsAtPeak,
    TrackedMeter,
    built_bytes,
    by_part,
    held_bytes,
    meter_for,
    nvml_used_bytes,
    predict_peak,
    process_peak_bytes,
)  # fmt: skip
from bench.record import Memory, NotMeasured, is_measured, not_measured
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
    [pytest.param("gate", 2, 8, marks=pytest.mark.slow), pytest.param("GNN", 2, 8, marks=pytest.mark.slow),
     ("HGNN", 2, 24), ("topk", 3, 24)],
)  # fmt: skip
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
    exact = predict_peak(config, 48, 24, TRAINING, micro_batch_size=16)
    monkeypatch.setattr(memory_module, "EXACT_TOKENS", 1000)
    assert predict_peak(config, 48, 24, TRAINING, micro_batch_size=16) == pytest.approx(exact, rel=0.01)


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


def test_a_peak_late_in_the_backward_has_most_gradients_and_one_at_its_start_has_none():
    """Wide feed-forward nets on one row are all weights, 64 rows are all activations."""
    step, owners, parameters, _ = made(CPU, rows=1, ffn_dim=4000)
    step()
    assert meter_for(CPU).measure(step, owners).model_dump()["by_part"]["gradients"] > 0.6 * parameters
    step, owners, parameters, _ = made(CPU, rows=64)
    step()
    assert meter_for(CPU).measure(step, owners).model_dump()["by_part"]["gradients"] < 0.4 * parameters


def test_what_a_step_raises_comes_out_of_the_meter_which_still_works():
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        TrackedMeter(CPU).measure(fails)
    assert TrackedMeter(CPU).measure(lambda: torch.zeros(25)).judged_bytes == 100
