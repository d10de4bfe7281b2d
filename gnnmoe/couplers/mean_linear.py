"""The mean over experts and linear maps: the function of a linear hypergraph stack, without a hypergraph."""

from __future__ import annotations

from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler, linear_flops
from gnnmoe.couplers.registry import register_coupler
from gnnmoe.mixing import mean_over_experts


@register_coupler("mean_linear")
class MeanLinearCoupler(Coupler):
    r"""The mean over experts, then ``gnn_layers`` linear maps, then the combiner.

    .. math:: h_0 = \tfrac{1}{E} \sum_e x_e, \quad h_{k+1} = \Theta_k h_k + b_k, \quad
              y = \mathrm{combiner}(h_K)

    A stack of :math:`K` unweighted hypergraph convolutions over a complete hypergraph, without activation
    and residual, computes exactly this function: each map commutes with the mean.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: this project's control of the linear hypergraph stack. With ``initialization = project`` its maps
    start with the same numbers as the maps of that stack.
    """

    config_fields = ("gnn_layers",)

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        D = config.embed_dim
        self.maps = nn.Sequential()
        for _ in range(config.gnn_layers):  # with one seed, the same numbers as in the hypergraph stack
            layer = nn.utils.skip_init(nn.Linear, D, D)
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
            self.maps.append(layer)

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        return self.combiner(self.maps(mean_over_experts(expert_outputs)))

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Map every expert alone and take the mean last, as the hypergraph stack does."""
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
