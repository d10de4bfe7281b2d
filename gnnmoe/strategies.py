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
from typing import Any

from gnnmoe.config import Refused
from gnnmoe.hyperedge_file import read_hyperedges
from gnnmoe.naming import unknown_name
from gnnmoe.strategy_text import Parameters, read_arguments

Members = tuple[int, ...]  # sorted
Strategy = Callable[..., list[Members]]
MOST_HYPEREDGES = 100_000

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
    """One hyperedge of all experts; none where there is only one expert to talk to itself."""
    return [tuple(range(num_experts))] if num_experts > 1 else []


@register_strategy("k_subsets")
def k_subsets(num_experts: int, *, k: int = 3) -> list[Members]:
    """Every k experts, in lexicographic order: C(E, k) hyperedges. Refused where k < 2."""
    _check_k(k)
    return _subsets(num_experts, k)


@register_strategy("ring")
def ring(num_experts: int, *, k: int = 2) -> list[Members]:
    """Hyperedge i holds experts i to i + k − 1 modulo E; one where E = k. Refused where k < 2."""
    _check_k(k)
    if num_experts <= k:
        return [tuple(range(k))] if num_experts == k else []
    _refuse_too_many(num_experts)
    return [tuple(sorted((i + j) % num_experts for j in range(k))) for i in range(num_experts)]


@register_strategy("random")
def random_subsets(num_experts: int, *, k: int = 3, m: int | None = None, seed: int = 0) -> list[Members]:
    """Draw m different hyperedges of k experts, every choice as likely, in lexicographic order.

    ``m`` None is as many as experts, or all where there are fewer. The draw follows from the
    arguments alone. Some experts may be in no hyperedge. Warns where there are fewer than m.

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

    A relative path starts at the current folder.

    Raises:
        Refused: a file that is none, or a hyperedge that is none; names the file and the line.
    """
    return read_hyperedges(path, num_experts)


def _check_k(k: int) -> None:
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
        Refused: there is no such strategy, it cannot have these arguments, E is negative, or there
            would be more than ``MOST_HYPEREDGES``.
    """
    name, arguments = _parse(strategy)
    if num_experts < 0:
        raise Refused(f"num_experts is {num_experts}; it must not be negative.")
    members = STRATEGIES[name](num_experts, **arguments)
    _refuse_too_many(len(members))  # of a file, or of a strategy that does not ask
    return members


def strategy_identity(strategy: str, num_experts: int | None = None) -> str:
    """Return one text for every spelling of a strategy, with all that can change its hyperedges.

    All arguments stand in the order of the signature; for a file, a hash of its member lists. With
    ``num_experts`` the m of ``random`` is the number of hyperedges that it draws.

    Raises:
        Refused: as ``static_hyperedges``, but for numbers that only the strategy itself refuses.
    """
    name, arguments = _parse(strategy)
    if name == "file":
        members = json.dumps(read_hyperedges(**arguments))
        arguments: dict[str, Any] = {"sha256": hashlib.sha256(members.encode()).hexdigest()[:12]}
    if name == "random" and num_experts is not None:
        _check_k(arguments["k"])
        arguments["m"] = _number_drawn(num_experts, arguments["k"], arguments["m"])
    listed = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name}:{listed}" if listed else name


def _parameters(name: str) -> Parameters:
    if name not in STRATEGIES:
        raise Refused(unknown_name("static_hyperedge_strategy", name, STRATEGIES))
    parameters = inspect.signature(STRATEGIES[name], eval_str=True).parameters
    return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _parse(strategy: str) -> tuple[str, dict[str, Any]]:
    """Return the name, and every argument with its value, in the order of the signature."""
    name, colon, text = strategy.partition(":")
    return name, read_arguments(name, text if colon else None, _parameters(name))
