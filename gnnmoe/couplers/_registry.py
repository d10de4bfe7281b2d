"""Which couplers there are: a file in this folder, an entry point, or ``package.module:Class``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from gnnmoe.couplers._base import Coupler
from gnnmoe.naming import unknown_name

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig

COUPLER_FIELDS = ("gnn_layers", "hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights")
"""The fields of the config that are there for some couplers only."""

_COUPLERS: dict[str, type[Coupler]] = {}
CouplerClass = TypeVar("CouplerClass", bound=type[Coupler])


def register_coupler(name: str) -> Callable[[CouplerClass], CouplerClass]:
    """Return a decorator that makes a class available as ``--coupler name``.

    Raises:
        ValueError: another class has the name, or the class has no docstring.
    """

    def register(cls: CouplerClass) -> CouplerClass:
        known = _COUPLERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"coupler {name!r} is registered already, by {known.__module__}.{known.__name__}."
            )
        if not (cls.__doc__ or "").strip():
            raise ValueError(f"coupler {name!r} needs a docstring with its formula, shapes and source.")
        cls.name = name
        _COUPLERS[name] = cls
        return cls

    return register


@cache
def _discover() -> None:
    """Import every coupler file of this folder and every installed entry point, once."""
    package = importlib.import_module("gnnmoe.couplers")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"gnnmoe.couplers.{module.name}")
    for point in entry_points(group="gnnmoe.couplers"):
        try:
            register_coupler(point.name)(point.load())
        except Exception as error:  # a stranger's package must not take the other couplers along
            warnings.warn(
                f"coupler {point.name!r} of an installed package is left out: {error}", stacklevel=2
            )


def coupler_names() -> list[str]:
    """Return the names of all couplers that discovery finds, sorted."""
    _discover()
    return sorted(_COUPLERS, key=str.lower)


def coupler_class(name: str) -> type[Coupler]:
    """Return the class behind a registered name or ``package.module:Class``.

    Raises:
        ValueError: there is no such name, module or class, or the class is no ``Coupler``.
    """
    _discover()
    if ":" in name:
        return _imported_class(name)
    if name not in _COUPLERS:
        raise ValueError(unknown_name("coupler", name, _COUPLERS) + " Your own: package.module:Class.")
    return _COUPLERS[name]


def _imported_class(path: str) -> type[Coupler]:
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise ValueError(f"coupler {path!r} is not of the form package.module:Class.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"coupler {path!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error})."
        ) from error
    cls = getattr(module, class_name, None)
    if not (inspect.isclass(cls) and issubclass(cls, Coupler)):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, Coupler)
                   and c is not Coupler]  # fmt: skip
        if cls is None:
            raise ValueError(unknown_name(f"coupler class in {module_name}", class_name, classes))
        raise ValueError(f"coupler {path!r}: {class_name} is not a subclass of gnnmoe.Coupler.")
    if not (vars(cls).get("__doc__") or "").strip():
        raise ValueError(f"coupler {path!r} needs a docstring with its formula, shapes and source.")
    if "name" not in vars(cls):  # its own, not one inherited from a registered coupler
        cls.name = path
    return cls


def coupler_option_defaults(cls: type[Coupler]) -> dict[str, Any]:
    """Return the coupler's own options with their defaults: its keyword-only parameters."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build_coupler(config: GNNMoEConfig) -> Coupler:
    """Build the coupler that ``config`` names, with ``config.coupler_options``.

    Option values that are strings are read as the type of the option's default.

    Raises:
        ValueError: an unknown coupler or option, or a value that an option cannot have.
    """
    return coupler_class(config.coupler_type)(config, **resolved_options(config))


def resolved_options(config: GNNMoEConfig) -> dict[str, Any]:
    """Return every option of the coupler by name: the config's own, typed, and the defaults.

    Raises:
        ValueError: as ``build_coupler``.
    """
    cls = coupler_class(config.coupler_type)
    options = coupler_option_defaults(cls)
    for name, value in config.coupler_options.items():
        if name not in options:
            raise ValueError(unknown_name(f"option of coupler {cls.name}", name, options))
        options[name] = _as_type_of(options[name], value, f"option {name} of coupler {cls.name}")
    return options


def coupler_identity(config: GNNMoEConfig) -> dict[str, Any]:
    """Return the fields of ``config`` that can change the model: those its coupler never reads are out.

    ``vocab_size`` is out too, since it follows from the data.
    """
    read = coupler_class(config.coupler_type).config_fields
    unread = set(COUPLER_FIELDS) - set(COUPLER_FIELDS if read is None else read)
    fields = {name: value for name, value in config.to_dict().items() if name not in unread | {"vocab_size"}}
    return {**fields, "coupler_options": resolved_options(config)}


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
    raise ValueError(f"{what} is {value!r}; it must be {kind}.")
