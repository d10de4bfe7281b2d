"""A coupler of your own in twenty lines, in a file that may lie anywhere.

``python -m bench.check --coupler examples/twenty_line_coupler.py:NormCoupler``
"""

import torch
from torch import nn

from gnnmoe import Coupler


class NormCoupler(Coupler):
    r"""The loudest expert counts most: weights are the softmax of the experts' norms.

    .. math:: y = f(\sum_e a_e x_e), \quad a = \mathrm{softmax}_e(\tau \lVert x_e \rVert / \sqrt{D})

    where :math:`f` is the combiner that all couplers share and :math:`\tau` is learned, 1 at the start.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: an example of this project's.
    """

    config_fields = ()

    def __init__(self, config):
        super().__init__(config)
        self.tau = nn.Parameter(torch.ones(()))

    def forward(self, expert_outputs, layer_input=None):
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        del layer_input
        loudness = expert_outputs.norm(dim=-1, keepdim=True) / expert_outputs.shape[-1] ** 0.5
        weights = torch.softmax(self.tau * loudness, dim=2)
        return self.combiner((weights * expert_outputs).sum(2))

    def reference(self, expert_outputs, layer_input=None):
        """Add the experts up one by one, each by its own weight."""
        del layer_input
        loud = [(self.tau * x.square().mean(-1, keepdim=True).sqrt()).exp() for x in expert_outputs.unbind(2)]
        weighted = [a * x for a, x in zip(loud, expert_outputs.unbind(2), strict=True)]
        return self.combiner(sum(weighted) / sum(loud))

    def inert_parameters(self):
        """Say what can have no gradient: a softmax over one expert is 1."""
        return {"tau": "one expert has all the weight"} if self.config.num_experts == 1 else {}
