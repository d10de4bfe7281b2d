"""Which couplers there are, how a class from outside is loaded, and what options and config make of a class.

A coupler is a file in this folder, an entry point of the group ``gnnmoe.couplers``, ``package.module:Class``
or ``path/to/file.py:Class``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from gnnmoe.config import GNNMoEConfig, Refused, unknown_name
from gnnmoe.couplers.base import COUPLER_FIELDS, FIELDS_ARE, Coupler, are_fields, check_contract
from gnnmoe.experts import init_weights
from gnnmoe.hypergraph.strategies import strategy_identity
from gnnmoe.process_state import ProcessStateChanged, unchanged_state

CouplerClass = TypeVar("CouplerClass", bound=type[Coupler])
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class LoadedFile:
    """The module made from a file, and the bytes from which it was made."""

    module: ModuleType
    source: bytes


_COUPLERS: dict[str, type[Coupler]] = {}
_FILES: dict[Path, LoadedFile] = {}
_READ_ONCE: set[Path] | None = None
"""Inside ``files_read_once``: the files that were read."""
_REFUSED: dict[str, str] = {}
"""Name of a module, or path and hash of a file → the refusal: a second import executes nothing."""


def register_coupler(name: str) -> Callable[[CouplerClass], CouplerClass]:
    """Return a decorator that makes a class available as ``--coupler name``.

    Raises:
        Refused: another class has this name, or the class breaks the contract.
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
    """Import the files of this folder and the installed entry points, once; return the names of couplers.

    Files whose names begin with ``_`` are left out.
    """
    package = importlib.import_module("gnnmoe.couplers")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"gnnmoe.couplers.{module.name}")
    for point in entry_points(group="gnnmoe.couplers"):
        try:
            with _all_or_nothing():
                register_coupler(point.name)(_changing_nothing(f"the entry point {point.value}", point.load))
        except (Exception, SystemExit) as error:  # a broken package must not disable the other couplers
            warnings.warn(
                f"coupler {point.name!r} of an installed package is left out: {error}", stacklevel=2
            )
    return frozenset(_COUPLERS)


@contextmanager
def _all_or_nothing() -> Iterator[None]:
    """Where the block raises, undo the registrations that it made."""
    before = dict(_COUPLERS)
    try:
        yield
    except BaseException:
        _COUPLERS.clear()
        _COUPLERS.update(before)
        raise


def coupler_names() -> list[str]:
    """Return the names of all couplers in this folder and in installed packages, sorted."""
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
            return _class_by_path(name)
    if name not in _COUPLERS:
        own = "Your own: package.module:Class or path/to/file.py:Class."
        raise Refused(f"{unknown_name('coupler', name, _COUPLERS)} {own}")
    return _COUPLERS[name]


# --- a class from outside ------------------------------------------------------------------------------


def _class_by_path(text: str) -> type[Coupler]:
    """Return the class behind ``package.module:Class`` or ``path/to/file.py:Class``.

    Raises:
        Refused: there is no such file, module or class, it cannot be loaded, it changes a setting of
            the whole process, or the class breaks the contract.
    """
    place, _, class_name = text.rpartition(":")
    if not place or not class_name:
        raise Refused(f"coupler {text!r} is not of the form package.module:Class or file.py:Class.")
    if is_file(text):
        module, place, name = _file(text).module, Path(place).name, f"{Path(place).name}:{class_name}"
    else:
        module, name = _imported(place, text), text
    cls = getattr(module, class_name, None)
    if cls is None:
        classes = {n: c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, Coupler)}
        couplers = [name for name, found in classes.items() if found is not Coupler]
        raise Refused(unknown_name(f"coupler class in {place}", class_name, couplers))
    check_contract(cls, text)
    if "name" not in vars(cls):  # its own, not inherited from a registered coupler
        cls.name = name
    return cls


@contextmanager
def files_read_once() -> Iterator[None]:
    """Read each file only once inside the block, so that an edit does not change the run in progress."""
    global _READ_ONCE
    outside, _READ_ONCE = _READ_ONCE, set()
    try:
        yield
    finally:
        _READ_ONCE = outside


@contextmanager
def executed_again(text: str) -> Iterator[None]:
    """Execute the file of a coupler again from the same bytes, for use inside the block.

    There the variables of its module have their initial values. For any other coupler, nothing happens.

    Raises:
        Refused: as ``coupler_class``.
    """
    if not is_file(text):
        yield
        return
    path, known = _path_of(text), _file(text)
    _FILES[path] = LoadedFile(_executed(path, known.source, text), known.source)
    try:
        yield
    finally:
        _FILES[path] = known
        sys.modules[known.module.__name__] = known.module


def is_file(text: str) -> bool:
    """Return whether ``text`` is of the form ``path/to/file.py:Class``."""
    return text.rpartition(":")[0].endswith(".py")


def executed_source(module: str) -> bytes | None:
    """Return the bytes from which the module of a coupler's file was made, None for any other module."""
    return next((loaded.source for loaded in _FILES.values() if loaded.module.__name__ == module), None)


def _changing_nothing(what: str, load: Callable[[], Loaded], key: str | None = None) -> Loaded:
    """Return the result of ``load``; the random state of the process stays as it is.

    ``what`` names the source in the message. A second call with a refused ``key`` (default: ``what``) is
    refused again, and does not call ``load``.

    Raises:
        Refused: ``load`` changed a setting of the process; all settings are restored.
    """
    key = key or what
    if key in _REFUSED:
        raise ProcessStateChanged(_REFUSED[key])
    try:
        with torch.random.fork_rng(devices=[]), unchanged_state(f"loading {what}"):
            return load()
    except ProcessStateChanged as error:
        _REFUSED[key] = str(error)
        raise


def _imported(module_name: str, text: str) -> ModuleType:
    try:
        return _changing_nothing(
            f"the coupler's module {module_name}", lambda: importlib.import_module(module_name)
        )
    except ProcessStateChanged:
        raise
    except (Exception, SystemExit) as error:
        raise Refused(
            f"coupler {text!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error})."
        ) from error


def _file(text: str) -> LoadedFile:
    """Return the file of ``path/to/file.py:Class``; it is executed again only if its content changes."""
    path = _path_of(text)
    if _READ_ONCE is not None and path in _READ_ONCE:
        return _FILES[path]
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise Refused(
            f"coupler {text!r}: there is no file {path}; give its path from the current folder or in full."
        ) from None
    except OSError as error:
        raise Refused(f"coupler {text!r}: {path} cannot be read: {error.strerror}.") from error
    known = _FILES.get(path)
    if known is None or known.source != source:
        key = f"{path}@{hashlib.sha256(source).hexdigest()}"
        module = _changing_nothing(f"the coupler's file {path}", lambda: _executed(path, source, text), key)
        _FILES[path] = known = LoadedFile(module, source)
    if _READ_ONCE is not None:
        _READ_ONCE.add(path)
    return known


def _path_of(text: str) -> Path:
    return Path(text.rpartition(":")[0]).expanduser().resolve()


def _executed(path: Path, source: bytes, text: str) -> ModuleType:
    """Return a module made from ``source``: an import could take cached bytecode of an older content."""
    stem = re.sub(r"\W", "_", path.stem)
    name = f"gnnmoe_file_{stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    earlier = sys.modules.get(name)
    sys.modules[name] = module  # pickle and dataclasses look up classes there
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if earlier is not None:
            sys.modules[name] = earlier
        raise Refused(
            f"coupler {text!r}: {path} cannot be loaded ({type(error).__name__}: {error})."
        ) from error
    return module


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


def _as_type_of(default: Any, value: Any, what: str) -> Any:
    """Return ``value`` in the type of ``default``: text is converted, other values must have the type."""
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


# --- identity ------------------------------------------------------------------------------------------


def coupler_identity(config: GNNMoEConfig) -> dict[str, Any]:
    """Return the fields of ``config`` that can change the model, without fields that its coupler ignores.

    ``vocab_size`` is left out too, since it follows from the data. A coupler from a file counts by the name
    of its class: an edited coupler stays the same run. Hyperedges from a file count by content. Options and
    strategies have one form for all that give the same model.

    Raises:
        Refused: as ``build_coupler``, except for values that only the coupler itself refuses.
    """
    cls, options = coupler_class(config.coupler_type), resolved_options(config)
    read = fields_read_by(cls, options)
    unread = set(COUPLER_FIELDS) - set(COUPLER_FIELDS if read is None else read)
    fields = {
        **config.to_dict(),
        "coupler_type": _lasting_name(config.coupler_type),
        "coupler_options": _canonical(cls, config, options),
        "ffn_dim": config.expert_width,
    }
    if "static_hyperedge_strategy" not in unread:
        strategy, num_experts = config.static_hyperedge_strategy, config.num_experts
        fields["static_hyperedge_strategy"] = strategy_identity(strategy, num_experts)
    if config.initialization == "project":  # the runs from before this field keep their run_id
        del fields["initialization"]
    return {name: value for name, value in fields.items() if name not in unread | {"vocab_size"}}


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
        raise Refused(f"fields_read of coupler {cls.name} gives {fields!r}; it must be {FIELDS_ARE}.")
    return fields


def _canonical(cls: type[Coupler], config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return the ``canonical_options`` of the class itself; an inherited method does not count."""
    if "canonical_options" not in vars(cls):
        return options
    found = cls.canonical_options(config, dict(options))
    if not isinstance(found, dict) or not found.keys() <= options.keys():
        raise Refused(
            f"canonical_options of coupler {cls.name} gives {found!r}; it must be some of {options}."
        )
    return found


def _lasting_name(name: str) -> str:
    """Return one name of a coupler for all its places and spellings.

    For a file: ``file:Class``, whatever the file contains. For a class that discovery finds: its registered
    name. Otherwise ``name``.

    Raises:
        Refused: as ``coupler_class``.
    """
    cls = coupler_class(name)
    if is_file(name):
        return f"file:{cls.__name__}"
    return cls.name if cls.name in _discover() and _COUPLERS.get(cls.name) is cls else name
