"""One learned weight for each expert, the same for every token.

Shapes: B batch, L length, N = B·L tokens, E experts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler, linear_flops
from gnnmoe.couplers.registry import register_coupler
from gnnmoe.mixing import mix, mix_by_token


@register_coupler("static")
class StaticCoupler(Coupler):
    r"""A learned weighted mean of the experts, then the combiner.

    .. math:: y = \mathrm{combiner}(\sum_e \mathrm{softmax}(a)_e\, x_e)

    :math:`a` starts at 0, so the coupler starts as the mean. A stack of weighted hypergraph convolutions
    without activation also mixes the experts with one set of weights. Except for its linear maps, that stack
    is this coupler.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: this project's control of the weighted linear hypergraph stack.
    """

    config_fields = ()

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        self.expert_logits = nn.Parameter(torch.zeros(config.num_experts))  # a

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        B, L, E, D = expert_outputs.shape
        weights_1E = self.expert_logits.softmax(0)[None]
        return self.combiner(mix(weights_1E, expert_outputs.reshape(B * L, E, D)).view(B, L, D))

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Add up the experts one by one, each times exp(a_e), and divide by the sum of these factors."""
        total, scale = expert_outputs.new_zeros(()), expert_outputs.new_zeros(())
        for logit, x in zip(self.expert_logits, expert_outputs.unbind(2), strict=True):
            total, scale = total + logit.exp() * x, scale + logit.exp()
        return self.combiner(total / scale)

    def flops(self, tokens: int) -> int:
        """Count the weighted sum and the combiner."""
        E, D = self.config.num_experts, self.config.embed_dim
        return linear_flops(tokens, E, D) + linear_flops(tokens, D, D)

    def static_communication(self) -> dict[str, Tensor]:
        """Return ``expert_weights`` (E), which sum to 1."""
        return {"expert_weights": self.expert_logits.softmax(0)}

    def inert_parameters(self) -> dict[str, str]:
        """Declare the weight of a single expert inert, since it is 1."""
        if self.config.num_experts > 1:
            return {}
        return {"expert_logits": "the weight of a single expert is always 1"}


def weighted_sum(weights_BLE: Tensor, x_BLED: Tensor) -> Tensor:
    """Return Σ_e w_e x_e (B, L, D) in the type of ``x``, without a product (B, L, E, D) in memory."""
    B, L, E, D = x_BLED.shape
    weights_N1E, x_NED = weights_BLE.reshape(B * L, 1, E), x_BLED.reshape(B * L, E, D)
    return mix_by_token(weights_N1E, x_NED).view(B, L, D)
