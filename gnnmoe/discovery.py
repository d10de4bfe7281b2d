"""Find couplers, hypergraph layers and hyperedge strategies, in this project and outside it.

Each of the three kinds has a ``Registry``. It finds things in the files of a folder, in installed packages
(entry points), in a module (``package.module:Name``) and in a file (``path/to/file.py:Name``).
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from gnnmoe.config import Refused, unknown_name
from gnnmoe.reading import from_home, read_bytes

Thing = TypeVar("Thing")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class LoadedFile:
    """The module made from a file, and the bytes from which it was made."""

    module: ModuleType
    source: bytes


_FILES: dict[Path, LoadedFile] = {}
_READ_ONCE: set[Path] | None = None
"""Inside ``files_read_once``: the files that were read."""
_REFUSED: dict[str, str] = {}
"""Name of a module, or path and hash of a file → the refusal: a second import executes nothing."""


class Registry(Mapping[str, Thing]):
    """The things of one kind by name, sorted; ``find`` also loads things from outside.

    Args:
        kind: The name of the kind in messages.
        group: The group of its entry points.
        folder: The package whose files hold the things (None: they are registered elsewhere).
        check: Called with a thing and its name; raises Refused where the thing breaks the contract.
        like: Says whether something in a module looks like a thing of this kind, for suggestions.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        folder: str | None,
        check: Callable[[Any, str], None],
        like: Callable[[Any], bool],
    ) -> None:
        self.kind, self.group, self.folder, self.check, self.like = kind, group, folder, check, like
        self.registered: dict[str, Thing] = {}
        self._discovered: frozenset[str] | None = None

    def register(self, name: str, thing: Thing) -> None:
        """Enter ``thing`` under ``name``; a class gets the name as its attribute ``name``.

        Raises:
            Refused: another thing has this name, or the thing breaks the contract.
        """
        self.check(thing, name)
        known = self.registered.get(name)
        if known is not None and _origin(known) != _origin(thing):
            raise Refused(f"{self.kind} {name!r} is registered already, by {'.'.join(_origin(known))}.")
        _set_name(thing, name)
        self.registered[name] = thing

    def registering(self, name: str) -> Callable[[Loaded], Loaded]:
        """Return a decorator that registers a class or a function under ``name``.

        Raises:
            Refused: as ``register``.
        """

        def register(thing: Loaded) -> Loaded:
            self.register(name, cast(Any, thing))
            return thing

        return register

    def __getitem__(self, name: str) -> Thing:
        self.discovered()
        return self.registered[name]

    def __iter__(self) -> Iterator[str]:
        self.discovered()
        return iter(sorted(self.registered, key=str.lower))

    def __len__(self) -> int:
        self.discovered()
        return len(self.registered)

    def discovered(self) -> frozenset[str]:
        """Import the files of the folder and the entry points, once; return the names of what they hold.

        Files whose names begin with ``_`` are left out. A broken entry point is left out with a warning.
        """
        if self._discovered is None:
            self._discovered = frozenset()  # what a file sees while it is imported
            if self.folder is not None:
                for module in pkgutil.iter_modules(importlib.import_module(self.folder).__path__):
                    if not module.name.startswith("_"):
                        importlib.import_module(f"{self.folder}.{module.name}")
            for point in entry_points(group=self.group):
                self._enter(point)
            self._discovered = frozenset(self.registered)
        return self._discovered

    def forget_discovery(self) -> None:
        """Look again for files and entry points at the next use."""
        self._discovered = None

    def _enter(self, point: Any) -> None:
        try:
            with self._all_or_nothing():
                self.register(point.name, _changing_nothing(f"the entry point {point.value}", point.load))
        except (Exception, SystemExit) as error:  # a broken package must not disable everything else
            warnings.warn(
                f"{self.kind} {point.name!r} of an installed package is left out: {error}", stacklevel=2
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Where the block raises, undo the registrations that it made."""
        before = dict(self.registered)
        try:
            yield
        except BaseException:
            self.registered.clear()
            self.registered.update(before)
            raise

    def find(self, text: str) -> Thing:
        """Return the thing behind a registered name, ``package.module:Name`` or ``path/to/file.py:Name``.

        Raises:
            Refused: there is no such name, module or file, it cannot be loaded, it changes a setting of the
                whole process, or the thing breaks the contract.
        """
        if ":" in text:
            with self._all_or_nothing():
                return self._from_outside(text)
        if text not in self:
            own = "--list shows all; your own: module:Name or file.py:Name."
            raise Refused(f"{unknown_name(self.kind, text, self)} {own}")
        return self[text]

    def _from_outside(self, text: str) -> Thing:
        place, _, name = text.rpartition(":")
        if not place or not name:
            raise Refused(f"{self.kind} {text!r} is not of the form package.module:Name or file.py:Name.")
        if is_file(text):
            module, place = _file(text, self.kind).module, Path(place).name
        else:
            module = _imported(place, f"{self.kind} {text!r}")
        thing = getattr(module, name, None)
        if thing is None:
            there = [other for other, found in vars(module).items() if self.like(found)]
            raise Refused(unknown_name(f"{self.kind} in {place}", name, there))
        self.check(thing, text)
        if "name" not in vars(thing):  # its own, not inherited
            _set_name(thing, f"{place}:{name}")
        return thing

    def lasting_name(self, text: str) -> str:
        """Return one name for all spellings of a thing and for all places of its file.

        For a file: ``file:Name``, whatever the file contains. For a class that discovery finds: its
        registered name. Otherwise ``text``.

        Raises:
            Refused: as ``find``.
        """
        thing: Any = self.find(text)
        if is_file(text):
            return f"file:{thing.__name__}"
        name = getattr(thing, "name", text)
        return name if name in self.discovered() and self.registered.get(name) is thing else text


def forget_inherited(cls: type, base: type, methods: Sequence[str]) -> None:
    """Give a class with a ``forward`` of its own the ``methods`` of ``base``, where it has none of its own.

    What it inherits from another class describes the ``forward`` of that class.
    """
    if "forward" in vars(cls):
        for name in methods:
            if name not in vars(cls) and getattr(cls, name) is not getattr(base, name):
                setattr(cls, name, getattr(base, name))


def _set_name(thing: Any, name: str) -> None:
    if inspect.isclass(thing):
        thing.name = name  # pyright: ignore[reportAttributeAccessIssue]


def _origin(thing: Any) -> tuple[str, str]:
    return thing.__module__, thing.__qualname__


# --- code from outside ---------------------------------------------------------------------------------


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
def executed_again(*texts: str) -> Iterator[None]:
    """Execute the files that ``texts`` name again from the same bytes, for use inside the block.

    There the variables of their modules have their initial values. For a text that names no file, nothing
    happens.

    Raises:
        Refused: a file cannot be loaded.
    """
    with ExitStack() as stack:
        for text in filter(is_file, texts):
            stack.enter_context(_executed_again(text))
        yield


@contextmanager
def _executed_again(text: str) -> Iterator[None]:
    path, known = path_in(text).resolve(), _file(text, "file")
    _FILES[path] = LoadedFile(_executed(path, known.source, text), known.source)
    try:
        yield
    finally:
        _FILES[path] = known
        sys.modules[known.module.__name__] = known.module


def is_file(text: str) -> bool:
    """Return whether ``text`` is of the form ``path/to/file.py:Name``."""
    return text.rpartition(":")[0].endswith(".py")


def short_name(text: str) -> str:
    """Return the name by which tables and titles show a thing: of code from outside, without its place."""
    return text.rpartition(":")[2]


def executed_source(module: str) -> bytes | None:
    """Return the bytes from which the module of a file was made, None for any other module."""
    return next((loaded.source for loaded in _FILES.values() if loaded.module.__name__ == module), None)


def _changing_nothing(what: str, load: Callable[[], Loaded], key: str | None = None) -> Loaded:
    """Return the result of ``load``; the random state of the process stays as it is.

    ``what`` names the source in the message. A second call with a refused ``key`` (default: ``what``) is
    refused again, and does not call ``load``.

    Raises:
        Refused: ``load`` changed a setting of the process; all settings are restored.
    """
    import torch

    from gnnmoe.process_state import ProcessStateChanged, unchanged_state

    key = key or what
    if key in _REFUSED:
        raise ProcessStateChanged(_REFUSED[key])
    try:
        with torch.random.fork_rng(devices=[]), unchanged_state(f"loading {what}"):
            return load()
    except ProcessStateChanged as error:
        _REFUSED[key] = str(error)
        raise


def _imported(module_name: str, what: str) -> ModuleType:
    try:
        return _changing_nothing(f"the module {module_name}", lambda: importlib.import_module(module_name))
    except Refused:
        raise
    except (Exception, SystemExit) as error:
        raise Refused(
            f"{what}: module {module_name!r} cannot be imported ({type(error).__name__}: {error})."
        ) from error


def _file(text: str, kind: str) -> LoadedFile:
    """Return the file of ``path/to/file.py:Name``; it is executed again only if its content changes."""
    path, what = path_in(text).resolve(), f"{kind} {text!r}"
    if _READ_ONCE is not None and path in _READ_ONCE:
        return _FILES[path]
    try:
        source = read_bytes(path)
    except FileNotFoundError:
        raise Refused(
            f"{what}: there is no file {path}; give its path from the current folder or in full."
        ) from None
    except OSError as error:
        raise Refused(f"{what}: {path} cannot be read: {error.strerror}.") from error
    known = _FILES.get(path)
    if known is None or known.source != source:
        key = f"{path}@{hashlib.sha256(source).hexdigest()}"
        module = _changing_nothing(f"the file {path}", lambda: _executed(path, source, what), key)
        _FILES[path] = known = LoadedFile(module, source)
    if _READ_ONCE is not None:
        _READ_ONCE.add(path)
    return known


def path_in(text: str) -> Path:
    """Return the path of ``path/to/file.py:Name``, with the home folder in place of ~.

    Raises:
        Refused: no home folder is known.
    """
    return from_home(Path(text.rpartition(":")[0]), "the file of code")


def _executed(path: Path, source: bytes, what: str) -> ModuleType:
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
        raise Refused(f"{what}: {path} cannot be loaded ({type(error).__name__}: {error}).") from error
    return module
