"""The tied output head, and its cross-entropy in chunks of rows.

At WikiText-2's vocabulary the full logits would swamp the memory of everything else, so no
training step and no evaluation ever holds more than a chunk of them.
Shapes: N tokens, D width, V vocabulary size padded to a multiple of 64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that is not scored
PADDED_BIAS = -1e4  # takes a padded column's probability to 0
GPU_ROWS, CPU_ROWS, CPU_CHUNK_BYTES = 1024, 256, 32 * 2**20


class TiedHead(nn.Module):
    """``logits = h Eᵀ + b`` with the embedding E (V, D) of the model and a bias of its own.

    The embedding is passed in, since it belongs to the model; rows past ``vocab_size`` are
    padding and get the bias −1e4.
    """

    def __init__(self, vocab_size: int, padded_vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.padding = vocab_size, padded_vocab_size - vocab_size
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def padded_bias(self) -> Tensor:
        """Return the bias (V,), the padding included."""
        return F.pad(self.bias, (0, self.padding), value=PADDED_BIAS)

    def logits(self, hidden: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return (..., vocab_size) for ``hidden`` (..., D), at least float32; padded columns are cut off."""
        return _logits(hidden, embedding_VD[: self.vocab_size], self.bias)

    def loss(self, hidden_ND: Tensor, embedding_VD: Tensor, targets_N: Tensor) -> Tensor:
        """Return the mean negative log-likelihood in nats of the targets that are not −100."""
        count = (targets_N != IGNORED).sum()
        if not torch.is_grad_enabled():
            return self.token_nll(hidden_ND, embedding_VD, targets_N).sum() / count
        device, bias, rows = hidden_ND.device.type, self.padded_bias(), chunk_rows(hidden_ND, embedding_VD)
        if _torch_has_it(device):
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
            return F.linear_cross_entropy(
                hidden_ND, embedding_VD, targets_N, linear_bias=bias, ignore_index=IGNORED, options=options
            )
        if torch.is_autocast_enabled(device):
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            total = _SummedNll.apply(hidden_ND, embedding_VD, bias, targets_N, rows)
        return total / count  # pyright: ignore[reportOperatorIssue]

    @torch.no_grad()
    def token_nll(self, hidden_ND: Tensor, embedding_VD: Tensor, targets_N: Tensor) -> Tensor:
        """Return the nll (N,) in nats of each target, 0 where it is −100; no gradient."""
        bias = self.padded_bias()
        rows = chunk_rows(hidden_ND, embedding_VD)
        return torch.cat([
            F.cross_entropy(_logits(hidden, embedding_VD, bias), targets,
                            ignore_index=IGNORED, reduction="none")
            for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
        ])  # fmt: skip


def chunk_rows(hidden_ND: Tensor, embedding_VD: Tensor) -> int:
    """Return how many rows of logits to hold at once: 1,024 on a GPU; on a CPU 256, and at most 32 MiB."""
    if hidden_ND.device.type != "cpu":
        return GPU_ROWS
    return max(16, min(CPU_ROWS, CPU_CHUNK_BYTES // (embedding_VD.shape[0] * 4)))


def _torch_has_it(device: str) -> bool:
    """Tell whether torch's own chunked loss serves: eager on a CPU, from torch 2.13, without autocast.

    There it takes 0.6 to 0.9 of the time of ours. Compilers stop at it; under autocast it would round the
    bias.
    """
    usual = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device)
    return device == "cpu" and usual and hasattr(nn, "LinearCrossEntropyOptions")


class _SummedNll(torch.autograd.Function):
    """Σ nll over the targets that are not −100, in chunks of ``rows``, where torch has nothing that serves.

    A chunk's gradients are made in the forward, where its logits are, so that nothing is computed twice
    in the backward. The products are in the type of ``hidden``, all else in that of the bias.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, embedding_VD: Tensor, bias_V: Tensor, targets_N: Tensor, rows: int
    ) -> Tensor:
        embedding = embedding_VD.to(hidden_ND.dtype)
        of_embedding, of_bias = torch.zeros_like(embedding_VD), torch.zeros_like(bias_V)
        chunks = [
            _chunk(hidden, embedding, bias_V, targets, of_embedding, of_bias)
            for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
        ]
        sums, of_hidden = zip(*chunks, strict=True)
        ctx.save_for_backward(torch.cat(of_hidden), of_embedding, of_bias)
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_embedding, of_bias = ctx.saved_tensors
        return of_hidden * scale.to(of_hidden.dtype), of_embedding * scale, of_bias * scale, None, None


def _chunk(
    hidden: Tensor, embedding: Tensor, bias: Tensor, targets: Tensor, of_embedding: Tensor, of_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Σ nll of some rows and its gradient by ``hidden``; add those by embedding and bias."""
    log_p = _logits(hidden, embedding, bias).log_softmax(-1)
    total = F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
    error = _less_one(log_p.exp_(), targets.clamp_min(0))  # the gradient of a row's logits
    kept = (targets != IGNORED).to(bias.dtype)
    of_bias += error.mT.mv(kept)
    error, kept = error.to(hidden.dtype), kept.to(hidden.dtype)[:, None]
    if hidden.dtype == of_embedding.dtype:
        of_embedding.addmm_(error.mT, hidden * kept)
    else:
        of_embedding += error.mT @ (hidden * kept)
    return total, (error @ embedding) * kept


def _logits(hidden: Tensor, embedding: Tensor, bias: Tensor) -> Tensor:
    """Return ``h Eᵀ + b`` in the type of the bias: where the product is in bf16, the sum is not.

    The bias of a rare word is about −10, where neighbours in bf16 are 0.06 apart.
    """
    if hidden.dtype == bias.dtype and not torch.is_autocast_enabled(hidden.device.type):
        return F.linear(hidden, embedding, bias)
    return F.linear(hidden, embedding) + bias


def _less_one(p_NV: Tensor, columns_N: Tensor) -> Tensor:
    """Return ``p`` less 1 in one column of each row: in place, or as what a compiler fuses."""
    if torch.compiler.is_compiling():
        return p_NV - (torch.arange(p_NV.shape[1], device=p_NV.device) == columns_N[:, None]).to(p_NV.dtype)
    return p_NV.scatter_add_(1, columns_N[:, None], -torch.ones_like(p_NV[:, :1]))
