"""One layer: all experts on every token, one coupler, one residual."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gnnmoe.batched_experts import BatchedExperts
from gnnmoe.couplers import build_coupler
from gnnmoe.experts import ExpertBlock, ExpertLoop
from gnnmoe.initialization import init_experts
from gnnmoe.seeds import RandomStreams

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


class GNNMoELayer(nn.Module):
    """``x + coupler(experts(x), x)``; experts and coupler draw from streams of their own.

    ``experts``: ``loop``, one after the other, or ``batched``, all at once; the same numbers in both.
    """

    def __init__(
        self, config: GNNMoEConfig, streams: RandomStreams | None = None, *, experts: str = "loop"
    ) -> None:
        super().__init__()
        streams = streams or RandomStreams(int(torch.randint(2**31, ())))
        with streams("init.coupler"):
            coupler = build_coupler(config)
        count, ffn_dim = coupler.expert_shape()
        with streams("init.experts"):
            blocks = [ExpertBlock(config, ffn_dim) for _ in range(count)]
            init_experts(blocks, config.initialization)
        self.experts = BatchedExperts(blocks) if experts == "batched" else ExpertLoop(blocks)
        self.coupler = coupler

    def expert_outputs(self, x_BLD: Tensor) -> Tensor:
        """Return what each expert makes of ``x`` (B, L, D): (B, L, E, D), a view of (E, B, L, D)."""
        return self.experts(x_BLD)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D) for an input of the same shape."""
        return self.forward_with_auxiliary(x_BLD)[0]

    def forward_with_auxiliary(self, x_BLD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (B, L, D) and, in train mode, the coupler's auxiliary losses by name."""
        expert_outputs_BLED = self.expert_outputs(x_BLD)
        auxiliary = self.coupler.auxiliary_losses(expert_outputs_BLED, x_BLD) if self.training else {}
        return x_BLD + self.coupler(expert_outputs_BLED, x_BLD), auxiliary

    def flops(self, batch: int, length: int) -> int | None:
        """Return the FLOPs of a forward, or None where the coupler does not say its own."""
        own = self.coupler.flops(batch * length)
        if own is None:
            return None
        count, ffn_dim = self.coupler.expert_shape()
        return own + count * ExpertBlock.flops(self.coupler.config, batch, length, ffn_dim)
