"""Which couplers there are, and what options and config make of a class.

A coupler is a file in this folder, an entry point of the group ``gnnmoe.couplers``, ``package.module:Class``
or ``path/to/file.py:Class``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from gnnmoe.config import GNNMoEConfig, Refused, brief, unknown_name
from gnnmoe.couplers.base import COUPLER_FIELDS, FIELDS_ARE, Coupler, are_fields, check_contract
from gnnmoe.discovery import Loaded, Registry, executed_again
from gnnmoe.experts import init_weights
from gnnmoe.hypergraph.strategies import strategy_function, strategy_identity
from gnnmoe.layers.base import LAYERS
from gnnmoe.process_state import unchanged_state

COUPLERS: Registry[type[Coupler]] = Registry(
    "coupler", "gnnmoe.couplers", "gnnmoe.couplers", check_contract,
    lambda thing: inspect.isclass(thing) and issubclass(thing, Coupler) and thing is not Coupler,
)  # fmt: skip
"""The values of ``coupler_type``."""
MOST = 10**9
"""The largest option of a coupler that is a whole number."""


def register_coupler(name: str) -> Callable[[Loaded], Loaded]:
    """Return a decorator that makes a class available as ``--coupler name``.

    Raises:
        Refused: another class has this name, or the class breaks the contract.
    """
    return COUPLERS.registering(name)


def coupler_names() -> list[str]:
    """Return the names of all couplers in this folder and in installed packages, sorted."""
    return list(COUPLERS)


def coupler_class(name: str) -> type[Coupler]:
    """Return the class behind a registered name, ``package.module:Class`` or ``path/to/file.py:Class``.

    Raises:
        Refused: there is no such name, module, file or class, or the class breaks the contract.
    """
    return COUPLERS.find(name)


# --- options -------------------------------------------------------------------------------------------


def build_coupler(config: GNNMoEConfig) -> Coupler:
    """Build the coupler that ``config`` names, with ``config.coupler_options``.

    An option value that is text is read as the type of the option's default. With the initialization
    ``original`` every ``nn.Linear`` and ``nn.Embedding`` is drawn again by ``init_weights``; bare parameters
    keep the start that the coupler's class gives them.

    Raises:
        Refused: the coupler or an option is unknown, an option cannot have its value, or the constructor
            changes a setting of the whole process, seeds it, or makes parameters of another type.
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
    return coupler.apply(init_weights) if config.initialization == "original" else coupler


@contextmanager
def without_memory(config: GNNMoEConfig) -> Iterator[None]:
    """Build modules of ``config`` without numbers inside the block: on torch's device ``meta``.

    Files of the user are executed again for the block, so that a tensor without numbers which they keep, as
    in a cache, is not met outside it. torch's random state stays.

    Raises:
        Refused: there is no such coupler.
    """
    coupler_class(config.coupler_type)  # a module that is not imported yet makes its tensors with numbers
    outside = config.coupler_type, config.hgnn_conv_type, config.static_hyperedge_strategy
    with executed_again(*outside), torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def refuse_other_types(module: nn.Module, wanted: torch.dtype, whose: str) -> None:
    """Refuse a floating-point parameter or buffer of another type than ``wanted``.

    Raises:
        Refused: there is one; names the first, its type, and what to do.
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
    """Return every option of the coupler by name: the values of the config, typed, or the defaults.

    The option ``k`` counts for every coupler, ``NAME.k`` for the coupler NAME only; ``k`` wins over
    ``NAME.k``. Options of other couplers are checked too, so that a misspelt option is always refused.

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
    """Return the coupler to which the option ``key`` belongs: ``cls``, or the coupler of its prefix."""
    prefix, dot, option = key.rpartition(".")
    if not dot or prefix in (coupler_type, cls.name):
        return cls
    try:
        return coupler_class(prefix)
    except Refused as error:
        hint = f"Name a coupler from a file with its path: path/file.py:Class.{option}."
        raise Refused(f"coupler option {brief(key)}: {error}\n{hint}") from error


def _typed(cls: type[Coupler], option: str, value: Any) -> Any:
    defaults = coupler_option_defaults(cls)
    if option not in defaults:
        raise Refused(unknown_name(f"option of coupler {cls.name}", option, defaults))
    return _as_type_of(defaults[option], value, f"option {option} of coupler {cls.name}")


def _as_type_of(default: Any, value: Any, what: str) -> Any:
    """Return ``value`` in the type of ``default``: text is converted, other values must have the type."""
    expected = type(default)
    if default is None or type(value) is expected:
        return value
    if isinstance(value, str):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        read = words.__getitem__ if expected is bool else expected
        try:
            found = read(value.lower() if expected is bool else value)
        except (KeyError, TypeError, ValueError):
            found = None
        if type(found) is int and abs(found) > MOST:
            raise Refused(f"{what} is {brief(found)}; it must be a whole number of at most {MOST:,}.")
        if found is not None:
            return found
    elif expected is float and type(value) is int:
        return float(value)
    kind = "true or false" if expected is bool else f"of type {expected.__name__}"
    raise Refused(f"{what} is {brief(value)}; it must be {kind}.")


# --- identity ------------------------------------------------------------------------------------------


def coupler_identity(config: GNNMoEConfig) -> dict[str, Any]:
    """Return the fields of ``config`` that can change the model, without fields that its coupler ignores.

    ``vocab_size`` is left out too, since it follows from the data. A coupler or a layer from a file counts by
    the name of its class: an edited class stays the same run. Hyperedges from a file count by content, and so
    do the hyperedges of a strategy from outside. Options and strategies have one form for all that give the
    same model.

    Raises:
        Refused: as ``build_coupler``, except for values that only the coupler itself refuses.
    """
    cls, options = coupler_class(config.coupler_type), resolved_options(config)
    unread = _unread(cls, options)
    fields = {
        **config.to_dict(),
        "coupler_type": COUPLERS.lasting_name(config.coupler_type),
        "coupler_options": _canonical(cls, config, options),
        "ffn_dim": config.expert_width,
    }
    if "hgnn_conv_type" not in unread:
        fields["hgnn_conv_type"] = LAYERS.lasting_name(config.hgnn_conv_type)
    if "static_hyperedge_strategy" not in unread:
        strategy, num_experts = config.static_hyperedge_strategy, config.num_experts
        fields["static_hyperedge_strategy"] = strategy_identity(strategy, num_experts)
    if config.initialization == "project":  # the runs from before this field keep their run_id
        del fields["initialization"]
    return {name: value for name, value in fields.items() if name not in unread | {"vocab_size"}}


def made_of(config: GNNMoEConfig) -> list[Any]:
    """Return the class of the coupler, and the layer and the strategy's function that it reads (perhaps).

    Raises:
        Refused: one of them cannot be found.
    """
    cls = coupler_class(config.coupler_type)
    unread = _unread(cls, resolved_options(config))
    layer = [] if "hgnn_conv_type" in unread else [LAYERS.find(config.hgnn_conv_type)]
    if "static_hyperedge_strategy" in unread:
        return [cls, *layer]
    return [cls, *layer, strategy_function(config.static_hyperedge_strategy)]


def _unread(cls: type[Coupler], options: dict[str, Any]) -> set[str]:
    read = fields_read_by(cls, options)
    return set() if read is None else {name for name in COUPLER_FIELDS if name not in read}


def fields_read_by(cls: type[Coupler], options: dict[str, Any]) -> tuple[str, ...] | None:
    """Return which of ``COUPLER_FIELDS`` the coupler reads; None: perhaps all of them.

    Only declarations in the class itself count: an inherited declaration is about another class.

    Raises:
        Refused: its ``fields_read`` returns something else.
    """
    if "fields_read" not in vars(cls):
        return vars(cls).get("config_fields")
    fields = cls.fields_read(options)
    if not are_fields(fields):
        raise Refused(f"fields_read of coupler {cls.name} gives {brief(fields)}; it must be {FIELDS_ARE}.")
    return fields


def _canonical(cls: type[Coupler], config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return the ``canonical_options`` of the class itself; an inherited method does not count."""
    if "canonical_options" not in vars(cls):
        return options
    found = cls.canonical_options(config, dict(options))
    if not isinstance(found, dict) or not found.keys() <= options.keys():
        raise Refused(
            f"canonical_options of coupler {cls.name} gives {brief(found)}; it must be some of {options}."
        )
    return found
