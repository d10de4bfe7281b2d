"""The arguments of a strategy, from the text after its name. Imports no torch."""

from __future__ import annotations

import inspect
from types import NoneType
from typing import Any, get_args

from gnnmoe.config import Refused

REQUIRED = inspect.Parameter.empty
Parameters = dict[str, inspect.Parameter]


def read_arguments(name: str, text: str | None, parameters: Parameters) -> dict[str, Any]:
    """Return every argument of the strategy ``name`` with its value, in the order of ``parameters``.

    Raises:
        Refused: there is no such argument, or it cannot have this value; says how to write it.
    """
    try:
        given = {} if text is None else _given(text, parameters)
        return {key: _value(parameter, given.get(key)) for key, parameter in parameters.items()}
    except Refused as error:
        strategy = name if text is None else f"{name}:{text}"
        raise Refused(f"strategy {strategy!r}: {error}. {_usage(name, parameters)}.") from None


def _usage(name: str, parameters: Parameters) -> str:
    if not parameters:
        return f"{name} takes no arguments; write {name!r}"
    takes = [f"{key} ({'required' if p.default is REQUIRED else f'default {p.default}'})"
             for key, p in parameters.items()]  # fmt: skip
    first, parameter = next(iter(parameters.items()))
    example = f"{name}:edges.json" if parameter.annotation is str else f"{name}:{first}=3"
    return f"{name} takes {', '.join(takes)}; for example {example!r}"


def _given(text: str, parameters: Parameters) -> dict[str, str]:
    """Return the text of each argument that is set."""
    given: dict[str, str] = {}
    first, *others = parameters or [""]
    if first and not others and parameters[first].annotation is str:
        return {first: text.removeprefix(f"{first}=")}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and not given:
            key, value = first or key, key
        if key not in parameters:
            raise Refused(f"there is no argument {key!r}")
        if key in given:
            raise Refused(f"{key} is given twice")
        given[key] = value
    return given


def _value(parameter: inspect.Parameter, text: str | None) -> Any:
    """Return ``text`` as the type of the parameter's annotation; its default where there is no text."""
    if text is None and parameter.default is not REQUIRED:
        return parameter.default
    if not text:
        raise Refused(f"{parameter.name} has no value")
    types = get_args(parameter.annotation) or (parameter.annotation,)
    if text == "None" and NoneType in types:
        return None
    if int not in types:
        return text
    try:
        return int(text)
    except ValueError:
        kind = "a whole number or None" if NoneType in types else "a whole number"
        raise Refused(f"{parameter.name} is {text!r}; it must be {kind}") from None
