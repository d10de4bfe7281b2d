"""The parameters and FLOPs of a model, computed from its config without building the model.

Shapes: L length, E experts, D width, H hidden width of an expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache

import torch

from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.experts import ExpertBlock

QUANTITIES = ("params", "flops")


@dataclass(frozen=True)
class Cost:
    """The cost of a model: ``params``, and ``flops`` of a forward with logits on one sequence of full length.

    ``flops`` is None where a coupler has no formula for its FLOPs.
    """

    params: int
    flops: int | None


def model_cost(config: GNNMoEConfig) -> Cost:
    """Return the cost of the model that ``config`` describes.

    Raises:
        Refused: there is no such coupler, strategy or option.
    """
    L, D, V = config.max_seq_length, config.embed_dim, config.vocab_size
    coupler = _coupler_cost(json.dumps(config.to_dict(), sort_keys=True))
    block = _block_cost(config, coupler.ffn_dim)
    trunk = Cost(config.padded_vocab_size * D + L * D + 2 * D + V, 2 * L * D * V)
    params = trunk.params + config.num_layers * (coupler.params + coupler.count * block.params)
    if coupler.flops is None or block.flops is None or trunk.flops is None:
        return Cost(params, None)
    return Cost(params, trunk.flops + config.num_layers * (coupler.flops + coupler.count * block.flops))


def matched_ffn_dim(config: GNNMoEConfig, target: Cost, quantity: str) -> int:
    """Return the hidden width H of the experts at which ``config`` costs as much as ``target``.

    ``quantity``: ``params`` or ``flops``. The width is the nearest whole number and at least 1. A difference
    in cost may remain; the caller shows it.

    Raises:
        Refused: the quantity is ``flops``, and a coupler has no formula for its FLOPs.
    """
    asked = getattr(target, quantity)
    one, two = (getattr(model_cost(replace(config, ffn_dim=width)), quantity) for width in (1, 2))
    if asked is None or one is None or two is None:
        raise Refused(
            f"coupler {config.coupler_type}, or the one to match, does not say its FLOPs; match params."
        )
    return max(1, 1 + round((asked - one) / (two - one)))


def _block_cost(config: GNNMoEConfig, ffn_dim: int) -> Cost:
    D = config.embed_dim
    params = 4 * D * D + 9 * D + ffn_dim * (2 * D + 1)  # attention, two norms, and the feed-forward part
    return Cost(params, ExpertBlock.flops(config, 1, config.max_seq_length, ffn_dim))


@dataclass(frozen=True)
class _CouplerCost:
    params: int
    flops: int | None
    count: int
    ffn_dim: int


@cache
def _coupler_cost(config_json: str) -> _CouplerCost:
    """Return the cost of the coupler of a config, given as JSON, so that each coupler is built once."""
    config = GNNMoEConfig(**json.loads(config_json))
    with torch.device("meta"):
        coupler = build_coupler(config)
    count, ffn_dim = coupler.expert_shape()
    params = sum(p.numel() for p in coupler.parameters())
    return _CouplerCost(params, coupler.flops(config.max_seq_length), count, ffn_dim)
