"""On CUDA (gpu): no waiting for the device in a step, compiled steps and CUDA graphs, the head's memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.config import ExecutionConfig, TrainingConfig
from bench.training.step import Batch, Execution, make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.head import TiedHead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
VOCABULARY = 33_278


def build(coupler: str = "HGNN", layers: int = 2, **flags) -> GNNMoEModel:
    config = GNNMoEConfig(coupler_type=coupler, num_layers=layers, vocab_size=VOCABULARY)
    return Execution(ExecutionConfig(**flags), CUDA).build(config, 0).train()


def batch(rows: int = 32, seed: int = 1) -> Batch:
    """So many tokens that the embedding's backward sorts them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, 129), generator=generator).to(CUDA)
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("micro_batch_size", [None, 16])
@pytest.mark.parametrize("experts", ["loop", "batched"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("coupler", ["HGNN", "GNN", "topk"])
def test_nothing_in_a_step_waits_for_the_device(coupler, precision, experts, micro_batch_size):
    model = build(coupler, layers=1, experts=experts, precision=precision)
    optimizer, data = make_optimizer(model, TrainingConfig()), batch()
    training_step(model, data, optimizer, 1.0, micro_batch_size)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        loss, norm = training_step(model, data, optimizer, 1.0, micro_batch_size)
        with pytest.raises(RuntimeError, match="synchroniz"):
            float(loss)  # so the mode does refuse
    assert loss.isfinite()
    assert norm.isfinite()


def test_batched_attention_runs_as_flash_attention():
    model, data = build(precision="bf16"), batch()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot be used
        model(data["input_ids"], targets=data["targets"])["loss"].backward()


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [None, 16])
@pytest.mark.parametrize(
    ("mode", "precision"), [("default", "fp32"), ("default", "bf16"), ("reduce-overhead", "bf16")]
)
def test_compiled_steps_are_the_steps(mode, precision, micro_batch_size):
    """With CUDA graphs too, whose results lie where the next run writes: losses are read late."""
    torch._dynamo.reset()
    plain = build(layers=1, precision=precision)
    model = copy.deepcopy(plain)
    made = Execution(ExecutionConfig(compile=True, compile_mode=mode, precision=precision), CUDA)
    made.compile_now(model, batch(), micro_batch_size)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizers = [make_optimizer(each, TrainingConfig()) for each in (plain, model)]
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            for each, optimizer, kept in zip((plain, model), optimizers, found, strict=True):
                kept.append(training_step(each, batch(seed=seed), optimizer, 1.0, micro_batch_size))
    for expected, got in zip(*found, strict=True):
        for ours, theirs in zip(expected, got, strict=True):
            assert float(theirs) == pytest.approx(float(ours), rel=1e-3 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trained_steps_of_both_forms_are_the_same_on_cuda(precision):
    models = [build(experts=experts, precision=precision) for experts in ("loop", "batched")]
    optimizers = [make_optimizer(model, TrainingConfig()) for model in models]
    for step in range(3):
        found = [
            training_step(model, batch(seed=step), optimizer, 1.0)
            for model, optimizer in zip(models, optimizers, strict=True)
        ]
        for ours, theirs in zip(*found, strict=True):
            assert float(theirs) == pytest.approx(float(ours), rel=1e-3 if precision == "fp32" else 3e-2)


def test_the_head_holds_a_chunk_of_the_logits():
    """4,096 rows × 33,280 words are 545 MB in float32; a chunk of 1,024 rows, a few times, is less."""
    head = TiedHead(VOCABULARY, 33_280).to(CUDA)
    hidden = torch.randn(4096, 64, device=CUDA, requires_grad=True)
    embedding = torch.randn(33_280, 64, device=CUDA, requires_grad=True)
    targets = torch.randint(VOCABULARY, (4096,), device=CUDA)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = head.loss(hidden, embedding, targets)
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 4096 * 33_280 * 4
