"""What hypergraphs learned, over the seeds of a study: hyperedge weights, and the experts' shares.

Only runs that count are read. The weights are those of the checkpoint that is best on validation, with which
the run was scored. Letters: S seeds, M members (hyperedges), T steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from bench.record import MINUS
from bench.report.comparison import Comparison
from bench.report.matching import Matching, match_experts, partner_hyperedges, read_matching
from bench.report.quantities import digits_for, number, p_value
from bench.report.statistics import Agreement, agreement
from bench.report.tables import Cells, Table, make_table
from bench.study.runs import Configuration, Run

WEIGHTS, MIXING = "hyperedge_weights", "mixing"
MATCHING_NOTE = (
    "CKA: debiased linear CKA of the experts' updates. Matched experts have the largest total, so their CKA "
    "is larger even by chance. τ: mean Kendall rank correlation of the hyperedge weights of two seeds."
)
NOT_CLOSED = "the hypergraph has no hyperedge for the partners of some hyperedge"
MOVED = 1e-5
"""A weight that changed by more has moved; records round to 1e-6."""


@dataclass(frozen=True)
class WeightsReading:
    """The hyperedge weights that the runs of one configuration learned in one layer."""

    configuration: Configuration
    layer: int
    members: tuple[str, ...]
    """The hyperedges by the experts in them: ``{0,2}``."""
    seeds: tuple[int, ...]
    weights_SM: np.ndarray
    """The weights of every run that counts."""
    from_one: bool
    """Whether a trace shows that all weights were 1 at the start."""
    matching: Matching | None = None
    """The experts of the configuration, matched over the seeds; None where no run measured them."""

    @cached_property
    def agreement(self) -> Agreement | None:
        """The agreement of the seeds on the order of the hyperedges by name.

        The experts of different seeds start from different random numbers, so that expert 0 of one seed need
        not be expert 0 of another: agreement is expected only if a position itself matters
        (``matched_agreement`` compares the hyperedges of corresponding experts).

        None for one seed or one hyperedge, and where fewer than two seeds have weights that differ.
        """
        return agreement(self.weights_SM)

    @cached_property
    def matched_agreement(self) -> Agreement | None:
        """The agreement of the seeds on the hyperedges of matched experts.

        The hyperedge {a, b} of a seed is compared with the hyperedge of the partners of a and b. None where
        the experts are not matched, a partner hyperedge does not exist, or ``agreement`` has no order.
        """
        partners = self._partners
        if not partners:
            return None
        seeds = sorted({seed for pair in partners for seed in pair}, key=self.seeds.index)
        by_place = {(seeds.index(s), seeds.index(t)): found for (s, t), found in partners.items()}
        return agreement(self.weights_SM[[self.seeds.index(seed) for seed in seeds]], by_place)

    @cached_property
    def _partners(self) -> dict[tuple[int, int], list[int]] | None:
        """By two seeds, the partner of each hyperedge; None where one does not exist."""
        match = self.matching and self.matching.layers.get(self.layer)
        pairs = combinations(self.seeds, 2) if match else ()
        found = {
            pair: partner_hyperedges(self.members, match.partners[pair])
            for pair in pairs
            if match and pair in match.partners
        }
        known = {pair: one for pair, one in found.items() if one is not None}
        return known if len(known) == len(found) else None

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest weight of any seed."""
        return float(self.weights_SM.min()), float(self.weights_SM.max())

    def agreement_words(self) -> str:
        """Return whether the seeds agree, in words."""
        if self.agreement is not None:
            return self.agreement.words()
        if len(self.seeds) == 1:
            return "one seed, so nothing to compare"
        return "one hyperedge, so no order to compare" if len(self.members) == 1 else "no order to compare"

    def sentence(self) -> str:
        """Return the range of the weights and whether the seeds agree on them, in a sentence."""
        low, high = self.range
        digits = digits_for(high - low) if high - low >= MOVED else 2
        low, high = number(low, digits), number(high, digits)
        where = (
            f"weights between {low} and {high}" if len(self.members) > 1 or low != high else f"weight {low}"
        )
        start = " (all 1 at the start)" if self.from_one else ""
        matched = self._matched_words() if self.agreement else ""
        head = f"{self.configuration.label}, layer {self.layer}: {where}{start}"
        return f"{head}; {'by name ' * bool(matched)}{self.agreement_words()}.{matched}"

    def _matched_words(self) -> str:
        """Return sentences on the agreement on matched experts; empty where no run measured its experts."""
        if self.matching is None:
            return ""
        match = self.matching.layers.get(self.layer)
        if match is None:
            return ""
        if self.matched_agreement is None:
            why = "no order to compare" if self._partners is not None else NOT_CLOSED
            return f" On matched experts nothing is compared: {why}."
        return f" On matched experts {self.matched_agreement.words()}. {match.sentence()}"


@dataclass(frozen=True)
class MixingReading:
    """The effective mixing of one configuration: the share of each expert in the output of each layer.

    The share is the mean over tokens of ‖∂y/∂x_e‖, normalised over the experts: 1/E if all experts count
    equally.
    """

    configuration: Configuration
    layers: tuple[int, ...]
    seeds: tuple[int, ...]
    shares_SLE: np.ndarray


def read_weights(comparison: Comparison) -> list[WeightsReading]:
    """Return a reading for each configuration, in the order of the comparison's rows, and layer.

    Weights that moved in no run (not learnable, or without effect) are left out.
    """
    return [reading for row in comparison.rows for reading in _weights(row.configuration)]


def matching_table(
    comparison: Comparison, weights: Sequence[WeightsReading], suffix: str = ""
) -> Table | None:
    """Return how well the experts of two seeds match, by configuration and layer; None without a match.

    Configurations with hyperedge weights (``weights``) also have both agreements.
    """
    learned = {(one.configuration.label, one.layer): one for one in weights}
    rows: list[tuple[Cells, Cells]] = []
    for matching in read_matching(comparison):
        label = matching.configuration.label
        for layer, match in matching.layers.items():
            reading = learned.get((label, layer))
            by_name, on_matched = (reading.agreement, reading.matched_agreement) if reading else (None, None)
            seeds = len({seed for pair in match.partners for seed in pair})
            figures = {
                "configuration": label, "layer": layer, "seeds": seeds,
                "cka_of_matched_experts": match.matched_cka, "cka_of_all_pairs": match.all_cka,
                "tau_by_name": by_name and by_name.tau, "p_by_name": by_name and by_name.p,
                "tau_matched": on_matched and on_matched.tau, "p_matched": on_matched and on_matched.p,
            }  # fmt: skip
            shown = {
                "configuration": label, "layer": layer, "seeds": seeds,
                "CKA, matched": number(match.matched_cka, 2), "CKA, all pairs": number(match.all_cka, 2),
                "τ by name": _tau(by_name), "τ, matched": _tau(on_matched),
            }  # fmt: skip
            rows.append((figures, shown))
    if not rows:
        return None
    return make_table(f"matching{suffix}", "Experts matched over seeds", rows, notes=[MATCHING_NOTE])


def _tau(found: Agreement | None) -> str:
    return "" if found is None else f"{found.tau:z.2f} (p {p_value(found.p)})".replace("-", MINUS)


def read_mixing(comparison: Comparison) -> list[MixingReading]:
    """Return the shares of the experts for each configuration that recorded them, in the rows' order."""
    readings = (_mixing(row.configuration) for row in comparison.rows)
    return [reading for reading in readings if reading is not None]


def _weights(configuration: Configuration) -> Iterator[WeightsReading]:
    found: dict[int, dict[int, dict[str, float]]] = {}  # layer → seed → weights by name
    for seed, run in configuration.counted.items():
        for layer, parts in run.data.parts(WEIGHTS).items():
            weights = parts.get(WEIGHTS)
            if isinstance(weights, dict) and weights:
                found.setdefault(layer, {})[seed] = weights
    matching = match_experts(configuration) if found else None
    for layer, by_seed in sorted(found.items()):
        members = tuple(next(iter(by_seed.values())))
        alike = {seed: weights for seed, weights in by_seed.items() if tuple(weights) == members}
        weights_SM = np.array([list(weights.values()) for weights in alike.values()], dtype=float)
        sampled = {seed: _trace(configuration.counted[seed], layer, len(members)) for seed in alike}
        traces = {seed: trace for seed, trace in sampled.items() if trace is not None}
        starts = {seed: weights_TM[0] for seed, (_, weights_TM) in traces.items()}
        first_SM = np.array([starts.get(seed, np.ones(len(members))) for seed in alike])
        if np.abs(weights_SM - first_SM).max() > MOVED:
            from_one = bool(starts) and bool(np.allclose(list(starts.values()), 1, atol=MOVED))
            seeds = tuple(alike)
            yield WeightsReading(configuration, layer, members, seeds, weights_SM, from_one, matching)


def _trace(run: Run, layer: int, members: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the steps (T,) and weights (T, M) that a run sampled; None without samples."""
    steps_T = run.data.trace.get("step", np.array([]))
    weights_TM = run.data.trace.get(f"layer_{layer}.{WEIGHTS}")
    if weights_TM is None or not len(steps_T) or weights_TM.shape != (len(steps_T), members):
        return None
    return steps_T, weights_TM.astype(float)


def _mixing(configuration: Configuration) -> MixingReading | None:
    found: dict[int, dict[int, list[float]]] = {}  # seed → layer → share by expert
    for seed, run in configuration.counted.items():
        parts = run.data.parts(MIXING)
        shares = {
            layer: list(named[MIXING].values())
            for layer, named in sorted(parts.items())
            if isinstance(named.get(MIXING), dict)
        }
        if shares and len({len(values) for values in shares.values()}) == 1:
            found[seed] = shares
    if not found:
        return None
    first = next(iter(found.values()))
    shapes = {
        seed: [(layer, len(values)) for layer, values in shares.items()] for seed, shares in found.items()
    }
    alike = [seed for seed, shape in shapes.items() if shape == next(iter(shapes.values()))]
    shares_SLE = np.array([list(found[seed].values()) for seed in alike], dtype=float)
    return MixingReading(configuration, tuple(first), tuple(alike), shares_SLE)
