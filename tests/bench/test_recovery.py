"""Running out of memory: what counts as it (B9), that all memory comes back (B10), and a true case (D7)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from bench import device
from bench.device import OUT_OF_MEMORY_TEXTS, Attempted, attempt, is_out_of_memory
from bench.tune.search import NoFeasibleBatch, Shape, Trial
from tests.bench._fake_memory import FakeMemory

REPOSITORY = Path(__file__).parents[2]
REAL = {
    "cpu": "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 16777216 bytes. Error code 12 (Cannot allocate memory)",
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "mps": "MPS backend out of memory (MPS allocated: 8.83 GiB, other allocations: 135.00 MiB)",
    "cuda": "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    "driver": "CUDA driver error: out of memory",
}


@pytest.mark.parametrize("text", REAL.values(), ids=REAL.keys())
def test_b9_out_of_memory_by_its_text(text):
    """B9: torch raises these as a plain RuntimeError."""
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(torch.AcceleratorError(text))


def test_b9_each_text_is_needed():
    """B9: the five texts, each real message has exactly one of them; and the two types."""
    assert is_out_of_memory(torch.OutOfMemoryError("anything"))
    assert is_out_of_memory(MemoryError())
    assert sorted(sum(text in real for real in REAL.values()) for text in OUT_OF_MEMORY_TEXTS) == [1] * 5


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA error: out of memory"),
        NotImplementedError("CUDA error: out of memory"),
        RuntimeError("could not create a primitive"),  # oneDNN's text may mean many things
        NoFeasibleBatch([Trial(Shape(1, 8), "RuntimeError: CUDA error: out of memory")], Shape(1, 8)),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"),
        RuntimeError("this page is out of memory lane"),
        KeyboardInterrupt("CUDA error: out of memory"),
    ],
    ids=lambda error: f"{type(error).__name__}:{str(error)[:20]}",
)
def test_b9_every_other_error_comes_out(error):
    assert not is_out_of_memory(error)

    def fails():
        raise error

    with pytest.raises(type(error)) as raised:
        attempt(fails)
    assert raised.value is error


def test_a_failure_says_nothing_of_other_processes():
    def fails():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 130.00 MiB. GPU 0 has a total capacity of 79.18 GiB of "
            "which 65.33 GiB is free. Process 494 has 1.29 GiB memory in use.\nSee documentation"
        )

    failure = attempt(fails).failure
    assert failure == "OutOfMemoryError: CUDA out of memory. Tried to allocate 130.00 MiB."


def test_a_failed_attempt_says_why():
    memory = FakeMemory(fixed_bytes=100, bytes_per_sample=10, limit_bytes=1000)
    failures = [attempt(lambda size=size: memory.step(size)).failure for size in (1, 90, 91)]
    assert [failure is None for failure in failures] == [True, True, False]
    assert attempt(lambda: memory.step(91)).failure == (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 1010 bytes"
    )
    assert attempt(lambda: 7) == Attempted(value=7)


def filled(alive: list[weakref.ref], then=None) -> None:
    """Hold tensors in two frames and in a cycle, then run out of memory."""
    tensor = torch.zeros(1000)
    cycle = [torch.zeros(1000)]
    cycle.append(cycle)  # pyright: ignore[reportArgumentType]
    alive += [weakref.ref(tensor), weakref.ref(cycle[0])]

    def deeper():
        inner = torch.zeros(1000)
        alive.append(weakref.ref(inner))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    try:
        deeper()
    except RuntimeError as error:
        if then is not None:
            then(error)
        raise


def chained(alive: list[weakref.ref], then=None) -> None:
    try:
        filled(alive, then)
    except RuntimeError as error:
        raise MemoryError("in the update") from error


@pytest.mark.parametrize("function", [filled, chained])
@pytest.mark.parametrize("held", [False, True], ids=["error dropped", "error held elsewhere"])
def test_b10_nothing_of_a_failed_attempt_stays_alive(function, held):
    """B10: no tensor, not in the frames, not in a cycle, and not where someone keeps the error."""
    alive: list[weakref.ref] = []
    kept: list[BaseException] = []
    assert attempt(lambda: function(alive, kept.append if held else None)).failure
    assert [reference() for reference in alive] == [None] * 3
    assert len(kept) == held


def test_recovery_empties_the_cache_of_the_device(monkeypatch):
    emptied = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append("cuda"))
    device.recover()
    assert emptied == ["cuda"]


CHILD = """
import json, resource, sys, torch
from bench.config import TrainingConfig
from bench.device import attempt, keep_freed_memory
from bench.training.step import make_optimizer, training_step
from bench.tune.control import ControlledSteps
from gnnmoe import GNNMoEConfig, GNNMoEModel

torch.set_num_threads(1)

def leave(room):
    lines = open("/proc/self/status")
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, resource.RLIM_INFINITY))

# D7: a batch of 64 rows takes more than 40 MiB, two rows take less.
torch.backends.mkldnn.set_flags(False)  # its "could not create a primitive" may mean many things
model = GNNMoEModel(GNNMoEConfig(embed_dim=64, num_layers=1, max_seq_length=64, vocab_size=200), seed=0)
optimizer = make_optimizer(model, TrainingConfig())
ids = torch.arange(64 * 64).view(64, 64) % 200
batch = {"input_ids": ids, "targets": ids}
training_step(model, {k: v[:2] for k, v in batch.items()}, optimizer, 1.0)  # loads what loads lazily
leave(40 * 2**20)
steps = ControlledSteps(model, 64, torch.device("cpu"))
for number in (1, 2, 3):
    def step(batch, micro, shapes):
        return training_step(model, batch, optimizer, 1.0, micro, shapes)
    *_, shapes = steps.run(step, batch, number, optimizer)
print(json.dumps([steps.to_record(), [list(shape) for shape in shapes]]), flush=True)
torch.backends.mkldnn.set_flags(True)
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

# B10
ROOM = 96 * 2**20
CONFIG = GNNMoEConfig(embed_dim=16, num_layers=1, max_seq_length=64, vocab_size=100)

def nearly_everything():
    # In small pieces: the C library's heap has the room, with small things lying about in it.
    return [torch.ones(2**18, dtype=torch.uint8) for _ in range(ROOM * 8 // 10 // 2**18)]

def step(rows):
    model, ids = GNNMoEModel(CONFIG, seed=0), torch.zeros(rows, 64, dtype=torch.int64)
    optimizer = make_optimizer(model, TrainingConfig())
    return float(training_step(model, dict(input_ids=ids, targets=ids), optimizer, 1.0)[0])

assert attempt(lambda: step(4)).failure is None
leave(ROOM)

for trial in range(3):  # the next trial can use what the one before had
    if trial == 1:
        keep_freed_memory()  # as the commands do: what is freed stays with the C library
    failed = attempt(lambda: step(2048))
    assert "DefaultCPUAllocator: can't allocate memory" in failed.failure, failed
    assert attempt(nearly_everything).failure is None, trial
assert attempt(lambda: step(4)).failure is None
held = nearly_everything()
assert attempt(nearly_everything).failure  # what is held elsewhere is not freed: the limit is real
print("recovered")
"""


@pytest.fixture(scope="module")
def child() -> subprocess.CompletedProcess[str]:
    """A process under RLIMIT_DATA, where the allocator of the CPU really says no."""
    if sys.platform != "linux":
        pytest.skip("RLIMIT_DATA counts mappings on Linux only")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.slow
def test_d7_a_true_out_of_memory_in_training_is_recovered_from(child):
    assert child.stdout, child.stderr[-2000:]
    recoveries, shapes = json.loads(child.stdout.splitlines()[0])
    assert recoveries, "64 rows at once did not run out of memory"
    assert {recovery["step"] for recovery in recoveries} == {1}, "once is enough: later steps fit"
    assert "can't allocate memory" in recoveries[0]["error"]
    micro = recoveries[-1]["micro_batch_size"]
    assert micro in (8, 16, 32)
    assert shapes == [[micro, 64]] * (64 // micro)


@pytest.mark.slow
def test_b10_a_true_out_of_memory_gives_its_memory_back(child):
    """B10: the child under RLIMIT_DATA runs out of memory in a training step, three times over.

    After each, nearly all the room can be had.
    """
    assert child.stdout.splitlines()[1:] == ["recovered"], child.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_b10_gpu_memory_is_back_at_the_baseline():
    """B10 (gpu): after a true out-of-memory, twice, nearly all the device can be had again."""
    device.recover()
    baseline = torch.cuda.memory_allocated()
    room = torch.cuda.mem_get_info()[0]

    def fill():
        held = []
        while True:
            held.append(torch.empty(room // 8, dtype=torch.uint8, device="cuda"))

    for _ in range(2):
        assert "out of memory" in str(attempt(fill).failure)
        assert torch.cuda.memory_allocated() == baseline
        again = attempt(lambda: torch.empty(int(room * 0.9), dtype=torch.uint8, device="cuda").numel())
        assert again.failure is None


def test_b10_recovery_runs_outside_the_except_block(monkeypatch):
    """B10: there, no error is being handled, and its frames are gone but for cycles."""
    alive: list[weakref.ref] = []
    seen: list[tuple[object, list[bool]]] = []

    def recover():
        seen.append((sys.exc_info()[0], [reference() is None for reference in alive]))

    monkeypatch.setattr(device, "recover", recover)
    attempt(lambda: filled(alive))
    assert seen == [(None, [True, False, True])]
