"""A model without experts: one transformer block per layer, with the size of a layer of experts.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from gnnmoe.config import GNNMoEConfig, Refused, unknown_name
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import (
    coupler_class,
    coupler_option_defaults,
    fields_read_by,
    register_coupler,
)

MATCHES = ("params", "flops", "none")


@register_coupler("dense")
class DenseCoupler(Coupler):
    r"""A plain transformer: each layer is one block, with a feed-forward width that replaces the experts.

    .. math:: y = x_1 - \mathrm{input}

    The layer adds its input again, and so returns the block's own output :math:`x_1`. The coupler has no
    combiner and no parameters.

    Options: with ``match`` = ``params`` or ``flops``, a layer has as many parameters, or forward FLOPs of one
    sequence of full length, as a layer of ``num_experts`` experts with the coupler ``like``. With ``match`` =
    ``none`` the block is one expert of the usual width. The width is a whole number, so a layer may differ by
    half a hidden unit, which is D + ½ parameters.

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
            raise Refused(unknown_name("match of coupler dense", match, MATCHES))
        if ":" in like or issubclass(coupler_class(like), DenseCoupler):
            raise Refused(
                f"option like of coupler dense is {like}; name a coupler that is registered and has experts."
            )
        self.ffn_dim = _matched_ffn_dim(config, match, like)

    @classmethod
    def fields_read(cls, options: dict[str, Any]) -> tuple[str, ...] | None:
        """Return the fields that the coupler ``like`` reads."""
        if options["match"] == "none":
            return ()
        like = coupler_class(options["like"])
        return fields_read_by(like, coupler_option_defaults(like))

    @classmethod
    def canonical_options(cls, config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
        """Leave out ``like`` where nothing is matched."""
        return {"match": "none"} if options["match"] == "none" else options

    def expert_shape(self) -> tuple[int, int]:
        """Return 1, for one block, and its hidden width."""
        return 1, self.ffn_dim

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Return the difference (B, L, D) between the block's output and the layer input.

        Raises:
            ValueError: ``layer_input`` is None.
        """
        return expert_outputs.mean(2) - self._required(layer_input)

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Add up the outputs of all blocks one by one; a layer has one."""
        blocks = expert_outputs.unbind(2)
        return sum(blocks[1:], blocks[0]) / len(blocks) - self._required(layer_input)

    def flops(self, tokens: int) -> int:
        """Return 0: there is no matrix product."""
        return 0

    def _required(self, layer_input: Tensor | None) -> Tensor:
        if layer_input is None:
            raise ValueError("coupler dense needs the layer input, which the layer adds again.")
        return layer_input


def _matched_ffn_dim(config: GNNMoEConfig, match: str, like: str) -> int:
    """Return the hidden width at which one block equals a layer of experts with the coupler ``like``."""
    from gnnmoe.cost import matched_ffn_dim, model_cost  # here: it builds couplers itself

    if match == "none":
        return config.expert_width
    target = model_cost(replace(config, coupler_type=like, coupler_options={}))
    return matched_ffn_dim(replace(config, coupler_options={"match": "none"}), target, match)
