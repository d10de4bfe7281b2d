"""Speed, memory, FLOPs and environment: what they count, and that they leave the model alone."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from bench.config import MeasureConfig, TrainingConfig
from bench.device import resolve_device
from bench.measure.memory import meter_for
from bench.measure.speed_pass import fetched, measure_speed, peak_memory
from bench.measure.timing import TrainingSteps, training_flops_per_token
from bench.training import environment
from bench.training.environment import code_state, describe_environment
from gnnmoe import GNNMoEConfig, GNNMoEModel

CPU = torch.device("cpu")


@pytest.fixture
def model():
    return GNNMoEModel(GNNMoEConfig(embed_dim=8, num_layers=1, max_seq_length=8, vocab_size=50), seed=0)


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(8).repeat(2, 1)
    targets = ids.clone()
    targets[0, :3] = -100
    return [{"input_ids": ids, "targets": targets} for _ in range(count)]


def steps_of(model: GNNMoEModel, batches: list[dict[str, torch.Tensor]], rows: int | None = None):
    return TrainingSteps(model, batches, TrainingConfig(), rows)


def test_tokens_are_those_of_the_batches_that_were_timed(model):
    """Batches of 13 and 16 targets in turn; the warm-up has taken the first."""
    batches = make_batches(2)
    batches[1]["targets"] = batches[1]["input_ids"]
    measure = MeasureConfig(speed_warmup_steps=1, speed_steps=3)
    speed = measure_speed(steps_of(model, batches), measure, CPU)
    assert speed.step_tokens == [16, 13, 16], "D6: only the targets that count"
    assert all(seconds > 0 for seconds in speed.step_seconds)


def test_the_clock_sees_the_timed_steps_only(model, monkeypatch):
    """A fake clock that counts steps: warm-up is outside, each timed step is one tick."""
    ticks = [0.0]

    def step(*_):
        ticks[0] += 1.0
        return torch.tensor(0.0), torch.tensor(0.0)

    monkeypatch.setattr("bench.measure.timing.training_step", step)
    monkeypatch.setattr("bench.measure.timing.perf_counter", lambda: ticks[0])
    measure = MeasureConfig(speed_warmup_steps=3, speed_steps=4)
    speed = measure_speed(steps_of(model, make_batches(1)), measure, CPU).model_dump(mode="json")
    assert speed["step_seconds"] == [1.0] * 4
    assert ticks[0] == 7.0
    measure = MeasureConfig(speed_warmup_steps="auto", speed_steps=2)
    speed = measure_speed(steps_of(model, make_batches(1)), measure, CPU).model_dump(mode="json")
    assert (speed["warmup_steps"], speed["steady"], ticks[0]) == (20, True, 29.0)


def test_a_fetch_is_what_the_loader_and_the_way_to_the_device_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("bench.measure.speed_pass.perf_counter", lambda: now[0])

    def loader():
        for number, batch in enumerate(make_batches(5)):
            now[0] += 1.0 + number
            yield batch

    def as_run(batch):
        now[0] += 0.5
        return {name: tensor[:, :4] for name, tensor in batch.items()}

    batches, seconds = fetched(loader(), 3, as_run, CPU)
    assert seconds == [1.5, 2.5, 3.5]
    assert [tuple(batch["targets"].shape) for batch in batches] == [(2, 4)] * 3
    assert len(fetched(loader(), 9, as_run, CPU)[0]) == 5


def test_the_memory_peak_is_that_of_the_tensors_alive():
    held = torch.nn.Linear(256, 256, bias=False)  # 262,144 bytes

    def step():
        torch.zeros(1024, 1024)  # 4 MiB, alone at any time
        torch.zeros(512, 1024)

    memory = meter_for(CPU).measure(step, (held,)).model_dump(mode="json")
    assert memory["peak_allocated_bytes"] == 4 * 2**20 + 262_144
    assert memory["peak_reserved_bytes"]["value"] is None
    assert memory["process_peak_bytes"] > 4 * 2**20


def test_flops_are_three_times_two_a_weight_of_every_product():
    """Forward and backward of a matrix product: 6 FLOPs a weight and token (2 for the first layer)."""
    config = GNNMoEConfig(coupler_type="mean", num_experts=2, embed_dim=64, num_heads=1, num_layers=1,
                          max_seq_length=2, vocab_size=640)  # fmt: skip
    model = GNNMoEModel(config, seed=0)
    weights = 2 * 12 * 64**2 + 64**2 + 640 * 64  # experts, combiner, head
    assert training_flops_per_token(model) == pytest.approx(6 * weights, rel=0.03)


def test_the_environment_names_versions_and_code_but_no_place():
    found = describe_environment(CPU, {"coupler_sha256": "a", "project_sha256": "b"}).model_dump(mode="json")
    text = json.dumps(found)
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert str(Path.cwd()) not in text
    assert socket.gethostname() not in text.replace(found["device_name"], "")


FAKE_GIT = {
    "not UTF-8": (r"case $* in *diff*) printf 'caf\351\n';; *) echo abc;; esac", "abc", None),
    "of another user": (
        "echo 'fatal: detected dubious ownership' >&2; exit 128",
        None,
        "git failed: fatal: det",
    ),
    "slow": ("exec sleep 5", None, "git took more"),
    "slow with changes": (
        "case $* in *diff*) exec sleep 5;; *) echo abc;; esac",
        "abc",
        "git took more",
    ),
    "missing": (None, None, "git cannot be started: No such file"),
    "not here": ("true", None, "git does not track this code"),
}


@pytest.mark.parametrize(("script", "commit", "remark"), FAKE_GIT.values(), ids=FAKE_GIT)
def test_git_never_keeps_a_run_from_starting(script, commit, remark, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "COMMAND_SECONDS", 0.2)
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = code_state()
    assert found["git_commit"] == commit
    assert (found["git_changes_sha256"] is not None) == (commit is not None and remark is None)
    assert (found["git_remark"] or "").startswith(remark or "")
    assert (found["git_remark"] is None) == (remark is None)


def test_the_commit_is_of_this_code_where_a_hook_of_another_repository_runs(monkeypatch, tmp_path):
    expected = code_state()
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert code_state()["git_commit"] == expected["git_commit"]


def test_auto_takes_what_there_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cpu") == CPU


def test_memory_by_phase_begins_without_an_optimizers_state(model):
    steps = steps_of(model, make_batches(1))
    for number in range(3):
        steps.step(number)
    memory = peak_memory(steps, CPU).model_dump(mode="json")
    phases = memory["by_phase"]
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert phases["built"] == held + 2 * 2 * 8 * 8
    assert phases["built"] < phases["first_step"] <= phases["steady"] == memory["peak_allocated_bytes"]
    json.dumps(memory)


def test_the_memory_peak_holds_a_chunk_of_logits():
    """The chunked head is one operator to torch; its logits count all the same."""
    config = GNNMoEConfig(embed_dim=8, num_layers=1, num_experts=2, max_seq_length=64, vocab_size=33_000)
    model = GNNMoEModel(config, seed=0)
    ids = torch.zeros(4, 64, dtype=torch.int64)
    batch = {"input_ids": ids, "targets": ids}
    memory = peak_memory(steps_of(model, [batch]), CPU).model_dump(mode="json")
    states = 3 * 4 * sum(p.numel() for p in model.parameters())  # weights and Adam's two moments
    chunk = 4 * min(256, 32 * 2**20 // (4 * config.padded_vocab_size)) * config.padded_vocab_size
    assert memory["peak_allocated_bytes"] > states + chunk
