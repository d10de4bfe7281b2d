"""The head: chunks of rows, padded columns, the output bias, precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gnnmoe.head
from gnnmoe.head import TiedHead, chunk_rows
from tests.gnnmoe._support import assert_near, make_model, normal, token_ids


@pytest.fixture
def small_chunks(monkeypatch):
    """16 rows at a time."""
    monkeypatch.setattr(gnnmoe.head, "CPU_CHUNK_BYTES", 0)


@pytest.fixture(params=["torch", "own"])
def form(request, monkeypatch):
    """The chunked loss of torch 2.13, which an eager CPU takes, or ours."""
    if request.param == "own":
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    elif not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has F.linear_cross_entropy from 2.13 on")


def head_inputs(dtype=torch.float64, N: int = 40):
    head = TiedHead(50, 64).to(dtype)
    with torch.no_grad():
        head.bias.copy_(normal(50, seed=6))
    targets = token_ids(N, seed=4)
    targets[::5] = -100
    leaves = [normal(N, 6, dtype=dtype), normal(64, 6, seed=3, dtype=dtype), head.bias]
    return head, targets, [leaf.detach().requires_grad_(True) for leaf in leaves[:2]] + [head.bias]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("N", [1, 16, 40, 600])
def test_loss_in_chunks_is_the_cross_entropy_of_all_logits(small_chunks, form, N, dtype):
    head, targets, leaves = head_inputs(dtype, N)
    targets[0], scale = 7, 3.0
    hidden, embedding, bias = leaves
    full = F.linear(hidden, embedding[:50], bias)
    expected = F.cross_entropy(full, targets, ignore_index=-100)
    loss = head.loss(hidden, embedding, targets)
    assert_near(loss, expected, dtype)
    both = (torch.autograd.grad(value * scale, leaves) for value in (loss, expected))
    for ours, theirs in zip(*both, strict=True):
        assert_near(ours, theirs, dtype)
    with torch.no_grad():
        assert_near(head.loss(hidden, embedding, targets), expected, dtype)
    nll = head.token_nll(hidden, embedding, targets)
    assert_near(nll, F.cross_entropy(full, targets, ignore_index=-100, reduction="none"), torch.float32)


def test_the_head_never_holds_all_rows_and_computes_no_logits_twice(small_chunks, monkeypatch):
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    head, targets, (hidden, embedding, _) = head_inputs()
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    head.loss(hidden, embedding, targets).backward()
    head.token_nll(hidden, embedding, targets)
    assert seen == [16, 16, 8, 16, 16, 8]  # training, evaluation


def test_eager_on_a_cpu_takes_the_chunks_of_torch(small_chunks, monkeypatch):
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has F.linear_cross_entropy from 2.13 on")
    head, targets, (hidden, embedding, _) = head_inputs(torch.float32)
    seen = []
    theirs = F.linear_cross_entropy
    monkeypatch.setattr(
        F,
        "linear_cross_entropy",
        lambda *a, **k: seen.append(k["options"].batch_chunk_size) or theirs(*a, **k),
    )
    head.loss(hidden, embedding, targets)
    with torch.autocast("cpu", torch.bfloat16):
        head.loss(hidden, embedding, targets)
    assert seen == [16]


def test_chunk_is_about_32_mib_on_a_cpu():
    rows = chunk_rows(torch.empty(1, 6), torch.empty(33_280, 1))
    assert 31 * 2**20 < rows * 33_280 * 4 <= 32 * 2**20
    assert chunk_rows(torch.empty(1, 6), torch.empty(64, 1)) == 256
    assert chunk_rows(torch.empty(1, 6, device="meta"), torch.empty(33_280, 1)) == 1024


def test_padded_columns_get_no_probability_and_no_gradient(small_chunks, form):
    """Even where their embeddings point straight at the hidden state."""
    head, targets, (hidden, embedding, _) = head_inputs()
    with torch.no_grad():
        embedding[50:] = 100 * hidden[:14]
    loss = head.loss(hidden, embedding, targets)
    assert_near(loss, F.cross_entropy(head.logits(hidden, embedding), targets, ignore_index=-100))
    (gradient,) = torch.autograd.grad(loss, embedding)
    assert torch.count_nonzero(gradient[50:]) == 0
    assert head.logits(hidden, embedding).shape == (40, 50)
    assert head.padded_bias()[50:].tolist() == [-1e4] * 14


def test_set_output_bias_starts_the_model_at_the_unigram():
    model, ids = make_model(), token_ids(3, 8)
    before = model(ids)["logits"] - model.head.bias
    unigram = normal(50, seed=8).log_softmax(0)
    model.set_output_bias(unigram)
    assert_near(model.head.bias, unigram)
    assert model.head.bias.requires_grad
    assert_near(model(ids)["logits"], before + unigram)
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    assert_near(model(ids)["logits"].softmax(-1)[0, 0], unigram.exp())


def test_under_autocast_the_products_are_rounded_and_neither_bias_nor_loss(small_chunks):
    head, targets, leaves = head_inputs(torch.float32, 600)
    hidden, embedding, bias = leaves
    with torch.no_grad():
        bias.sub_(10.0)  # a log unigram: in bf16 its neighbours are 0.06 apart
    rounded = F.linear(hidden.bfloat16(), embedding[:50].bfloat16()) + bias
    expected = F.cross_entropy(rounded, targets, ignore_index=-100)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nll = head.loss(hidden, embedding, targets), head.token_nll(hidden, embedding, targets)
        assert_near(head.logits(hidden, embedding), rounded, torch.float32)
    assert loss.dtype == nll.dtype == torch.float32
    assert_near(loss, expected, torch.float32)
    assert_near(nll.sum() / (targets != -100).sum(), expected, torch.float32)
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        assert_near(ours, theirs, torch.bfloat16)


def test_a_compiled_head_has_the_same_loss_and_gradients(small_chunks):
    """The compiler gets another form of one operation, which it can fuse."""
    head, targets, leaves = head_inputs(torch.float32)
    hidden, embedding, _ = leaves
    expected = head.loss(hidden, embedding, targets)
    loss = torch.compile(head.loss, backend="eager", fullgraph=True)(hidden, embedding, targets)
    assert_near(loss, expected, torch.float32)
    both = (torch.autograd.grad(value, leaves) for value in (loss, expected))
    for ours, theirs in zip(*both, strict=True):
        assert_near(ours, theirs, torch.float32)
