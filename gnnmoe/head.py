"""The tied output head, and its cross-entropy in chunks of rows.

At WikiText-2's vocabulary the full logits would swamp the memory of everything else, so no
training step and no evaluation ever holds more than a chunk of them.
Shapes: N tokens, D width, V vocabulary size padded to a multiple of 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # a target that is not scored
PADDED_BIAS = -1e4  # takes a padded column's probability to 0
FUSED_ROWS, GPU_ROWS, CPU_CHUNK_BYTES = 256, 1024, 32 * 2**20


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
        """Return (..., vocab_size) for ``hidden`` (..., D); padded columns are cut off."""
        return F.linear(hidden, embedding_VD[: self.vocab_size], self.bias)

    def loss(self, hidden_ND: Tensor, embedding_VD: Tensor, targets_N: Tensor) -> Tensor:
        """Return the mean negative log-likelihood in nats of the targets that are not −100."""
        bias, rows = self.padded_bias(), chunk_rows(hidden_ND, embedding_VD)
        if hasattr(nn, "LinearCrossEntropyOptions") and not torch.compiler.is_compiling():
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=min(FUSED_ROWS, rows))
            return F.linear_cross_entropy(
                hidden_ND, embedding_VD, targets_N, linear_bias=bias, ignore_index=IGNORED, options=options
            )
        sums = [
            checkpoint(_nll_sum, hidden, embedding_VD, bias, targets, use_reentrant=False)
            for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
        ]
        return torch.stack(sums).sum() / (targets_N != IGNORED).sum()  # pyright: ignore

    @torch.no_grad()
    def token_nll(self, hidden_ND: Tensor, embedding_VD: Tensor, targets_N: Tensor) -> Tensor:
        """Return the nll (N,) in nats of each target, 0 where it is −100; no gradient."""
        bias = self.padded_bias()
        rows = chunk_rows(hidden_ND, embedding_VD)
        return torch.cat([
            F.cross_entropy(F.linear(hidden, embedding_VD, bias).float(), targets,
                            ignore_index=IGNORED, reduction="none")
            for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
        ])  # fmt: skip


def chunk_rows(hidden_ND: Tensor, embedding_VD: Tensor) -> int:
    """Return how many rows of logits to hold at once: about 1,000 on a GPU, 32 MiB on a CPU."""
    if hidden_ND.device.type != "cpu":
        return GPU_ROWS
    return max(16, CPU_CHUNK_BYTES // (embedding_VD.shape[0] * 4))


def _nll_sum(hidden: Tensor, embedding: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, embedding, bias)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
