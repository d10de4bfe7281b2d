"""A coupler of your own: ``python -m bench.check --coupler examples/twenty_line_coupler.py:NormCoupler``."""

import torch
from torch import nn

from gnnmoe import Coupler


class NormCoupler(Coupler):
    """The expert with the largest output counts most: weights are a softmax of the norms."""

    def __init__(self, config):
        super().__init__(config)
        self.tau = nn.Parameter(torch.ones(()))

    def forward(self, expert_outputs, layer_input=None):
        """Mix (B, L, E, D) into (B, L, D); couplers that route tokens read ``layer_input`` (B, L, D)."""
        del layer_input
        loudness = expert_outputs.norm(dim=-1, keepdim=True) / expert_outputs.shape[-1] ** 0.5
        weights = torch.softmax(self.tau * loudness, dim=2)
        return self.combiner((weights * expert_outputs).sum(2))
