"""Strategies: which of E experts share a hyperedge. Imports no torch.

A strategy is written ``name`` or ``name:argument=value,argument=value``: ``random:k=3,m=8,seed=1``.
The first argument may go without its name (``k_subsets:4``, ``file:edges.json``). An only argument
that is text takes the whole rest, so that a path may hold ``=`` and ``,``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import warnings
from collections.abc import Callable
from itertools import combinations
from types import NoneType
from typing import Any, get_args

from gnnmoe.hyperedge_file import read_hyperedges
from gnnmoe.naming import unknown_name

Members = tuple[int, ...]  # sorted
Strategy = Callable[..., list[Members]]
REQUIRED = inspect.Parameter.empty

STRATEGIES: dict[str, Strategy] = {}


def register_strategy(name: str) -> Callable[[Strategy], Strategy]:
    """Return a decorator that makes a function from E to member lists a named strategy.

    Its keyword-only parameters, annotated int, int | None or str, are the strategy's arguments.
    """

    def register(strategy: Strategy) -> Strategy:
        STRATEGIES[name] = strategy
        return strategy

    return register


@register_strategy("all_pairs")
def all_pairs(num_experts: int) -> list[Members]:
    """Every pair of experts, in lexicographic order: E (E − 1) / 2 hyperedges."""
    return list(combinations(range(num_experts), 2))


@register_strategy("all_triplets")
def all_triplets(num_experts: int) -> list[Members]:
    """Every three experts, in lexicographic order: E (E − 1) (E − 2) / 6 hyperedges."""
    return list(combinations(range(num_experts), 3))


@register_strategy("pairs_and_triplets")
def pairs_and_triplets(num_experts: int) -> list[Members]:
    """All pairs, then all triplets."""
    return all_pairs(num_experts) + all_triplets(num_experts)


@register_strategy("all")
def all_experts(num_experts: int) -> list[Members]:
    """One hyperedge of all experts; none where there is only one expert to talk to itself."""
    return [tuple(range(num_experts))] if num_experts > 1 else []


@register_strategy("k_subsets")
def k_subsets(num_experts: int, *, k: int = 3) -> list[Members]:
    """Every k experts, in lexicographic order: C(E, k) hyperedges. ValueError where k < 2."""
    _check_k(k)
    return list(combinations(range(num_experts), k))


@register_strategy("ring")
def ring(num_experts: int, *, k: int = 2) -> list[Members]:
    """Hyperedge i holds experts i to i + k − 1 modulo E; one where E = k. ValueError where k < 2."""
    _check_k(k)
    if num_experts <= k:
        return [tuple(range(k))] if num_experts == k else []
    return [tuple(sorted((i + j) % num_experts for j in range(k))) for i in range(num_experts)]


@register_strategy("random")
def random_subsets(num_experts: int, *, k: int = 3, m: int | None = None, seed: int = 0) -> list[Members]:
    """Draw m different hyperedges of k experts, every choice as likely, in lexicographic order.

    ``m`` None is as many as experts, or all where there are fewer. The draw follows from the
    arguments alone. Some experts may be in no hyperedge. Warns where there are fewer than m.

    Raises:
        ValueError: k < 2, m < 1 or seed < 0.
    """
    _check_k(k)
    if m is not None and m < 1:
        raise ValueError(f"m is {m}; it must be at least 1, or None for as many as experts.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative.")
    possible = math.comb(num_experts, k)
    if m is not None and m > possible > 0:
        there_are = f"hyperedges of {k} out of {num_experts} experts: {possible}, all of them taken."
        warnings.warn(f"random: m is {m}; {there_are}", stacklevel=2)
    count, generator = min(num_experts if m is None else m, possible), random.Random(seed)
    if 2 * count >= possible:  # most of them: to list them all is quicker than to draw doubles
        subsets = list(combinations(range(num_experts), k))
        return [subsets[position] for position in _draw(generator, possible, count)]
    drawn: set[Members] = set()
    while len(drawn) < count:
        drawn.add(_draw(generator, num_experts, k))
    return sorted(drawn)


@register_strategy("file")
def from_file(num_experts: int, *, path: str) -> list[Members]:
    """Read a JSON list of member lists, in the order of the file; a hyperedge may have one member.

    A relative path starts at the current folder.

    Raises:
        ValueError: a file that is none, or a hyperedge that is none; names the file and the line.
    """
    return read_hyperedges(path, num_experts)


def _check_k(k: int) -> None:
    if k < 2:
        raise ValueError(f"k is {k}; it must be at least 2: a hyperedge of one expert has nobody to talk to.")


def _draw(generator: random.Random, n: int, count: int) -> Members:
    """Return ``count`` of 0 to n − 1, sorted, every choice as likely (Floyd's algorithm).

    It uses ``Random.random`` only, whose sequence Python promises to keep.
    """
    chosen: set[int] = set()
    for last in range(n - count, n):
        pick = int(generator.random() * (last + 1))
        chosen.add(last if pick in chosen else pick)
    return tuple(sorted(chosen))


def static_hyperedges(num_experts: int, strategy: str) -> list[Members]:
    """Return the members of each hyperedge; an empty list where E is too small to have any.

    Raises:
        ValueError: there is no such strategy, it cannot have these arguments, or E is negative.
    """
    name, arguments = _parse(strategy)
    if num_experts < 0:
        raise ValueError(f"num_experts is {num_experts}; it must not be negative.")
    return STRATEGIES[name](num_experts, **arguments)


def strategy_identity(strategy: str) -> str:
    """Return one text for every spelling of a strategy, with all that can change its hyperedges.

    All arguments stand in the order of the signature; for a file, a hash of its member lists.

    Raises:
        ValueError: as ``static_hyperedges``, but for numbers that only the strategy itself refuses.
    """
    name, arguments = _parse(strategy)
    if name == "file":
        members = json.dumps(read_hyperedges(**arguments))
        arguments = {"sha256": hashlib.sha256(members.encode()).hexdigest()[:12]}
    listed = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name}:{listed}" if listed else name


def strategy_arguments(name: str) -> dict[str, Any]:
    """Return each argument's default, in the order of the signature; ``REQUIRED`` where it has none.

    Raises:
        ValueError: there is no such strategy.
    """
    return {key: parameter.default for key, parameter in _parameters(name).items()}


def default_strategies() -> list[str]:
    """Return the names that can stand without arguments."""
    return [name for name in STRATEGIES if REQUIRED not in strategy_arguments(name).values()]


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    if name not in STRATEGIES:
        raise ValueError(unknown_name("static_hyperedge_strategy", name, STRATEGIES))
    parameters = inspect.signature(STRATEGIES[name], eval_str=True).parameters
    return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _parse(strategy: str) -> tuple[str, dict[str, Any]]:
    """Return the name, and every argument with its value, in the order of the signature."""
    name, colon, text = strategy.partition(":")
    parameters = _parameters(name)
    try:
        given = _given(text, parameters) if colon else {}
        return name, {key: _value(parameter, given.get(key)) for key, parameter in parameters.items()}
    except ValueError as error:
        raise ValueError(f"strategy {strategy!r}: {error}. {_usage(name, parameters)}.") from None


def _usage(name: str, parameters: dict[str, inspect.Parameter]) -> str:
    if not parameters:
        return f"{name} takes no arguments; write {name!r}"
    takes = [f"{key} ({'required' if p.default is REQUIRED else f'default {p.default}'})"
             for key, p in parameters.items()]  # fmt: skip
    first, parameter = next(iter(parameters.items()))
    example = f"{name}:edges.json" if parameter.annotation is str else f"{name}:{first}=3"
    return f"{name} takes {', '.join(takes)}; for example {example!r}"


def _given(text: str, parameters: dict[str, inspect.Parameter]) -> dict[str, str]:
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
            raise ValueError(f"there is no argument {key!r}")
        if key in given:
            raise ValueError(f"{key} is given twice")
        given[key] = value
    return given


def _value(parameter: inspect.Parameter, text: str | None) -> Any:
    """Return ``text`` as the type of the parameter's annotation; its default where there is no text."""
    if text is None and parameter.default is not REQUIRED:
        return parameter.default
    if not text:
        raise ValueError(f"{parameter.name} has no value")
    types = get_args(parameter.annotation) or (parameter.annotation,)
    if text == "None" and NoneType in types:
        return None
    if int not in types:
        return text
    try:
        return int(text)
    except ValueError:
        kind = "a whole number or None" if NoneType in types else "a whole number"
        raise ValueError(f"{parameter.name} is {text!r}; it must be {kind}") from None
