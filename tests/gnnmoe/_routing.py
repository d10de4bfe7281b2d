"""What the tests of the couplers that weigh experts share.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.gnnmoe._support import make_coupler, normal

B, L, E, D = 2, 3, 4, 6
static_core = pytest.mark.core("coupler:static")
gate_core = pytest.mark.core("coupler:gate")
topk_core = pytest.mark.core("coupler:topk")
routers = pytest.mark.parametrize(
    "name", [pytest.param("gate", marks=gate_core), pytest.param("topk", marks=topk_core)]
)


def bare(name, num_experts=E, **options):
    """A coupler without its combiner: the output is the mixture itself."""
    coupler = make_coupler(coupler_type=name, num_experts=num_experts, coupler_options=options)
    coupler.combiner = nn.Identity()
    return coupler


def router_of(coupler, *rows):
    """Set the rows of the router, one for each expert, and return the coupler."""
    with torch.no_grad():
        coupler.router.weight.copy_(torch.tensor(rows, dtype=coupler.router.weight.dtype))
    return coupler


def inputs(num_experts=E, dtype=torch.float64):
    return normal(B, L, num_experts, D, dtype=dtype), normal(B, L, D, seed=51, dtype=dtype)


def tokens(*features):
    """One sequence: a row of D numbers for each token, filled up with zeros."""
    return torch.tensor([[[*row, *[0.0] * (D - len(row))] for row in features]], dtype=torch.float64)


def identity_router(coupler, num_experts=E, scale=1.0):
    """Logit e of a token is ``scale`` times its feature e."""
    return router_of(coupler, *(scale * torch.eye(num_experts, D)).tolist())
