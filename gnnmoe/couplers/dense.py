"""No experts to couple: one transformer block, as large as the model with experts.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gnnmoe.couplers._base import Coupler
from gnnmoe.couplers._options import build_coupler
from gnnmoe.couplers._registry import coupler_class, register_coupler
from gnnmoe.experts import ExpertBlock
from gnnmoe.naming import unknown_name

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig

MATCHES = ("params", "flops", "none")


@register_coupler("dense")
class DenseCoupler(Coupler):
    r"""A plain transformer: each layer is one block, whose feed-forward width makes up for the experts.

    .. math:: y = x_1 - \mathrm{input}

    The layer adds its input again, so that it returns the block's own output :math:`x_1`. There is no
    combiner and no parameter.

    Options: ``match``: the block is as wide as makes a layer equal, in ``params`` or in forward ``flops``
    (of one sequence of full length), to a layer of ``num_experts`` experts with the coupler ``like``;
    ``none``: one expert of its usual width. The width is a whole number, so half a hidden unit, D + ½
    parameters a layer, may be missing or too many.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`; the layer gives E = 1
        - **output:** :math:`(B, L, D)`

    Source: the decoder of Vaswani et al., "Attention is all you need", 2017 (arXiv:1706.03762), with the
    norm in front.
    """

    def __init__(self, config: GNNMoEConfig, *, match: str = "params", like: str = "mean") -> None:
        super().__init__(config)
        del self.combiner
        if match not in MATCHES:
            raise ValueError(unknown_name("match of coupler dense", match, MATCHES))
        if ":" in like or issubclass(coupler_class(like), DenseCoupler):
            raise ValueError(
                f"option like of coupler dense is {like}; name a coupler that is registered and has experts."
            )
        self.ffn_dim = matched_ffn_dim(replace(config, coupler_type=like, coupler_options={}), match)

    @classmethod
    def fields_read(cls, options: dict[str, Any]) -> tuple[str, ...] | None:
        """Return what the coupler reads that it is matched to."""
        return () if options["match"] == "none" else coupler_class(options["like"]).config_fields

    def expert_shape(self) -> tuple[int, int]:
        """Return one block and its hidden width."""
        return 1, self.ffn_dim

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Return what the block adds to the layer input (B, L, D).

        Raises:
            ValueError: there is no layer input.
        """
        return expert_outputs.mean(2) - self._required(layer_input)

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Add the blocks given up one by one; a layer gives one."""
        blocks = expert_outputs.unbind(2)
        return sum(blocks[1:], blocks[0]) / len(blocks) - self._required(layer_input)

    def flops(self, tokens: int) -> int:
        """Return 0: there is no matrix product."""
        del tokens
        return 0

    def _required(self, layer_input: Tensor | None) -> Tensor:
        if layer_input is None:
            raise ValueError("coupler dense needs the layer input, which the layer adds again.")
        return layer_input


def matched_ffn_dim(config: GNNMoEConfig, match: str) -> int:
    """Return the hidden width at which one block equals a layer of ``config`` in params or flops."""
    if match == "none":
        return config.expert_width
    with torch.device("meta"):
        coupler = build_coupler(config)
        if match == "params":
            own = sum(p.numel() for p in coupler.parameters())
            return _solved(own, config, lambda width: _parameters(config, width))
        own = coupler.flops(config.max_seq_length)
        if own is None:
            raise ValueError(f"coupler {config.coupler_type} does not say its FLOPs; match params instead.")
        return _solved(own, config, lambda width: ExpertBlock.flops(config, 1, config.max_seq_length, width))


def _solved(own: int, config: GNNMoEConfig, cost: Callable[[int], int]) -> int:
    """Return the width whose cost, which grows evenly with it, is nearest to all experts and the coupler."""
    target = config.num_experts * cost(config.expert_width) + own
    return max(1, 1 + round((target - cost(1)) / (cost(2) - cost(1))))


def _parameters(config: GNNMoEConfig, ffn_dim: int) -> int:
    return sum(p.numel() for p in ExpertBlock(config, ffn_dim).parameters())
