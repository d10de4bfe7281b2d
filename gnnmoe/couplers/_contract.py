"""What a class must look like to be a coupler; what it computes is for the leak check to judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gnnmoe.config import Refused
from gnnmoe.couplers._base import COUPLER_FIELDS, Coupler

EMPTY = inspect.Parameter.empty
DOCUMENTED = (".. math::", "Shapes:", "Source:")
OPTION_TYPES = (bool, int, float, str, type(None))
FIELDS_ARE = f"None, or a tuple of some of {', '.join(COUPLER_FIELDS)}"
SIGNATURES = {
    "forward": {"expert_outputs": EMPTY, "layer_input": None},
    "reference": {"expert_outputs": EMPTY, "layer_input": None},
    "auxiliary_losses": {"expert_outputs": EMPTY, "layer_input": None},
    "communication": {"expert_outputs": None, "layer_input": None},
    "flops": {"tokens": EMPTY},
    "fields_read": {"options": EMPTY},
    "canonical_options": {"config": EMPTY, "options": EMPTY},
}
"""Parameters after self or cls, with their defaults, of the methods that the harness calls."""


def check_contract(cls: Any, name: str | None = None) -> None:
    """Refuse a class that breaks the contract of a coupler; ``name`` is what the message calls it.

    Raises:
        Refused: naming the first clause that it breaks, and what to do.
    """
    breach = _breach(cls)
    if breach is not None:
        if name is None:
            name = f"{cls.__module__}:{cls.__qualname__}" if inspect.isclass(cls) else repr(cls)
        raise Refused(f"coupler {name!r} breaks the contract: {breach}")


def _breach(cls: Any) -> str | None:
    if not (inspect.isclass(cls) and issubclass(cls, Coupler)):
        return "it is not a subclass of gnnmoe.Coupler; derive it from that class."
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        return f"it does not implement {' and '.join(missing)}; every abstract method must be written."
    return _in_constructor(cls) or _in_methods(cls) or _in_fields(cls) or _in_docstring(cls)


def _in_constructor(cls: type[Coupler]) -> str | None:
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            return (
                f"__init__ takes **{parameter.name}, which would swallow a misspelt option; "
                "name each option as a keyword-only parameter with a default."
            )
        if parameter.kind is parameter.VAR_POSITIONAL:
            return (
                f"__init__ takes *{parameter.name}, which no option can reach; "
                "name each option as a keyword-only parameter with a default."
            )
    own = parameters[1:]
    if not own or own[0].name != "config" or own[0].kind is own[0].KEYWORD_ONLY:
        found = repr(own[0].name) if own and own[0].kind is not own[0].KEYWORD_ONLY else "missing"
        return (
            f"the first parameter of __init__ after self is {found}; it must be config, "
            "as in __init__(self, config, *, k=2)."
        )
    for option in own[1:]:
        breach = _in_option(option)
        if breach is not None:
            return breach
    return None


def _in_option(option: inspect.Parameter) -> str | None:
    if option.name in ("device", "dtype"):
        return (
            f"__init__ has an option {option.name!r}; remove it: the model is moved as a whole, "
            f"by .to({option.name})."
        )
    if option.kind is not option.KEYWORD_ONLY:
        return (
            f"__init__ takes {option.name!r} by position; make it keyword-only, "
            f"as in __init__(self, config, *, {option.name}=...)."
        )
    if option.default is EMPTY:
        return f"option {option.name!r} of __init__ has no default; give it one."
    if type(option.default) not in OPTION_TYPES:
        return (
            f"the default of option {option.name!r} of __init__ is of type {type(option.default).__name__}; "
            "options are read from the command line: make it a bool, int, float, str or None."
        )
    return None


def _in_methods(cls: type[Coupler]) -> str | None:
    for method, wanted in SIGNATURES.items():
        found = _parameters(cls, method)
        if found is None:
            return f"{method} is no method; write it as one."
        if _is_classmethod(Coupler, method) and not _is_classmethod(cls, method):
            return f"{method} is no classmethod; put @classmethod above it."
        named = {p.name: p.default for p in found if p.kind is p.POSITIONAL_OR_KEYWORD}
        if len(named) != len(found) or list(named.items()) != list(wanted.items()):
            return (
                f"{method} takes {_shown(found)}; it must take {_shown(_as_parameters(wanted))} after self, "
                "by these names, and nothing else."
            )
    return None


def _parameters(cls: type[Coupler], method: str) -> list[inspect.Parameter] | None:
    """Return the parameters that a caller of the method gives: those after self."""
    function: Callable[..., Any] = getattr(cls, method)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    bound = isinstance(inspect.getattr_static(cls, method), staticmethod | classmethod)
    return parameters if bound else parameters[1:]


def _as_parameters(wanted: dict[str, Any]) -> list[inspect.Parameter]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [inspect.Parameter(name, kind, default=default) for name, default in wanted.items()]


def _shown(parameters: list[inspect.Parameter]) -> str:
    return str(inspect.Signature([p.replace(annotation=EMPTY) for p in parameters]))


def _is_classmethod(cls: type[Coupler], method: str) -> bool:
    return isinstance(inspect.getattr_static(cls, method), classmethod)


def _in_fields(cls: type[Coupler]) -> str | None:
    if are_fields(cls.config_fields):
        return None
    return f"config_fields is {cls.config_fields!r}; it must be {FIELDS_ARE}."


def are_fields(value: Any) -> bool:
    """Return whether ``value`` can stand in ``config_fields``."""
    return value is None or (isinstance(value, tuple) and all(name in COUPLER_FIELDS for name in value))


def _in_docstring(cls: type[Coupler]) -> str | None:
    own = vars(cls).get("__doc__") or ""
    asked = "give its formula ('.. math::'), 'Shapes:' and 'Source:', as gnnmoe/couplers/mean.py does."
    if not own.strip():
        return f"it has no docstring of its own; {asked}"
    missing = [part for part in DOCUMENTED if part not in own]
    if missing:
        return f"its docstring has no {' and no '.join(map(repr, missing))}; {asked}"
    return None
