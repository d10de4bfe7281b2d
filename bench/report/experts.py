"""What the experts learned, over the seeds of a study, beside the baseline coupler.

How alike are the experts, does the coupler change that, does any expert matter, do experts serve different
tokens? Only runs that count and have diagnostics are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import special

from bench.record import Diagnostics, is_measured, number
from bench.report.comparison import Comparison, ComparisonRow
from bench.report.matching import read_matching
from bench.report.quantities import EXPERTS, Rise, counted, digits_for, largest_rise, p_value, rises
from bench.report.statistics import Paired, holm, paired_family, significant_side
from bench.report.tables import Cells, Table, make_table
from bench.study.hypotheses import ALPHA
from bench.study.runs import Configuration

COSINE, RANK, CKA = (EXPERTS[name] for name in ("expert_cosine", "effective_rank", "expert_cka"))
RISE, INFORMATION = EXPERTS["ablation_nats"], EXPERTS["mutual_information"]
EFFECTIVE = EXPERTS["effective_experts"]


@dataclass(frozen=True)
class Ablation:
    """What one run loses when the mean of the other experts replaces the output of one expert."""

    seed: int
    largest: Rise
    """The largest rise of the validation loss over all experts and layers."""
    significant: int
    """How many experts matter: their rise has p ≤ 0.05, one-sided, with Holm's correction over ``of``."""
    of: int
    """The number of experts in all layers."""


@dataclass(frozen=True)
class Change:
    """A quantity of a configuration beside the baseline's, over the seeds that both have."""

    ours: float
    theirs: float
    paired: Paired
    p_adjusted: float
    """By Holm over the configurations."""

    @property
    def side(self) -> int:
        """The sign of a significant difference, else 0."""
        return significant_side(self.paired, self.p_adjusted)

    def words(self) -> str:
        """Return both means, the number of seeds and p."""
        digits = digits_for(abs(self.ours - self.theirs))
        both = f"{number(self.ours, digits)} against {number(self.theirs, digits)}"
        return f"{both}, {counted(self.paired.n, 'seed')}, p {p_value(self.p_adjusted)}"


@dataclass(frozen=True)
class ExpertsRow:
    """What the experts of one configuration learned."""

    row: ComparisonRow
    learned: dict[int, Diagnostics]
    """By seed."""
    changes: dict[str, Change]
    """By the name of the quantity; empty for the baseline."""

    @property
    def label(self) -> str:
        """The label of the configuration."""
        return self.row.configuration.label

    @property
    def experts(self) -> int:
        """The number of experts of a layer."""
        return len(next(iter(self.learned.values())).layers[0].cosine)

    @cached_property
    def ablations(self) -> list[Ablation]:
        """The ablation of each run."""
        return [ablation(seed, found) for seed, found in self.learned.items()]

    @property
    def largest(self) -> Ablation:
        """The run with the largest rise of the loss."""
        return max(self.ablations, key=lambda found: found.largest.nats)

    @property
    def seeds_that_matter(self) -> int:
        """The number of seeds in which at least one expert matters."""
        return sum(found.significant > 0 for found in self.ablations)

    def loads(self) -> list[float]:
        """Return the load of every expert of every layer and run."""
        layers = [layer for found in self.learned.values() for layer in found.layers]
        return [load for layer in layers if is_measured(layer.load) for load in layer.load]


@dataclass(frozen=True)
class ExpertsReading:
    """What the experts learned in the configurations of one comparison."""

    comparison: Comparison
    rows: list[ExpertsRow]
    """The configurations with diagnostics, in the order of the comparison."""
    uses_all: bool
    """Whether the baseline gives all experts equal shares in every seed, as a mean does."""

    @property
    def baseline(self) -> str:
        """The label of the baseline."""
        return self.comparison.reference.label

    def sentences(self) -> list[str]:
        """Return what the experts learned, in sentences."""
        parts = (
            self._changed(),
            self._matter(),
            self._specialised(),
            self._used(),
            self._missing(),
            self._unmatched(),
        )
        return [_alike(self.rows[0]), *(text for part in parts for text in part)]

    def line(self) -> str:
        """Return the answer in at most three lines of a terminal."""
        sides = [row.changes[COSINE.name].side for row in self.rows if COSINE.name in row.changes]
        first = "the baseline" if self.rows[0].label == self.baseline else "the first configuration"
        cosine = COSINE.show(self.rows[0].row.means[COSINE].mean)
        text = f"experts: cosine of their updates {cosine} with {first}"
        if sides:
            more, less = sides.count(1), sides.count(-1)
            text += f"; of {counted(len(sides), 'other configuration')}, {more} make them significantly "
            text += f"more alike and {less} less alike"
        rise = RISE.show(self._largest().largest.largest.nats)
        return f"{text}; without one expert the loss rises by at most {rise} nats"

    def table(self, suffix: str = "") -> Table:
        """Return a row for each configuration with the six quantities and the experts that matter."""
        changes = [[row.changes.get(name) for row in self.rows] for name in EXPERTS]
        family = max(sum(one is not None and one.paired.n > 1 for one in some) for some in changes)
        notes = [
            f"p is of the difference from {self.baseline}: a sign-flip test over paired seeds, with Holm's "
            f"correction over all comparisons of a quantity (at most {family}).",
            "An expert matters if the validation loss rises significantly when the mean of the other experts "
            "replaces its output. Holm's correction is over all experts of a run.",
        ]
        rows = [(_figures(row), _texts(row)) for row in self.rows]
        caption = "Experts: means over layers and seeds"
        if family:
            caption += f", with p of the difference from {self.baseline}"
        if self.uses_all:
            notes.append(
                f"With {self.baseline} all {self.rows[0].experts} experts have equal shares in every seed. "
                "No coupler can use more, so no difference of the effective number is tested."
            )
        return make_table(f"experts{suffix}", caption, rows, notes=notes if family else notes[1:])

    def _largest(self) -> ExpertsRow:
        return max(self.rows, key=lambda row: row.largest.largest.nats)

    def _changed(self) -> Iterator[str]:
        verdicts = {
            1: "more alike than",
            -1: "less alike than",
            0: "not significantly more or less alike than",
        }
        for row in self.rows:
            if change := row.changes.get(COSINE.name):
                verdict = f"the experts are {verdicts[change.side]} with {self.baseline}"
                yield f"With {row.label} {verdict}: cosine {change.words()}."
        judged = [(row.label, row.changes[CKA.name]) for row in self.rows if CKA.name in row.changes]
        differ = [(label, change) for label, change in judged if change.side]
        for label, change in differ:
            yield f"With {label} the experts have another CKA than with {self.baseline}: {change.words()}."
        if judged and not differ:
            yield f"No configuration has a significantly different CKA of its experts than {self.baseline}."

    def _matter(self) -> Iterator[str]:
        row = self._largest()
        found, where = row.largest.largest, f"{row.label}, seed {row.largest.seed}"
        yield (
            f"The loss rises most without expert {found.expert} of layer {found.layer} ({where}): "
            f"by {RISE.show(found.nats)} nats, standard error {RISE.show(found.standard_error)}."
        )
        some = [row for row in self.rows if 0 < row.seeds_that_matter < len(row.learned)]
        every = [row.label for row in self.rows if row.seeds_that_matter == len(row.learned)]
        none = [row.label for row in self.rows if not row.seeds_that_matter]
        parts = [f"{row.label} ({row.seeds_that_matter} of {len(row.learned)})" for row in some]
        partly = any(len(row.learned) < len(row.row.configuration.counted) for row in self.rows)
        for head, labels in (
            (f"In every {'measured ' * partly}seed at least one expert matters with", every),
            ("In some seeds at least one expert matters with", parts),
            ("No expert matters with", none),
        ):
            if labels:
                yield f"{head}: {', '.join(labels)}."

    def _specialised(self) -> Iterator[str]:
        for row in self.rows:
            mean, loads = row.row.means[INFORMATION].mean, row.loads()
            if mean is not None and loads:
                of = f"{INFORMATION.show(mean)} nats of at most {INFORMATION.show(math.log(row.experts))}"
                ends = f"{number(min(loads), 2)} to {number(max(loads), 2)}"
                yield (
                    f"With {row.label} the mutual information of token and expert is {of}; loads are {ends}."
                )

    def _used(self) -> Iterator[str]:
        found = [
            (mean, row.label) for row in self.rows if (mean := row.row.means[EFFECTIVE].mean) is not None
        ]
        if found:
            known = {EFFECTIVE.show(value) for value, _ in found}
            if len(known) == 1:
                yield f"The effective number of experts is {known.pop()} with every configuration."
                return
            ends = [f"{EFFECTIVE.show(value)} ({label})" for value, label in (min(found), max(found))]
            yield f"The effective number of experts is between {' and '.join(ends)}."

    def _missing(self) -> Iterator[str]:
        for row in self.comparison.rows:
            found = [run.record.diagnostics for run in row.configuration.counted.values()]
            missing = [one.reason for one in found if not is_measured(one)]
            seeds = counted(len(found), "seed")
            many = f" in {len(missing)} of {seeds}" if len(missing) < len(found) else ""
            if missing:
                why = "; ".join(dict.fromkeys(missing))
                yield f"The experts of {row.configuration.label} were not measured{many}: {why}."

    def _unmatched(self) -> Iterator[str]:
        for matching in read_matching(self.comparison):
            if matching.notes:
                yield f"Experts of {matching.configuration.label} over seeds: {' '.join(matching.notes)}"


def read_experts(comparison: Comparison) -> ExpertsReading | None:
    """Return what the experts of a comparison learned; None where no run has diagnostics."""
    learned = [(row, _learned(row.configuration)) for row in comparison.rows]
    uses_all = _uses_all(learned[0][1])
    tested = [name for name in EXPERTS if name != EFFECTIVE.name or not uses_all]
    changes = {name: _changes(comparison, name) for name in tested}
    rows = [
        ExpertsRow(
            row,
            found,
            {name: some[id(row)] for name, some in changes.items() if id(row) in some},
        )
        for row, found in learned
        if found
    ]
    return ExpertsReading(comparison, rows, uses_all) if rows else None


def ablation(seed: int, found: Diagnostics) -> Ablation:
    """Return the largest rise of the loss of a run and how many experts matter.

    A rise is a mean over tokens, so p comes from its standard error and the normal distribution.
    """
    every = rises(found)
    p_values = [float(special.ndtr(-nats / error)) if error > 0 else 1.0 for nats, error, *_ in every]
    return Ablation(seed, largest_rise(found), sum(p <= ALPHA for p in holm(p_values)), len(every))


def _learned(configuration: Configuration) -> dict[int, Diagnostics]:
    found = {seed: run.record.diagnostics for seed, run in configuration.counted.items()}
    return {seed: one for seed, one in found.items() if is_measured(one)}


def _uses_all(learned: dict[int, Diagnostics]) -> bool:
    layers = [layer for found in learned.values() for layer in found.layers]
    used = [layer.effective_experts for layer in layers]
    return bool(used) and all(is_measured(one) and one > len(layers[0].cosine) - 1e-6 for one in used)


def _changes(comparison: Comparison, name: str) -> dict[int, Change]:
    """Return by ``id`` of its row the change of a quantity from the baseline, judged together."""
    base, known = comparison.rows[0].means[EXPERTS[name]].values, []
    for row in comparison.rows[1:]:
        own = row.means[EXPERTS[name]].values
        if seeds := sorted(own.keys() & base.keys()):
            known.append((id(row), np.array([own[s] for s in seeds]), np.array([base[s] for s in seeds])))
    judged = paired_family([ours - theirs for _, ours, theirs in known])
    return {
        key: Change(float(ours.mean()), float(theirs.mean()), *found)
        for (key, ours, theirs), found in zip(known, judged, strict=True)
    }


def _alike(row: ExpertsRow) -> str:
    cosine, cka, rank = (found.show(row.row.means[found].mean) for found in (COSINE, CKA, RANK))
    return (
        f"With {row.label} the updates of two experts have cosine {cosine} and CKA {cka}. Their effective "
        f"rank is {rank} of {row.experts} ({counted(len(row.learned), 'seed')})."
    )


def _figures(row: ExpertsRow) -> Cells:
    cells: Cells = {"configuration": row.label, "n": len(row.learned)}
    for name, quantity in EXPERTS.items():
        change = row.changes.get(name)
        low, high = (change and change.paired.interval) or (None, None)
        cells |= {
            name: row.row.means[quantity].mean,
            f"{name}_difference": change and change.paired.mean,
            f"{name}_difference_low": low,
            f"{name}_difference_high": high,
            f"{name}_p_holm": change and change.p_adjusted,
        }
    found = row.largest.largest
    return cells | {
        "largest_rise_nats": found.nats,
        "largest_rise_standard_error_nats": found.standard_error,
        "experts_that_matter": sum(one.significant for one in row.ablations),
        "experts_tested": sum(one.of for one in row.ablations),
    }


def _texts(row: ExpertsRow) -> Cells:
    def text(name: str) -> str:
        change, value = row.changes.get(name), EXPERTS[name].show(row.row.means[EXPERTS[name]].mean)
        return f"{value} (p {p_value(change.p_adjusted)})" if change else value

    matter = [one.significant for one in row.ablations]
    return {
        "configuration": row.label,
        "n": str(len(row.learned)),
        **{quantity.title: text(name) for name, quantity in EXPERTS.items()},
        "largest rise (nats)": RISE.show(row.largest.largest.nats),
        "experts that matter": f"{sum(matter)} of {sum(one.of for one in row.ablations)}",
    }
