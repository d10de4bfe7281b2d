"""The mean over experts: the floor that every other coupler must beat."""

from __future__ import annotations

from torch import Tensor

from gnnmoe.couplers.base import Coupler, linear_flops
from gnnmoe.couplers.registry import register_coupler
from gnnmoe.mixing import mean_over_experts


@register_coupler("mean")
class MeanCoupler(Coupler):
    r"""The mean over experts, then the combiner that all couplers share.

    .. math:: y = \mathrm{LayerNorm}(\mathrm{GELU}(W \tfrac{1}{E} \sum_e x_e + b))

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: the ensemble mean; its only parameters are those of the combiner.
    """

    config_fields = ()

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        return self.combiner(mean_over_experts(expert_outputs))

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Add up the experts one by one."""
        total = expert_outputs[:, :, 0]
        for expert in range(1, expert_outputs.shape[2]):
            total = total + expert_outputs[:, :, expert]
        return self.combiner(total / expert_outputs.shape[2])

    def flops(self, tokens: int) -> int:
        """Count the combiner; the mean is no matrix product."""
        return linear_flops(tokens, self.config.embed_dim, self.config.embed_dim)
