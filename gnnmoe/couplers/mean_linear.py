"""The mean over experts and linear maps: what a linear hypergraph stack is, without the hypergraph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from gnnmoe.couplers._base import Coupler, linear_flops
from gnnmoe.couplers._registry import register_coupler
from gnnmoe.mixing import mean_over_experts

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


@register_coupler("mean_linear")
class MeanLinearCoupler(Coupler):
    r"""The mean over experts, then ``gnn_layers`` linear maps, then the combiner.

    .. math:: h_0 = \tfrac{1}{E} \sum_e x_e, \quad h_{k+1} = \Theta_k h_k + b_k, \quad
              y = \mathrm{combiner}(h_K)

    A stack of :math:`K` unweighted hypergraph convolutions over a complete hypergraph, without
    activation and residual, computes exactly this: each map commutes with the mean.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: this project's control of the linear hypergraph stack; with ``initialization = project`` its
    maps start as that stack's do.
    """

    config_fields = ("gnn_layers",)

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        D = config.embed_dim
        self.maps = nn.Sequential()
        for _ in range(config.gnn_layers):  # at one seed the very numbers that the hypergraph stack draws
            layer = nn.utils.skip_init(nn.Linear, D, D)
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            self.maps.append(layer)

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        del layer_input
        return self.combiner(self.maps(mean_over_experts(expert_outputs)))

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Map every expert by itself and take the mean last, as the hypergraph stack does."""
        del layer_input
        experts = expert_outputs.unbind(2)
        total = expert_outputs.new_zeros(())
        for x in experts:
            for layer in self.maps:
                x = layer(x)
            total = total + x
        return self.combiner(total / len(experts))

    def flops(self, tokens: int) -> int:
        """Count the linear maps and the combiner."""
        D = self.config.embed_dim
        return (len(self.maps) + 1) * linear_flops(tokens, D, D)
