"""GNN-MoE language models: experts on every token, and a coupler that mixes their outputs.

Names are imported on first use, so that a command's ``--help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig, Refused
    from gnnmoe.couplers.base import Coupler
    from gnnmoe.couplers.gnn import GNNExpertCoupler
    from gnnmoe.couplers.hgnn import HGNNExpertCoupler
    from gnnmoe.couplers.registry import build_coupler, coupler_names, register_coupler
    from gnnmoe.experts import BatchedExperts, ExpertBlock
    from gnnmoe.hypergraph.backends import PyGHypergraphConvWrapper
    from gnnmoe.hypergraph.strategies import register_strategy
    from gnnmoe.layers.base import HypergraphLayer, register_layer
    from gnnmoe.model import GNNMoELayer, GNNMoEModel

_HOME = {
    "BatchedExperts": "gnnmoe.experts",
    "GNNMoEConfig": "gnnmoe.config",
    "Refused": "gnnmoe.config",
    "Coupler": "gnnmoe.couplers.base",
    "build_coupler": "gnnmoe.couplers.registry",
    "coupler_names": "gnnmoe.couplers.registry",
    "register_coupler": "gnnmoe.couplers.registry",
    "HypergraphLayer": "gnnmoe.layers.base",
    "register_layer": "gnnmoe.layers.base",
    "register_strategy": "gnnmoe.hypergraph.strategies",
    "GNNExpertCoupler": "gnnmoe.couplers.gnn",
    "HGNNExpertCoupler": "gnnmoe.couplers.hgnn",
    "ExpertBlock": "gnnmoe.experts",
    "PyGHypergraphConvWrapper": "gnnmoe.hypergraph.backends",
    "GNNMoELayer": "gnnmoe.model",
    "GNNMoEModel": "gnnmoe.model",
}

__all__ = [
    "BatchedExperts",
    "Coupler",
    "ExpertBlock",
    "GNNExpertCoupler",
    "GNNMoEConfig",
    "GNNMoELayer",
    "GNNMoEModel",
    "HGNNExpertCoupler",
    "HypergraphLayer",
    "PyGHypergraphConvWrapper",
    "Refused",
    "build_coupler",
    "coupler_names",
    "register_coupler",
    "register_layer",
    "register_strategy",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'gnnmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
