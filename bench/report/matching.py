"""Which experts of two seeds correspond: the numbers of experts mean nothing across seeds.

The experts of two seeds are matched by the debiased CKA of their updates on the same validation tokens: the
total CKA is the largest. Each two seeds have their own matching. Letters: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from bench.measure.similarity import debiased_cka, matched
from bench.record import is_measured, number
from bench.report.comparison import Comparison
from bench.study.run_files import EXPERTS
from bench.study.runs import Configuration, Run

HYPEREDGE = re.compile(r"\{\d{1,6}(,\d{1,6})*\}")


@dataclass(frozen=True)
class LayerMatch:
    """The experts of one layer, matched for each two seeds."""

    partners: dict[tuple[int, int], tuple[int, ...]]
    """By two seeds: for each expert of the first seed, the expert of the second seed."""
    matched_cka: float
    """The mean debiased CKA of matched experts. It exceeds ``all_cka`` even by chance, as a largest value."""
    all_cka: float
    """The mean debiased CKA of every expert of one seed with every expert of another seed."""

    def sentence(self) -> str:
        """Return how good the match is, in a sentence."""
        matched, every = number(self.matched_cka, 2), number(self.all_cka, 2)
        return f"The mean CKA is {matched} for matched experts and {every} for all pairs."


@dataclass(frozen=True)
class Matching:
    """The experts of one configuration, matched over its seeds; without a layer where that is impossible."""

    configuration: Configuration
    layers: dict[int, LayerMatch]
    notes: tuple[str, ...]
    """Sentences on what was left out, or on why nothing is matched."""


def read_matching(comparison: Comparison) -> list[Matching]:
    """Return the matching of each configuration whose runs measured their experts, in the rows' order."""
    found = (match_experts(row.configuration) for row in comparison.rows)
    return [one for one in found if one is not None]


def match_experts(configuration: Configuration) -> Matching | None:
    """Return the matching of a configuration; None for one seed, and where no run measured its experts.

    A run without usable features is left out. Nothing is matched where two runs may have kept other tokens.
    """
    runs = configuration.counted
    if len(runs) < 2 or not any(run.features or is_measured(run.record.diagnostics) for run in runs.values()):
        return None
    usable = {seed: run.features for seed, run in runs.items() if run.features}
    sound = {seed: features for seed, features in usable.items() if isinstance(features, dict)}
    notes = [f"Seed {seed} is left out: {_why(run)}." for seed, run in runs.items() if seed not in sound]
    if len(sound) < 2:
        return Matching(configuration, {}, (*notes, "Fewer than two seeds have features of experts."))
    if len({_tokens(runs[seed], features) for seed, features in sound.items()}) > 1:
        differ = "The experts are not matched: text, length, tokens or shapes of the features differ."
        return Matching(configuration, {}, (*notes, differ))
    layers = sorted(next(iter(sound.values())))
    found = {layer: _match({seed: features[layer] for seed, features in sound.items()}) for layer in layers}
    return Matching(configuration, found, tuple(notes))


def _why(run: Run) -> str:
    return run.features if isinstance(run.features, str) else f"it has no {EXPERTS}"


def _tokens(run: Run, features: dict[int, np.ndarray]) -> Any:
    """Return what must be equal for the features of two runs to be of the same tokens."""
    record, scored = run.record, run.record.split()
    return (
        record.data.sha256 if is_measured(record.data) else None,
        scored and scored.length,
        record.diagnostics.tokens if is_measured(record.diagnostics) else None,
        tuple((layer, found.shape) for layer, found in sorted(features.items())),
    )


def _match(features: dict[int, np.ndarray]) -> LayerMatch:
    """Match the experts of each two seeds, from the features (E, n, D) by seed."""
    centred = {seed: _centred(found) for seed, found in features.items()}
    partners, chosen, every = {}, [], []
    for one, other in combinations(centred, 2):
        cka_EE = np.array(debiased_cka(centred[one], centred[other]))
        partners[one, other] = matched(cka_EE)
        chosen.append(cka_EE[range(len(cka_EE)), partners[one, other]].mean())
        every.append(cka_EE.mean())
    return LayerMatch(partners, float(np.mean(chosen)), float(np.mean(every)))


def _centred(features_END: np.ndarray) -> list[np.ndarray]:
    """Return the features (n, D) of each expert, centred over the tokens, float64."""
    features_END = features_END.astype(np.float64)
    return list(features_END - features_END.mean(1, keepdims=True))


def partner_hyperedges(members: Sequence[str], experts: Sequence[int]) -> list[int] | None:
    """Return for each hyperedge ({0,2}) the hyperedge of the partners of its experts, by places.

    None where a partner hyperedge does not exist: then the two seeds have no hyperedges in common that all
    play the same part, and the weights cannot be compared.
    """
    if not all(HYPEREDGE.fullmatch(name) for name in members):
        return None
    sets = [frozenset(map(int, name[1:-1].split(","))) for name in members]
    if max(map(max, sets)) >= len(experts):
        return None
    places = {found: place for place, found in enumerate(sets)}
    partners = [places.get(frozenset(experts[expert] for expert in found)) for found in sets]
    known = [place for place in partners if place is not None]
    return known if len(known) == len(partners) else None
