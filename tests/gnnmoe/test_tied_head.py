"""The head: chunks of rows, padded columns, the output bias."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gnnmoe.head
from gnnmoe.head import TiedHead, chunk_rows
from tests.gnnmoe._support import assert_near, make_model, normal, token_ids


@pytest.fixture(params=["fused", "chunked"])
def path(request, monkeypatch):
    """Both ways to the loss; the second is for torch without ``linear_cross_entropy``."""
    if request.param == "chunked":
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
        monkeypatch.setattr(gnnmoe.head, "CPU_CHUNK_BYTES", 0)  # 16 rows at a time
    elif not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")
    return request.param


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
def test_loss_of_both_paths_is_the_cross_entropy_of_all_logits(path, N, dtype):
    head, targets, leaves = head_inputs(dtype, N)
    targets[0] = 7
    hidden, embedding, bias = leaves
    full = F.linear(hidden, embedding[:50], bias)
    expected = F.cross_entropy(full, targets, ignore_index=-100)
    loss = head.loss(hidden, embedding, targets)
    assert_near(loss, expected, dtype)
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for ours, theirs in pairs:
        assert_near(ours, theirs, dtype)
    nll = head.token_nll(hidden, embedding, targets)
    assert_near(nll, F.cross_entropy(full, targets, ignore_index=-100, reduction="none"), torch.float32)


def test_chunked_path_never_holds_all_rows(monkeypatch):
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setattr(gnnmoe.head, "CPU_CHUNK_BYTES", 0)
    head, targets, (hidden, embedding, _) = head_inputs()
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: seen.append(len(x)) or linear(x, *rest))
    head.loss(hidden, embedding, targets).backward()
    head.token_nll(hidden, embedding, targets)
    assert seen == [16, 16, 8, 8, 16, 16, 16, 16, 8]  # forward, recomputed, evaluation


def test_chunk_is_about_32_mib_on_a_cpu():
    rows = chunk_rows(torch.empty(1, 6), torch.empty(33_280, 1))
    assert 31 * 2**20 < rows * 33_280 * 4 <= 32 * 2**20
    assert chunk_rows(torch.empty(1, 6, device="meta"), torch.empty(33_280, 1)) == 1024


def test_padded_columns_get_no_probability_and_no_gradient(path):
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


def test_a_vocabulary_that_needs_no_padding():
    head = TiedHead(64, 64).double()
    hidden, embedding, targets = normal(9, 6), normal(64, 6, seed=3), token_ids(9)
    assert_near(head.loss(hidden, embedding, targets), F.cross_entropy(hidden @ embedding.T, targets))


def test_model_loss_is_the_same_by_both_paths(monkeypatch):
    model, ids = make_model(), token_ids(3, 8)
    expected = model(ids, labels=ids)["loss"]
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setattr(gnnmoe.head, "CPU_CHUNK_BYTES", 0)
    loss = model(ids, labels=ids)["loss"]
    assert_near(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        assert_near(ours, theirs)


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
