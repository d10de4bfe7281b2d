"""A coupler that fails on one rank, when a test says so."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from gnnmoe.couplers.mean import MeanCoupler


class FailingCoupler(MeanCoupler):
    r"""The mean of the experts, until the file FAIL_WHEN is there: then memory runs out on rank 1.

    .. math:: y = \mathrm{LayerNorm}(\mathrm{GELU}(W \tfrac{1}{E} \sum_e x_e + b))

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: the mean coupler.
    """

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        if os.environ.get("RANK") == "1" and Path(os.environ["FAIL_WHEN"]).exists():
            raise torch.OutOfMemoryError("memory ran out, for the test's sake")
        return super().forward(expert_outputs, layer_input)
