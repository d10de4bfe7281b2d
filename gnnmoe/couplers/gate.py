"""The dense mixture of experts: a gate reads the layer's input and weighs every expert.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler, linear_flops
from gnnmoe.couplers.registry import register_coupler
from gnnmoe.couplers.static import weighted_sum

ROUTER_STD = 0.02


@register_coupler("gate")
class GateCoupler(Coupler):
    r"""A weighted mean of the experts, with weights that depend on the token, then the combiner.

    .. math:: y = \mathrm{combiner}(\sum_e \mathrm{softmax}(W_g u)_e\, x_e)

    with :math:`u` (B, L, D) the layer's input and :math:`W_g` without bias, drawn from N(0, 0.02²). The
    logits are computed in float32 or a wider type, as in ``topk``.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: Jacobs, Jordan, Nowlan and Hinton, "Adaptive mixtures of local experts", 1991.
    """

    config_fields = ()

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        self.router = nn.Linear(config.embed_dim, config.num_experts, bias=False)  # W_g
        nn.init.normal_(self.router.weight, std=ROUTER_STD)

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D), by ``layer_input`` (B, L, D)."""
        weights_BLE = self.token_weights(expert_outputs, layer_input)
        return self.combiner(weighted_sum(weights_BLE, expert_outputs))

    def _logits(self, layer_input: Tensor | None) -> Tensor:
        """Return the logits (B, L, E) in float32 or a wider type, under autocast too (as in Switch).

        In bf16 nearly equal logits of two experts would often round to the same number.
        """
        layer_input = self._needed(layer_input)
        dtype = torch.promote_types(layer_input.dtype, torch.float32)
        with torch.autocast(layer_input.device.type, enabled=False):
            return nn.functional.linear(layer_input.to(dtype), self.router.weight.to(dtype))

    def _needed(self, layer_input: Tensor | None) -> Tensor:
        """Return ``layer_input`` (B, L, D).

        Raises:
            ValueError: it is None.
        """
        if layer_input is None:
            raise ValueError(
                f"coupler {self.name!r} routes by layer_input, which is None; call it with what the experts "
                "read, (B, L, D)."
            )
        return layer_input

    def _weights(self, logits_BLE: Tensor) -> Tensor:
        """Return the weight of each expert (B, L, E)."""
        return logits_BLE.softmax(-1)

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Add up the experts one by one, each times exp of its logit; divide by the sum of these factors."""
        layer_input = self._needed(layer_input)
        total, scale = expert_outputs.new_zeros(()), expert_outputs.new_zeros(())
        for w, x in zip(self.router.weight, expert_outputs.unbind(2), strict=True):
            share = (layer_input * w).sum(-1, keepdim=True).exp()
            total, scale = total + share * x, scale + share
        return self.combiner(total / scale)

    def flops(self, tokens: int) -> int:
        """Count the logits, the weighted sum over all experts and the combiner."""
        E, D = self.config.num_experts, self.config.embed_dim
        return linear_flops(tokens, D, E) + linear_flops(tokens, E, D) + linear_flops(tokens, D, D)

    def token_weights(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Return the weight of each expert for each token (B, L, E), by ``layer_input``."""
        return self._weights(self._logits(layer_input))

    @torch.no_grad()
    def communication(
        self, expert_outputs: Tensor | None = None, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return, with ``expert_outputs``, also ``gate_weights`` (E): the mean weights over these tokens."""
        parts = super().communication(expert_outputs, layer_input)
        return parts if expert_outputs is None else {**parts, **self._routing(self._logits(layer_input))}

    def _routing(self, logits_BLE: Tensor) -> dict[str, Tensor]:
        """Return what ``communication`` adds, averaged over the tokens."""
        return {"gate_weights": self._weights(logits_BLE).mean((0, 1))}

    def inert_parameters(self) -> dict[str, str]:
        """Declare the gate of a single expert inert, since its weight is 1."""
        if self.config.num_experts > 1:
            return {}
        return {"router.weight": "the weight of a single expert is always 1"}
