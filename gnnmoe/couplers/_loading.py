"""A stranger's coupler: ``package.module:Class``, or ``path/to/file.py:Class``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

from gnnmoe.config import Refused
from gnnmoe.couplers._base import Coupler
from gnnmoe.couplers._contract import check_contract
from gnnmoe.naming import unknown_name
from gnnmoe.process_state import ProcessStateChanged, unchanged_state

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class LoadedFile:
    """The module made from a file, and the bytes that it was made from."""

    module: ModuleType
    source: bytes


_FILES: dict[Path, LoadedFile] = {}
_READ_ONCE: set[Path] | None = None
"""Inside ``files_read_once``: the files that were read."""
_REFUSED: dict[str, str] = {}
"""Name of a module, or path and hash of a file → why it was refused: a second import executes nothing."""


def class_by_path(text: str) -> type[Coupler]:
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
        classes = [n for n, c in vars(module).items()
                   if inspect.isclass(c) and issubclass(c, Coupler) and c is not Coupler]  # fmt: skip
        raise Refused(unknown_name(f"coupler class in {place}", class_name, classes))
    check_contract(cls, text)
    if "name" not in vars(cls):  # its own, not one inherited from a registered coupler
        cls.name = name
    return cls


@contextmanager
def files_read_once() -> Iterator[None]:
    """Read each file once inside the block, so that an edit meanwhile does not change a run that goes on."""
    global _READ_ONCE
    outside, _READ_ONCE = _READ_ONCE, set()
    try:
        yield
    finally:
        _READ_ONCE = outside


@contextmanager
def executed_again(text: str) -> Iterator[None]:
    """Make the module of a coupler's file anew from the same bytes, for use inside the block.

    What the module keeps in its own variables starts from nothing there. Any other coupler stays as it is.

    Raises:
        Refused: as ``class_by_path``.
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
    """Return the bytes that a module from a coupler's file was made from, None for any other module."""
    return next((loaded.source for loaded in _FILES.values() if loaded.module.__name__ == module), None)


def changing_nothing(what: str, load: Callable[[], Loaded], key: str | None = None) -> Loaded:
    """Return what ``load`` returns, if the settings and the random state of the process stay as they are.

    ``what`` is said in the message; what was refused under a ``key`` (default: ``what``) is so again.

    Raises:
        Refused: it changed a setting; all are put back.
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
        return changing_nothing(
            f"the coupler's module {module_name}", lambda: importlib.import_module(module_name)
        )
    except ProcessStateChanged:
        raise
    except (Exception, SystemExit) as error:
        raise Refused(
            f"coupler {text!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error})."
        ) from error


def _file(text: str) -> LoadedFile:
    """Return the file of ``path/to/file.py:Class``, loaded once unless its content changes."""
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
        module = changing_nothing(f"the coupler's file {path}", lambda: _executed(path, source, text), key)
        _FILES[path] = known = LoadedFile(module, source)
    if _READ_ONCE is not None:
        _READ_ONCE.add(path)
    return known


def _path_of(text: str) -> Path:
    return Path(text.rpartition(":")[0]).expanduser().resolve()


def _executed(path: Path, source: bytes, text: str) -> ModuleType:
    """Make a module of ``source`` itself: bytecode kept by an import may be that of another content."""
    stem = re.sub(r"\W", "_", path.stem)
    name = f"gnnmoe_file_{stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    earlier = sys.modules.get(name)
    sys.modules[name] = module  # where pickle and dataclasses look a class up
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
