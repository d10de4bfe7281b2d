"""Strategies: which of E experts share a hyperedge. Imports no torch.

A strategy is written ``name`` or ``name:argument=value,argument=value``: ``random:k=3,m=8,seed=1``.
The first argument may stand without its name (``k_subsets:4``, ``file:edges.json``). Where the only argument
is text, it takes everything after the colon, so that a path may contain ``=`` and ``,``.
A function from outside is written with its place: ``path/to/file.py:star:hub=1`` or ``package.module:star``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import re
import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from gnnmoe.config import Refused, brief, shortened
from gnnmoe.discovery import Loaded, Registry
from gnnmoe.reading import from_home, read_bytes

Members = tuple[int, ...]  # sorted
Strategy = Callable[..., list[Members]]
Parameters = dict[str, inspect.Parameter]
MOST_HYPEREDGES = 100_000
BLANKS = " \t\r\n"  # of JSON
REQUIRED = inspect.Parameter.empty

OUTSIDE = re.compile(r"(.+?\.py:[^:]*|[^:]+:[A-Za-z_]\w*)(:.*)?", re.DOTALL)
"""A function with its place, then its arguments."""
CALLED = "a strategy is a function such as star(num_experts: int, *, hub: int = 0)"


def check_strategy(strategy: Any, name: str) -> None:
    """Refuse what is not a function from E to member lists.

    Raises:
        Refused: it is no function, or its parameters are not those of a strategy.
    """
    if not inspect.isfunction(strategy):
        raise Refused(f"strategy {name!r} is no function; {CALLED}.")
    first, *arguments = inspect.signature(strategy).parameters.values() or (None,)
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        raise Refused(f"strategy {name!r} does not take the number of experts first; {CALLED}.")
    for argument in arguments:
        if argument.kind is not argument.KEYWORD_ONLY:
            raise Refused(f"strategy {name!r} takes {argument} by position; {CALLED}.")


STRATEGIES: Registry[Strategy] = Registry(
    "static_hyperedge_strategy", "gnnmoe.strategies", None, check_strategy, inspect.isfunction
)


def register_strategy(name: str) -> Callable[[Loaded], Loaded]:
    """Return a decorator that makes a named strategy of a function from E to member lists.

    The function's keyword-only parameters, annotated int, int | None or str, are the strategy's arguments.
    It returns an empty list where E is too small for it.

    Raises:
        Refused: another function has this name, or the function has other parameters.
    """
    return STRATEGIES.registering(name)


@register_strategy("all_pairs")
def all_pairs(num_experts: int) -> list[Members]:
    """Every pair of experts, in lexicographic order: E (E − 1) / 2 hyperedges."""
    return _subsets(num_experts, 2)


@register_strategy("all_triplets")
def all_triplets(num_experts: int) -> list[Members]:
    """Every three experts, in lexicographic order: E (E − 1) (E − 2) / 6 hyperedges."""
    return _subsets(num_experts, 3)


@register_strategy("pairs_and_triplets")
def pairs_and_triplets(num_experts: int) -> list[Members]:
    """All pairs, then all triplets."""
    _refuse_too_many(math.comb(num_experts, 2) + math.comb(num_experts, 3))
    return all_pairs(num_experts) + all_triplets(num_experts)


@register_strategy("all")
def all_experts(num_experts: int) -> list[Members]:
    """One hyperedge of all experts; a single expert has no hyperedge."""
    return [tuple(range(num_experts))] if num_experts > 1 else []


@register_strategy("k_subsets")
def k_subsets(num_experts: int, *, k: int = 3) -> list[Members]:
    """Every k experts, in lexicographic order: C(E, k) hyperedges. Refuses k < 2."""
    _check_k(k)
    return _subsets(num_experts, k)


@register_strategy("ring")
def ring(num_experts: int, *, k: int = 2) -> list[Members]:
    """Hyperedge i holds experts i to i + k − 1 modulo E; with E = k there is one. Refuses k < 2."""
    _check_k(k)
    if num_experts <= k:
        return [tuple(range(k))] if num_experts == k else []
    _refuse_too_many(num_experts)
    return [tuple(sorted((i + j) % num_experts for j in range(k))) for i in range(num_experts)]


@register_strategy("random")
def random_subsets(num_experts: int, *, k: int = 3, m: int | None = None, seed: int = 0) -> list[Members]:
    """Draw m different hyperedges of k experts, uniformly, in lexicographic order.

    With ``m`` None there are as many hyperedges as experts, or all C(E, k) where these are fewer. The
    arguments alone decide the draw. Some experts may be in no hyperedge. Warns where fewer than m exist.

    Raises:
        Refused: k < 2, m < 1 or seed < 0.
    """
    _check_k(k)
    if m is not None and m < 1:
        raise Refused(f"m is {m}; it must be at least 1, or None for as many as experts.")
    if seed < 0:
        raise Refused(f"seed is {seed}; it must not be negative.")
    possible = math.comb(num_experts, k)
    if m is not None and m > possible > 0:
        there_are = f"hyperedges of {k} out of {num_experts} experts: {possible}, all of them taken."
        warnings.warn(f"random: m is {m}; {there_are}", stacklevel=2)
    count, generator = _number_drawn(num_experts, k, m), random.Random(seed)
    _refuse_too_many(count)
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

    A relative path starts at the current folder, and ~ is the home folder.

    Raises:
        Refused: the file or one of its hyperedges is invalid; names the file and the line.
    """
    return read_hyperedges(path, num_experts)


def _check_k(k: int) -> None:
    """Refuse hyperedges of fewer than two experts."""
    if k < 2:
        raise Refused(f"k is {k}; it must be at least 2: a hyperedge of one expert has nobody to talk to.")


def _subsets(num_experts: int, k: int) -> list[Members]:
    _refuse_too_many(math.comb(num_experts, k))
    return list(combinations(range(num_experts), k))


def _number_drawn(num_experts: int, k: int, m: int | None) -> int:
    return min(num_experts if m is None else m, math.comb(num_experts, k))


def _refuse_too_many(count: int) -> None:
    """Refuse a number of hyperedges above the limit, before any of them is made."""
    if count > MOST_HYPEREDGES:
        number = f"{count:,}" if count < 10**18 else f"about 10^{math.log10(count):.0f}"
        raise Refused(
            f"the strategy has {number} hyperedges with so many experts; at most {MOST_HYPEREDGES:,} are "
            "allowed: take fewer experts, or draw some, as in random:k=3,m=1000."
        )


def _draw(generator: random.Random, n: int, count: int) -> Members:
    """Return ``count`` of the numbers 0 to n − 1, sorted, drawn uniformly (Floyd's algorithm).

    Only ``Random.random`` is used: Python promises to keep its sequence.
    """
    chosen: set[int] = set()
    for last in range(n - count, n):
        pick = int(generator.random() * (last + 1))
        chosen.add(last if pick in chosen else pick)
    return tuple(sorted(chosen))


def static_hyperedges(num_experts: int, strategy: str) -> list[Members]:
    """Return the members of each hyperedge, sorted; an empty list where E is too small to have any.

    Raises:
        Refused: there is no such strategy, it cannot have these arguments, it raises an exception, E is
            negative, a hyperedge is no list of different experts, or there are more hyperedges than
            ``MOST_HYPEREDGES``.
    """
    _, function, arguments = _parse(strategy)
    if num_experts < 0:
        raise Refused(f"num_experts is {num_experts}; it must not be negative.")
    try:
        members = [tuple(sorted(edge)) for edge in function(num_experts, **arguments)]
    except Refused:
        raise
    except Exception as error:  # the function may be anybody's
        raise Refused(
            f"strategy {strategy!r} fails with {num_experts} experts ({type(error).__name__}: {error}); "
            "give it other arguments, or mend the function."
        ) from error
    _refuse_too_many(len(members))  # in a file, or from a strategy that does not check
    for edge in members:
        if not edge or len(set(edge)) < len(edge) or edge[0] < 0 or edge[-1] >= num_experts:
            problem = _problem(list(edge), num_experts)
            raise Refused(f"strategy {strategy!r} gives the hyperedge {list(edge)}: {problem}.")
    return members


def strategy_identity(strategy: str, num_experts: int | None = None) -> str:
    """Return one text for all spellings of a strategy, with everything that can change its hyperedges.

    All arguments stand in the order of the signature. For a file of hyperedges, a hash of its member lists
    replaces the path. With ``num_experts``, such a hash also stands for a function from outside, and the m of
    ``random`` is the number of hyperedges that it draws.

    Raises:
        Refused: as ``static_hyperedges``, except for numbers that only the strategy itself refuses.
    """
    name, function, arguments = _parse(strategy)
    if name == "file":
        return f"file:sha256={_hash(read_hyperedges(**arguments))}"
    if name is None and num_experts is not None:
        return f"file:sha256={_hash(static_hyperedges(num_experts, strategy))}"
    if name == "random" and num_experts is not None:
        _check_k(arguments["k"])
        arguments["m"] = _number_drawn(num_experts, arguments["k"], arguments["m"])
    listed = ",".join(f"{key}={value}" for key, value in arguments.items())
    return ":".join(filter(None, [name or function.__name__, listed]))


def _hash(members: list[Members]) -> str:
    return hashlib.sha256(json.dumps(members).encode()).hexdigest()[:12]


def place_of(strategy: str) -> str | None:
    """Return place and name of a function from outside, without its arguments; None for other strategies."""
    found = None if strategy.partition(":")[0] in STRATEGIES else OUTSIDE.fullmatch(strategy)
    return found[1] if found else None


def strategy_function(strategy: str) -> Strategy:
    """Return the function behind the text of a strategy.

    Raises:
        Refused: as ``static_hyperedges``.
    """
    return _parse(strategy)[1]


# --- the text of a strategy --------------------------------------------------------------------------


def _parse(strategy: str) -> tuple[str | None, Strategy, dict[str, Any]]:
    """Return the name, the function, and every argument with its value, in the order of the signature.

    A function from outside has no name.

    Raises:
        Refused: there is no such strategy or argument, or an argument cannot have its value.
    """
    place = place_of(strategy)
    name, colon, text = strategy.removeprefix(place or "").partition(":")
    function = STRATEGIES.find(place or name)
    signature = inspect.signature(function, eval_str=True)
    parameters = {key: p for key, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    try:
        given = _given(text, parameters) if colon else {}
        values = {key: _value(parameter, given.get(key)) for key, parameter in parameters.items()}
    except Refused as error:
        raise Refused(f"strategy {strategy!r}: {error}. {_usage(place or name, parameters)}.") from None
    return None if place else name, function, values


def _usage(name: str, parameters: Parameters) -> str:
    """Return the sentence that lists the arguments of a strategy, with an example."""
    if not parameters:
        return f"{name} takes no arguments; write {name!r}"
    takes = [
        f"{key} ({'required' if p.default is REQUIRED else f'default {p.default}'})"
        for key, p in parameters.items()
    ]
    first, parameter = next(iter(parameters.items()))
    example = f"{name}:edges.json" if parameter.annotation is str else f"{name}:{first}=3"
    return f"{name} takes {', '.join(takes)}; for example {example!r}"


def _given(text: str, parameters: Parameters) -> dict[str, str]:
    """Return the text of each argument that ``text`` sets."""
    given: dict[str, str] = {}
    first, *others = parameters or [""]
    if first and not others and parameters[first].annotation is str:
        return {first: text.removeprefix(f"{first}=")}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and not given:
            key, value = first or key, key
        if key not in parameters:
            raise Refused(f"there is no argument {brief(key)}")
        if key in given:
            raise Refused(f"{key} is given twice")
        given[key] = value
    return given


def _value(parameter: inspect.Parameter, text: str | None) -> Any:
    """Return ``text`` in the type of the parameter's annotation, or the default where ``text`` is None."""
    if text is None and parameter.default is not REQUIRED:
        return parameter.default
    if not text:
        raise Refused(f"{parameter.name} has no value")
    plain = type(parameter.default) if parameter.annotation is REQUIRED else parameter.annotation
    types = get_args(plain) or (plain,)
    if text == "None" and NoneType in types:
        return None
    if int not in types:
        return text
    try:
        return int(text)
    except ValueError:
        kind = "a whole number or None" if NoneType in types else "a whole number"
        raise Refused(f"{parameter.name} is {brief(text)}; it must be {kind}") from None


# --- a file of hyperedges ------------------------------------------------------------------------------


def read_hyperedges(path: str, num_experts: float = math.inf) -> list[tuple[int, ...]]:
    """Return the hyperedges of a JSON file in the order of the file, the members of each sorted.

    Raises:
        Refused: there is no such file; it is not UTF-8 or not JSON; or it is not a list of different,
            non-empty lists of different experts from 0 to E − 1. Names the file and the line.
    """
    line_of: dict[tuple[int, ...], int] = {}
    for line, element in _elements(path, _text(path)):
        problem = _problem(element, num_experts)
        edge = () if problem else tuple(sorted(element))
        if edge in line_of:
            problem = f"hyperedge {list(edge)} is in line {line_of[edge]} already"
        if problem:
            raise Refused(f"{path}, line {line}: {problem}.")
        line_of[edge] = line
    return list(line_of)


def _text(path: str) -> str:
    try:
        data = read_bytes(from_home(Path(path), "the file of hyperedges"))
    except OSError as error:
        raise Refused(f"{path}: the file of hyperedges cannot be read ({error.strerror}).") from None
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refused(f"{path}, line {line}: not UTF-8 ({error.reason}).") from None


def _elements(path: str, text: str) -> list[tuple[int, Any]]:
    """Return each element of the outer list, together with the line on which it begins."""
    decoder, found, line = json.JSONDecoder(), [], 1
    try:
        whole = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise Refused(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of 5,000 digits
        raise Refused(f"{path}: not a list of lists of experts ({error}).") from None
    start = len(text) - len(text.lstrip(BLANKS))
    line += text.count("\n", 0, start)
    if not isinstance(whole, list):
        raise Refused(f"{path}, line {line}: not a list; the file must be a list of lists of experts.")
    end = start + 1
    for _ in whole:  # valid JSON: only blanks and commas stand between the elements
        start = end
        while text[start] in BLANKS + ",":
            start += 1
        line += text.count("\n", end, start)
        element, end = decoder.raw_decode(text, start)
        found.append((line, element))
        line += text.count("\n", start, end)
    return found


def _problem(element: Any, num_experts: float) -> str:
    """Return what is wrong with one hyperedge, or no text where it is valid."""
    if not isinstance(element, list):
        return f"{shortened(json.dumps(element))} is not a list; the file must be a list of lists of experts"
    for member in element:  # all types first: in Python, true equals 1
        if type(member) is not int:
            return f"member {shortened(json.dumps(member))} is not an integer"
    for member in element:
        if not 0 <= member < num_experts:
            count = "" if num_experts == math.inf else f" for {num_experts} experts"
            return f"member {shortened(str(member))} is out of range{count}; experts are counted from 0"
        if element.count(member) > 1:
            return f"member {member} is there more than once"
    return "" if element else "the hyperedge is empty"
