"""One expert: a pre-norm transformer block that sees every token; and all of a layer, one by one.

Shapes: B batch, L length, E experts, D width, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


class ExpertBlock(nn.Module):
    """Causal self-attention and a feed-forward net, each with its residual.

    Attention is causal without a mask tensor, so padding on the right is inert by itself.
    """

    def __init__(self, config: GNNMoEConfig, ffn_dim: int | None = None) -> None:
        super().__init__()
        D, ffn_dim = config.embed_dim, ffn_dim or config.expert_width
        self.num_heads, self.dropout_rate = config.num_heads, config.dropout_rate
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, ffn_dim), nn.Linear(ffn_dim, D)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D) for an input of the same shape; under autocast in the type of its products."""
        x_BLD = x_BLD + self._dropout(self._attention(self.norm1(x_BLD)))
        hidden = self._dropout(F.gelu(self.up(self.norm2(x_BLD))))
        added = self._dropout(self.down(hidden))
        return (x_BLD + added).to(added.dtype)

    def _attention(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        q, k, v = self.qkv(x_BLD).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(B, L, D))

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_rate, self.training) if self.dropout_rate else x

    @staticmethod
    def flops(config: GNNMoEConfig, batch: int, length: int, ffn_dim: int | None = None) -> int:
        """Return the FLOPs of a forward: 2 a multiply-add, attention counted whole although it is causal."""
        D = config.embed_dim
        maps = 4 * D * D + 2 * D * (ffn_dim or config.expert_width)
        return 2 * batch * length * (maps + 2 * length * D)


class ExpertLoop(nn.ModuleList):
    """The experts of a layer, one after the other: the reference for ``BatchedExperts``."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return what each expert makes of ``x`` (B, L, D): (B, L, E, D), a view of (E, B, L, D)."""
        return torch.stack([expert(x_BLD) for expert in self]).permute(1, 2, 0, 3)
