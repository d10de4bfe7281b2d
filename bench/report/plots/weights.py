"""What couplers learned, by seed: hyperedge weights, and the share of each expert in the output.

Both are heat maps of seeds by members, so that agreement of the seeds shows as columns. Letters: S seeds,
M members (hyperedges or experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.record import MINUS
from bench.report.plots.frame import Frame
from bench.report.plots.maps import LEAST_RANGE, MOST_MAPS, Map, Texts, maps_figure, scale_of_maps
from bench.report.plots.style import Plot
from bench.report.quantities import counted, p_value
from bench.report.weights import WeightsReading, read_mixing, read_weights
from bench.study.runs import Configuration

WEIGHTS_NOTE = (
    "Columns of one colour: the seeds agree. τ: mean Kendall rank correlation of two seeds. Experts of "
    "different seeds start from different random numbers."
)


@dataclass(frozen=True)
class Learned:
    """What the seeds of a configuration learned in one layer."""

    configuration: Configuration
    layer: int
    members: Sequence[str]
    seeds: Sequence[int]
    values_SM: np.ndarray
    words: str = ""


def weights_plot(frame: Frame) -> Plot | None:
    """Return ``hyperedge_weights``, the learned weights by seed; None where no weight was learned."""
    readings = read_weights(frame.comparison)
    learned = [
        Learned(one.configuration, one.layer, one.members, one.seeds, one.weights_SM, _words(one))
        for one in readings
    ]
    agreeing = sum(one.agreement is not None and one.agreement.reproducible for one in readings)
    several = any(len(one.seeds) > 1 for one in readings)
    subject = (
        "Do the seeds agree on which hyperedges matter?" if several else "Hyperedge weights after training"
    )
    if learned and all(one.agreement for one in readings):
        layers = counted(len(learned), "layer")
        subject = f"The seeds agree on which hyperedges matter in {agreeing} of {layers}"
        matched = [one.matched_agreement for one in readings if one.matched_agreement]
        if matched:
            subject += f" by name, and in {sum(one.reproducible for one in matched)} on matched experts"
    middle = 1.0 if all(one.from_one for one in readings) else None
    unit = "weight" if middle is None else "weight (1 at the start)"
    texts = Texts(subject, WEIGHTS_NOTE * several, "seed", "hyperedge", unit)
    return _maps_plot(frame, "hyperedge_weights", learned, texts, middle)


def _words(reading: WeightsReading) -> str:
    """Return the agreement of the seeds, short enough for the title of a map."""
    by_name, on_matched = (
        f"τ {found.tau:+z.2f}, p {p_value(found.p)}".replace("-", MINUS) if found else ""
        for found in (reading.agreement, reading.matched_agreement)
    )
    return f"by name: {by_name}\nmatched: {on_matched}" if on_matched else by_name


def mixing_plot(frame: Frame) -> Plot | None:
    """Return ``mixing``, the share of each expert in the output; None where all shares are 1/E."""
    learned = []
    for one in read_mixing(frame.comparison):
        experts = one.shares_SLE.shape[2]
        members = [str(expert) for expert in range(experts)]
        learned += [
            Learned(one.configuration, layer, members, one.seeds, one.shares_SLE[:, place] * experts)
            for place, layer in enumerate(one.layers)
            if np.sqrt(np.mean((one.shares_SLE * experts - 1) ** 2)) > LEAST_RANGE
        ]
    subject = "Which experts does a coupler prefer?"
    note = "Share of the output by gradient, times the number of experts: 1 where all experts count equally."
    return _maps_plot(frame, "mixing", learned, Texts(subject, note, "seed", "expert", "share × E"), 1.0)


def _maps_plot(
    frame: Frame, name: str, learned: list[Learned], texts: Texts, middle: float | None
) -> Plot | None:
    """Return a plot with a map of seeds by members for each layer of the best configurations."""
    if not learned:
        return None
    maps = [Map(_title(frame, one), list(map(str, one.seeds)), one.members, one.values_SM) for one in learned]
    layers = len({one.layer for one in learned})
    columns = 2 * layers if layers < 3 else min(layers, 6)
    columns = min(columns, 4 if max(len(one.members) for one in learned[:MOST_MAPS]) <= 8 else 2)
    figure = maps_figure(frame, maps, texts, scale_of_maps(maps, middle), columns)
    table: list[list[Any]] = [
        [one.configuration.label, one.layer, seed, member, float(one.values_SM[y, x])]
        for one in learned
        for y, seed in enumerate(one.seeds)
        for x, member in enumerate(one.members)
    ]
    headings = ("configuration", "layer", "seed", texts.column, texts.unit.split(" (")[0])
    return Plot(name, figure, headings, table)


def _title(frame: Frame, one: Learned) -> str:
    title = f"{frame.names[one.configuration.label]}, layer {one.layer}"
    return "\n".join(filter(None, (title, one.words)))
