"""Couplers, one file each. To add one, copy ``mean.py``: it is found by being here."""

from gnnmoe.couplers._base import Coupler, combiner, effective_mixing, linear_flops
from gnnmoe.couplers._registry import (
    build_coupler,
    coupler_class,
    coupler_identity,
    coupler_names,
    coupler_option_defaults,
    register_coupler,
)

__all__ = [
    "Coupler",
    "build_coupler",
    "combiner",
    "coupler_class",
    "coupler_identity",
    "coupler_names",
    "coupler_option_defaults",
    "effective_mixing",
    "linear_flops",
    "register_coupler",
]
