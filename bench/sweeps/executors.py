"""Executors by name. One more is one more file, ``bench/sweeps/NAME_executor.py``, with three things in it:

``Options``, a group of flags (``bench.config.flags``) whose names begin with ``NAME_``; ``make(options,
wanted)``, which returns an ``Executor`` or raises Refused with what to do; and nothing at import that a
machine may lack.
"""

from __future__ import annotations

import importlib
from dataclasses import field, fields
from functools import cache
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

import bench.sweeps
from bench.config import flags
from bench.sweeps.executor import Executor, Wanted
from gnnmoe.config import Refused, unknown_name

LOCAL, SUFFIX = "local", "_executor"
Config = TypeVar("Config")


@cache
def executors() -> dict[str, ModuleType]:
    """Return the module of each executor: this machine first."""
    found = sorted(each.name for each in iter_modules(bench.sweeps.__path__) if each.name.endswith(SUFFIX))
    names = {LOCAL: LOCAL, **{name.removesuffix(SUFFIX): name for name in found}}
    return {name: importlib.import_module(f"bench.sweeps.{stem}") for name, stem in names.items()}


def with_options(config_type: type[Config]) -> type[Config]:
    """Return a dataclass with the fields of ``config_type`` and, in groups, the flags of every executor."""
    groups = {f"{name}_options": module.Options for name, module in executors().items()}
    namespace: dict[str, Any] = {"__doc__": config_type.__doc__, "__annotations__": groups}
    namespace |= {name: field(default_factory=options) for name, options in groups.items()}
    return flags(type(config_type.__name__, (config_type,), namespace))  # pyright: ignore[reportReturnType]


def check_name(name: str) -> None:
    """Refuse an executor that is not there.

    Raises:
        Refused: naming those that are.
    """
    if name not in executors():
        raise Refused(unknown_name("executor", name, executors()))


def make_executor(name: str, config: Any, wanted: Wanted) -> Executor:
    """Return the executor ``name`` with its own flags from ``config``, which ``with_options`` made.

    Raises:
        Refused: there is none of that name, its package is missing, or the cluster cannot be reached.
    """
    check_name(name)
    _refuse_flags_of_others(name, config)
    module = executors()[name]
    return module.make(getattr(config, f"{name}_options", None) or module.Options(), wanted)


def _refuse_flags_of_others(name: str, config: Any) -> None:
    """Refuse flags that this executor would not follow: a run would be elsewhere than was meant."""
    for other, module in executors().items():
        options, defaults = getattr(config, f"{other}_options", None), module.Options()
        if other == name or options is None:
            continue
        given = [each.name for each in fields(defaults)
                 if getattr(options, each.name) != getattr(defaults, each.name)]  # fmt: skip
        if given:
            raise Refused(f"{', '.join(given)} is for --executor {other}, and this is {name}; drop it.")
