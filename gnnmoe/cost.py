"""The parameters and FLOPs of a model, computed from its config without building the model.

Shapes: L length, E experts, D width, H hidden width of an expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache

from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.registry import build_coupler, without_memory
from gnnmoe.experts import ExpertBlock

QUANTITIES = ("params", "flops")
BLOCK_BYTES = 24 * 1024
"""What one expert's block takes as Python objects, beside its numbers; measured with torch 2.13."""


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
    coupler = cost_of_coupler(config)
    block = _block_cost(config, coupler.ffn_dim)
    trunk = Cost(config.padded_vocab_size * D + L * D + 2 * D + V, 2 * L * D * V)
    params = trunk.params + config.num_layers * (coupler.params + coupler.count * block.params)
    if coupler.flops is None or block.flops is None or trunk.flops is None:
        return Cost(params, None)
    return Cost(params, trunk.flops + config.num_layers * (coupler.flops + coupler.count * block.flops))


def least_training_bytes(config: GNNMoEConfig, *, rows: int = 1, number_bytes: int = 4) -> int:
    """Return bytes that a training step on ``rows`` sequences of full length takes at least, under AdamW.

    Parameters are float32 and have a gradient and two moments. Each expert keeps its normalised inputs and
    its hidden layer for the backward pass, in numbers of ``number_bytes``. A coupler that cannot be built
    without numbers counts nothing.

    Raises:
        Refused: as ``model_cost``.
    """
    try:
        coupler, params = cost_of_coupler(config), model_cost(config).params
    except Refused:
        raise
    except Exception:  # the coupler may be anybody's
        return 16 * config.padded_vocab_size * config.embed_dim
    kept = coupler.count * (2 * config.embed_dim + coupler.ffn_dim)
    return 16 * params + number_bytes * config.num_layers * rows * config.max_seq_length * kept


def expert_object_bytes(config: GNNMoEConfig) -> int:
    """Return the bytes of host memory that the experts of a model take as Python objects, without numbers.

    Raises:
        Refused: as ``model_cost``.
    """
    try:
        experts = cost_of_coupler(config).count
    except Refused:
        raise
    except Exception:  # the coupler may be anybody's
        experts = config.num_experts
    return BLOCK_BYTES * config.num_layers * experts


def least_coupler_parameters(config: GNNMoEConfig) -> int:
    """Return the parameters of the coupler; 0 where it cannot be built without numbers.

    Raises:
        Refused: as ``model_cost``.
    """
    try:
        return cost_of_coupler(config).params
    except Refused:
        raise
    except Exception:  # the coupler may be anybody's
        return 0


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
class CouplerCost:
    """The cost of one coupler alone, and the experts under it: how many, and their hidden width."""

    params: int
    flops: int | None
    count: int
    ffn_dim: int


def cost_of_coupler(config: GNNMoEConfig) -> CouplerCost:
    """Return the cost of the coupler that ``config`` names; raises as ``model_cost``."""
    return _coupler_cost(json.dumps(config.to_dict(), sort_keys=True))


@cache
def _coupler_cost(config_json: str) -> CouplerCost:
    """Return the cost of the coupler of a config, given as JSON, so that each coupler is built once."""
    config = GNNMoEConfig(**json.loads(config_json))
    with without_memory(config):
        coupler = build_coupler(config)
    count, ffn_dim = coupler.expert_shape()
    params = sum(p.numel() for p in coupler.parameters())
    return CouplerCost(params, coupler.flops(config.max_seq_length), count, ffn_dim)
