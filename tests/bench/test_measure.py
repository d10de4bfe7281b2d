"""Speed, memory, FLOPs and environment: what they count, and that they leave the model alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from bench.config import MeasureConfig, TrainingConfig
from bench.device import OUT_OF_MEMORY_TEXTS, is_out_of_memory, resolve_device
from bench.measure.coupler_speed import REFERENCE, time_forms
from bench.measure.environment import code_state, describe_environment
from bench.measure.flops import training_flops_per_token
from bench.measure.memory import measure_memory
from bench.measure.speed import measure_speed
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.hypergraph_backends import BACKENDS, missing_backends

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return GNNMoEModel(GNNMoEConfig(embed_dim=8, num_layers=1, max_seq_length=8, vocab_size=50), seed=0)


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(8).repeat(2, 1)
    targets = ids.clone()
    targets[0, :3] = -100
    return [{"input_ids": ids, "targets": targets} for _ in range(count)]


def test_every_step_is_kept_and_only_real_targets_count(model):
    """D6: tokens/s comes from the targets that count and from step time only."""
    measure = MeasureConfig(speed_warmup_steps=2, speed_steps=5)
    speed, memory = measure_speed(model, make_batches(3), TrainingConfig(), measure, CPU)
    assert len(speed["step_seconds"]) == 5
    assert all(seconds > 0 for seconds in speed["step_seconds"])
    assert speed["step_tokens"] == [13] * 5
    assert speed["steady"] is False
    assert memory["meter"] == "tracked_tensors"
    json.dumps([speed, memory])


def test_the_clock_sees_the_timed_steps_only(model, monkeypatch):
    """A fake clock that counts steps: warm-up is outside, each timed step is one tick."""
    ticks = [0.0]

    def step(*_):
        ticks[0] += 1.0
        return torch.tensor(0.0), torch.tensor(0.0)

    monkeypatch.setattr("bench.measure.speed.training_step", step)
    monkeypatch.setattr("bench.measure.speed.measure_memory", lambda *_: {})
    monkeypatch.setattr("bench.measure.speed.time.perf_counter", lambda: ticks[0])
    measure = MeasureConfig(speed_warmup_steps=3, speed_steps=4)
    speed, _ = measure_speed(model, make_batches(1), TrainingConfig(), measure, CPU)
    assert speed["step_seconds"] == [1.0] * 4
    assert ticks[0] == 7.0


def test_the_speed_pass_works_on_a_copy(model):
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    measure_speed(model, make_batches(1), TrainingConfig(), MeasureConfig(speed_steps=2), CPU)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_memory_peak_is_that_of_the_tensors_alive():
    held = torch.nn.Linear(256, 256, bias=False)  # 262,144 bytes

    def step():
        torch.zeros(1024, 1024)  # 4 MiB, alone at any time
        torch.zeros(512, 1024)

    memory = measure_memory(step, (held,), CPU)
    assert memory["peak_allocated_bytes"] == 4 * 2**20 + 262_144
    assert memory["peak_reserved_bytes"]["value"] is None
    assert memory["process_peak_bytes"] > 4 * 2**20


def test_the_memory_peak_holds_a_chunk_of_logits():
    """The chunked head is one operator to torch; its logits count all the same."""
    config = GNNMoEConfig(embed_dim=8, num_layers=1, num_experts=2, max_seq_length=64, vocab_size=33_000)
    model = GNNMoEModel(config, seed=0)
    ids = torch.zeros(4, 64, dtype=torch.int64)
    batch = {"input_ids": ids, "targets": ids}
    _, memory = measure_speed(model, [batch], TrainingConfig(), MeasureConfig(speed_steps=1), CPU)
    states = 3 * 4 * sum(p.numel() for p in model.parameters())  # weights and Adam's two moments
    chunk = 4 * min(256, 32 * 2**20 // (4 * config.padded_vocab_size)) * config.padded_vocab_size
    assert memory["peak_allocated_bytes"] > states + chunk


def test_memory_grows_with_the_batch(model):
    peaks = []
    for rows in (1, 4):
        batch = [{name: tensor.repeat(rows, 1) for name, tensor in make_batches(1)[0].items()}]
        _, memory = measure_speed(model, batch, TrainingConfig(), MeasureConfig(speed_steps=1), CPU)
        peaks.append(memory["peak_allocated_bytes"])
    assert peaks[1] > peaks[0]


def test_flops_are_three_times_two_a_weight_of_every_product():
    """Forward and backward of a matrix product: 6 FLOPs a weight and token (2 for the first layer)."""
    config = GNNMoEConfig(
        embed_dim=64,
        num_heads=1,
        num_layers=1,
        max_seq_length=2,
        num_experts=2,
        vocab_size=640,
        coupler_type="mean",
    )
    model = GNNMoEModel(config, seed=0)
    weights = 2 * 12 * 64**2 + 64**2 + 640 * 64  # experts, combiner, head
    assert training_flops_per_token(model) == pytest.approx(6 * weights, rel=0.03)


def test_flops_count_attention():
    """Scores and mixing: 12·L·D FLOPs a token, expert and layer, forward and backward."""
    found = []
    for length in (32, 64):
        config = GNNMoEConfig(
            embed_dim=16,
            num_layers=2,
            max_seq_length=length,
            num_experts=3,
            vocab_size=64,
            coupler_type="mean",
        )
        found.append(training_flops_per_token(GNNMoEModel(config, seed=0)))
    assert found[1] - found[0] == pytest.approx(12 * 32 * 16 * 3 * 2, rel=1e-9)


def test_the_environment_names_versions_and_code_but_no_place():
    found = describe_environment(CPU, "HGNN")
    text = json.dumps(found)
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    import socket
    from pathlib import Path

    assert str(Path.cwd()) not in text
    assert socket.gethostname() not in text.replace(found["device_name"], "")
    assert set(code_state()) == {"git_commit", "git_changes_sha256"}


def test_only_running_out_of_memory_is_taken_for_it():
    """B9 in small."""
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    for text in OUT_OF_MEMORY_TEXTS:
        assert is_out_of_memory(RuntimeError(f"before {text} after"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("CUDA error: out of memory"))


def test_auto_takes_what_there_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cpu") == CPU


def test_every_form_of_a_coupler_is_timed_and_compared():
    """Speed row: the benchmark that prints loop / vectorized; its ratio is not asserted here."""
    config = GNNMoEConfig(embed_dim=8, num_experts=3, max_seq_length=4)
    timings = list(time_forms(config, batch_size=2, rounds=2, device=CPU))
    assert [timing.form for timing in timings] == [
        *(name for name in BACKENDS if name not in missing_backends()), REFERENCE,
    ]  # fmt: skip
    assert all(len(timing.seconds) == 2 and min(timing.seconds) > 0 for timing in timings)
    assert max(timing.largest_difference for timing in timings) < 1e-5
    graph = GNNMoEConfig(coupler_type="GNN", embed_dim=8, num_experts=3, max_seq_length=4)
    assert [timing.form for timing in time_forms(graph, 2, 1, CPU)] == ["vectorized", REFERENCE]


def test_the_benchmark_prints_a_table_of_80_columns(run_command):
    done = run_command(
        "bench.speed", *["--embed-dim", "8", "--max-seq-length", "4", "--batch-size", "2", "--rounds", "1"]
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for form in ("vectorized", "pyg", "loop", "reference()"):
        assert form in done.stdout


@pytest.mark.parametrize("flag", ["--hgnn-conv-type", "--static-hyperedge-strategy"])
def test_the_benchmark_refuses_a_misspelt_name_that_its_coupler_never_reads(flag, capsys):
    from bench import speed

    with pytest.raises(SystemExit) as stopped:
        speed.main(["--coupler", "mean", flag, "nope"])
    assert stopped.value.code == 2
    assert "'nope'; allowed: " in capsys.readouterr().err
