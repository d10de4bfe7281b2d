"""The tied output head, and its cross-entropy in chunks of rows.

With the vocabulary of WikiText-2 the full logits would need more memory than everything else. So training
and evaluation never hold more than one chunk of them.
Shapes: N tokens, D width, V vocabulary size padded to a multiple of 64.
"""

from __future__ import annotations

from functools import partial
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

    The embedding belongs to the model, and is passed to each method. Its rows past ``vocab_size`` are
    padding; their bias is −1e4.
    """

    def __init__(self, vocab_size: int, padded_vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.padding = vocab_size, padded_vocab_size - vocab_size
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def padded_bias(self) -> Tensor:
        """Return the bias (V,) with that of the padding."""
        return F.pad(self.bias, (0, self.padding), value=PADDED_BIAS)

    def logits(self, hidden: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return (..., vocab_size) for ``hidden`` (..., D) without padding, in float32 or a wider type."""
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
        chunks = zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
        nll = partial(F.cross_entropy, ignore_index=IGNORED, reduction="none")
        return torch.cat([nll(_logits(hidden, embedding_VD, bias), targets) for hidden, targets in chunks])


def chunk_rows(hidden_ND: Tensor, embedding_VD: Tensor) -> int:
    """Return the rows of logits in a chunk: 1,024 on a GPU; on a CPU at most 256 rows and 32 MiB."""
    if hidden_ND.device.type != "cpu":
        return GPU_ROWS
    return max(16, min(CPU_ROWS, CPU_CHUNK_BYTES // (embedding_VD.shape[0] * 4)))


def _torch_has_it(device: str) -> bool:
    """Return whether to use torch's own chunked loss: eager on a CPU, from torch 2.13, without autocast.

    There it takes 0.6 to 0.9 of the time of ``_SummedNll``. A compiler breaks the graph at it, and under
    autocast it would round the bias.
    """
    usual = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(device)
    return device == "cpu" and usual and hasattr(nn, "LinearCrossEntropyOptions")


class _SummedNll(torch.autograd.Function):
    """Σ nll over the targets that are not −100, in chunks of ``rows``, where torch's own loss does not serve.

    The forward also computes the gradients of each chunk while it has the logits, so that the backward
    computes nothing again. Matrix products have the type of ``hidden``, everything else that of the bias.
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
    """Return Σ nll of a chunk and its gradient by ``hidden``; add the gradients by embedding and bias."""
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
    """Return ``h Eᵀ + b`` in the type of the bias, also where the product is in bf16.

    The bias of a rare word is about −10, where neighbouring numbers in bf16 are 0.06 apart.
    """
    if hidden.dtype == bias.dtype and not torch.is_autocast_enabled(hidden.device.type):
        return F.linear(hidden, embedding, bias)
    return F.linear(hidden, embedding) + bias


def _less_one(p_NV: Tensor, columns_N: Tensor) -> Tensor:
    """Return ``p`` minus 1 in one column of each row: in place, or in a form that a compiler fuses."""
    if torch.compiler.is_compiling():
        return p_NV - (torch.arange(p_NV.shape[1], device=p_NV.device) == columns_N[:, None]).to(p_NV.dtype)
    return p_NV.scatter_add_(1, columns_N[:, None], -torch.ones_like(p_NV[:, :1]))
