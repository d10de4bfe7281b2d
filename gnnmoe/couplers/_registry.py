"""Which couplers there are: a file in this folder, an entry point, or a path to a class."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from gnnmoe.config import Refused
from gnnmoe.couplers._base import Coupler
from gnnmoe.couplers._contract import check_contract
from gnnmoe.couplers._loading import changing_nothing, class_by_path, is_file
from gnnmoe.naming import unknown_name

_COUPLERS: dict[str, type[Coupler]] = {}
CouplerClass = TypeVar("CouplerClass", bound=type[Coupler])


def register_coupler(name: str) -> Callable[[CouplerClass], CouplerClass]:
    """Return a decorator that makes a class available as ``--coupler name``.

    Raises:
        Refused: another class has the name, or the class breaks the contract.
    """

    def register(cls: CouplerClass) -> CouplerClass:
        check_contract(cls, name)
        known = _COUPLERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise Refused(f"coupler {name!r} is registered already, by {known.__module__}.{known.__name__}.")
        cls.name = name
        _COUPLERS[name] = cls
        return cls

    return register


@cache
def _discover() -> frozenset[str]:
    """Import every coupler file of this folder and every installed entry point, once; return the names."""
    package = importlib.import_module("gnnmoe.couplers")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"gnnmoe.couplers.{module.name}")
    for point in entry_points(group="gnnmoe.couplers"):
        try:
            with _all_or_nothing():
                register_coupler(point.name)(changing_nothing(f"the entry point {point.value}", point.load))
        except (Exception, SystemExit) as error:  # a stranger's package must not take the others along
            warnings.warn(
                f"coupler {point.name!r} of an installed package is left out: {error}", stacklevel=2
            )
    return frozenset(_COUPLERS)


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """Take back what a stranger's module registered before it was refused."""
    before = dict(_COUPLERS)
    try:
        yield
    except BaseException:
        _COUPLERS.clear()
        _COUPLERS.update(before)
        raise


def coupler_names() -> list[str]:
    """Return the names of all couplers that discovery finds, sorted."""
    _discover()
    return sorted(_COUPLERS, key=str.lower)


def coupler_class(name: str) -> type[Coupler]:
    """Return the class behind a registered name, ``package.module:Class`` or ``path/to/file.py:Class``.

    Raises:
        Refused: there is no such name, module, file or class, or the class breaks the contract.
    """
    _discover()
    if ":" in name:
        with _all_or_nothing():
            return class_by_path(name)
    if name not in _COUPLERS:
        own = "Your own: package.module:Class or path/to/file.py:Class."
        raise Refused(f"{unknown_name('coupler', name, _COUPLERS)} {own}")
    return _COUPLERS[name]


def lasting_name(name: str) -> str:
    """Return what names a coupler wherever it lies, and however it is named.

    Of a file, ``file:Class``, whatever the file holds; of a class that discovery finds, its registered
    name; else ``name``.

    Raises:
        Refused: as ``coupler_class``.
    """
    cls = coupler_class(name)
    if is_file(name):
        return f"file:{cls.__name__}"
    return cls.name if cls.name in _discover() and _COUPLERS.get(cls.name) is cls else name
