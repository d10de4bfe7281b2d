"""Couplers, one file each. To add one, copy ``mean.py``: it is found by being here."""

from gnnmoe.couplers._base import Coupler, combiner, effective_mixing, linear_flops
from gnnmoe.couplers._contract import check_contract
from gnnmoe.couplers._loading import executed_again, executed_source, files_read_once, is_file
from gnnmoe.couplers._options import (
    build_coupler,
    coupler_identity,
    coupler_option_defaults,
    refuse_other_types,
    resolved_options,
)
from gnnmoe.couplers._registry import coupler_class, coupler_names, register_coupler

__all__ = [
    "Coupler",
    "build_coupler",
    "check_contract",
    "combiner",
    "coupler_class",
    "coupler_identity",
    "coupler_names",
    "coupler_option_defaults",
    "effective_mixing",
    "executed_again",
    "executed_source",
    "files_read_once",
    "is_file",
    "linear_flops",
    "refuse_other_types",
    "register_coupler",
    "resolved_options",
]
