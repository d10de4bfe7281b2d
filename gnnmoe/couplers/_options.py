"""A coupler's own options, and what of a config can change the model."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gnnmoe.config import Refused
from gnnmoe.couplers._base import COUPLER_FIELDS, Coupler
from gnnmoe.couplers._contract import FIELDS_ARE, are_fields
from gnnmoe.couplers._registry import coupler_class, lasting_name
from gnnmoe.initialization import init_coupler
from gnnmoe.naming import unknown_name
from gnnmoe.process_state import unchanged_state
from gnnmoe.strategies import strategy_identity

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


def build_coupler(config: GNNMoEConfig) -> Coupler:
    """Build the coupler that ``config`` names, with ``config.coupler_options``.

    Option values that are strings are read as the type of the option's default.

    Raises:
        Refused: an unknown coupler or option, or a value that an option cannot have; or a constructor
            that changes a setting of the whole process, seeds it, or makes parameters of another type.
    """
    name, cls, options = config.coupler_type, coupler_class(config.coupler_type), resolved_options(config)
    seed = torch.initial_seed()
    with unchanged_state(f"the constructor of coupler {name!r}"):
        coupler = cls(config, **options)
    if torch.initial_seed() != seed:
        raise Refused(
            f"the constructor of coupler {name!r} seeds torch's random numbers, so that runs with different "
            "seeds would start alike. Draw from torch's generator as it is, or from a torch.Generator."
        )
    refuse_other_types(coupler, torch.get_default_dtype(), f"coupler {name!r}")
    init_coupler(coupler, config.initialization)
    return coupler


def refuse_other_types(module: nn.Module, wanted: torch.dtype, whose: str) -> None:
    """Refuse a parameter or a buffer of floating-point numbers that are not of the type ``wanted``.

    Raises:
        Refused: naming the first one, its type, and what to do.
    """
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != wanted:
            raise Refused(
                f"{whose} has {name} in {tensor.dtype}; parameters and buffers must be {wanted}, in every "
                "precision. Make it without dtype=, and cast it where it is used."
            )


def coupler_option_defaults(cls: type[Coupler]) -> dict[str, Any]:
    """Return the coupler's own options with their defaults: its keyword-only parameters."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def resolved_options(config: GNNMoEConfig) -> dict[str, Any]:
    """Return every option of the coupler by name: the config's own, typed, and the defaults.

    ``k`` counts for every coupler, ``NAME.k`` for the coupler NAME only; ``k`` wins over ``NAME.k``.
    Options of other couplers are checked all the same, so that a misspelt one is never swallowed.

    Raises:
        Refused: as ``build_coupler``.
    """
    cls = coupler_class(config.coupler_type)
    plain: dict[str, Any] = {}
    prefixed: dict[str, Any] = {}
    for key, value in config.coupler_options.items():
        owner, option = _owner(key, config.coupler_type, cls), key.rpartition(".")[2]
        typed = _typed(owner, option, value)
        if owner is cls:
            (prefixed if "." in key else plain)[option] = typed
    return {**coupler_option_defaults(cls), **prefixed, **plain}


def _owner(key: str, coupler_type: str, cls: type[Coupler]) -> type[Coupler]:
    """Return the coupler that the option ``key`` is for: the one at hand, or that of its prefix."""
    prefix, dot, _ = key.rpartition(".")
    if not dot or prefix in (coupler_type, cls.name):
        return cls
    try:
        return coupler_class(prefix)
    except Refused as error:
        raise Refused(f"coupler option {key!r}: {error}") from error


def _typed(cls: type[Coupler], option: str, value: Any) -> Any:
    defaults = coupler_option_defaults(cls)
    if option not in defaults:
        raise Refused(unknown_name(f"option of coupler {cls.name}", option, defaults))
    return _as_type_of(defaults[option], value, f"option {option} of coupler {cls.name}")


def coupler_identity(config: GNNMoEConfig) -> dict[str, Any]:
    """Return the fields of ``config`` that can change the model: those its coupler never reads are out.

    ``vocab_size`` is out too, since it follows from the data. A coupler from a file counts by the name of
    its class, since an edited coupler stays the same run; hyperedges from a file count by content. Options
    and strategies count in one form for all that give the same model.

    Raises:
        Refused: as ``build_coupler``, but for values that only the coupler itself refuses.
    """
    cls, options = coupler_class(config.coupler_type), resolved_options(config)
    read = fields_read_by(cls, options)
    unread = set(COUPLER_FIELDS) - set(COUPLER_FIELDS if read is None else read)
    fields = {
        **config.to_dict(),
        "coupler_type": lasting_name(config.coupler_type),
        "coupler_options": _canonical(cls, config, options),
        "ffn_dim": config.expert_width,
    }
    if "static_hyperedge_strategy" not in unread:
        strategy, num_experts = config.static_hyperedge_strategy, config.num_experts
        fields["static_hyperedge_strategy"] = strategy_identity(strategy, num_experts)
    if config.initialization == "project":  # as were all runs from before there was a choice
        del fields["initialization"]
    return {name: value for name, value in fields.items() if name not in unread | {"vocab_size"}}


def fields_read_by(cls: type[Coupler], options: dict[str, Any]) -> tuple[str, ...] | None:
    """Return which of ``COUPLER_FIELDS`` the coupler reads; None: perhaps all of them.

    Only what stands in the class itself counts: what it inherits was said of another class.

    Raises:
        Refused: its ``fields_read`` gives something else.
    """
    if "fields_read" not in vars(cls):
        return vars(cls).get("config_fields")
    fields = cls.fields_read(options)
    if not are_fields(fields):
        raise Refused(f"fields_read of coupler {cls.name} gives {fields!r}; it must be {FIELDS_ARE}.")
    return fields


def _canonical(cls: type[Coupler], config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options in the form that the class itself, not one it inherits from, calls canonical."""
    if "canonical_options" not in vars(cls):
        return options
    found = cls.canonical_options(config, dict(options))
    if not isinstance(found, dict) or not found.keys() <= options.keys():
        raise Refused(
            f"canonical_options of coupler {cls.name} gives {found!r}; it must be some of {options}."
        )
    return found


def _as_type_of(default: Any, value: Any, what: str) -> Any:
    """Return ``value`` as the type of ``default``: text is read, other types must fit already."""
    expected = type(default)
    if default is None or type(value) is expected:
        return value
    if isinstance(value, str):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        read = words.__getitem__ if expected is bool else expected
        try:
            return read(value.lower() if expected is bool else value)
        except (KeyError, TypeError, ValueError):
            pass
    elif expected is float and type(value) is int:
        return float(value)
    kind = "true or false" if expected is bool else f"of type {expected.__name__}"
    raise Refused(f"{what} is {value!r}; it must be {kind}.")
