"""Where a run shows its numbers while it trains: one file per tracker, named as ``--track`` names it.

A tracker file has a class ``Tracker(prepared)`` with the methods of ``Tracker`` below. A tracker that fails
prints a note, and the run continues. Nothing reads a tracker's files: records, tables and plots come from the
run's own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from bench.record import Record, exp_or_infinity, is_measured
from gnnmoe.model import GNNMoELayer, GNNMoEModel

if TYPE_CHECKING:
    import numpy as np

    from bench.training.evaluation import CommunicationTrace

WEIGHTS, MIXING = "hyperedge_weights", "mixing"


class Tracker(Protocol):
    """What a run tells a tracker."""

    def begin(self, model: GNNMoEModel, trace: CommunicationTrace, done_steps: int) -> None:
        """Continue after ``done_steps`` steps; first write what is known by then and missing."""

    def row(self, row: dict[str, Any]) -> None:
        """Take a row of history.jsonl."""

    def sample(self, trace: CommunicationTrace) -> None:
        """Take the last sample of the couplers' weights."""

    def flush(self) -> None:
        """Write everything to the disk, before a checkpoint is saved."""

    def close(self) -> None:
        """Write what is left and stop all threads."""

    def finish(self, record: Record) -> None:
        """Take the record of the run at its end."""


def members_of(model: GNNMoEModel) -> dict[str, list[str]]:
    """Return the names of the hyperedges of each layer, such as ``{0,2}``, by ``layer_0``."""
    found = {}
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, GNNMoELayer)
        found[f"layer_{number}"] = layer.coupler.member_names().get(WEIGHTS, [])
    return found


def values_of_row(row: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a row of history.jsonl by name.

    The names are train/loss, train/learning_rate, train/gradient_norm, validation/loss (nats per token) and
    validation/perplexity.
    """
    if row["kind"] == "train":
        values = {name: row[name] for name in ("loss", "learning_rate", "gradient_norm")}
    else:
        loss = row["nll_sum"] / row["tokens"]
        values = {"loss": loss, "perplexity": exp_or_infinity(loss)}
    return {f"{row['kind']}/{name}": value for name, value in values.items()}


def values_of_sample(
    arrays: dict[str, np.ndarray], place: int, members: Mapping[str, list[str]]
) -> dict[str, float]:
    """Return a sample of the couplers' weights by names such as hyperedge_weights/layer_0/{0,2}."""
    found: dict[str, float] = {}
    for key, values in arrays.items():
        layer, _, part = key.partition(".")
        if part in (WEIGHTS, MIXING) and values.ndim == 2:
            row = values[place].tolist()
            names = members[layer] if part == WEIGHTS else []
            for name, value in zip(names or [f"E{e}" for e in range(len(row))], row, strict=True):
                found[f"{part}/{layer}/{name}"] = value
    return found


def results_of(record: Record) -> dict[str, float]:
    """Return the results of a run by name, without what was not measured."""
    found: dict[str, float] = {}
    for split in ("validation", "test"):
        if scored := record.split(split):
            found[f"{split} perplexity"] = exp_or_infinity(scored.loss_nats)
    if (scored := record.split()) and scored.unknown_words:
        found["validation unknown words (share)"] = scored.unknown_words / scored.tokens
    if is_measured(record.speed):
        found["tokens per second"] = record.speed.tokens_per_second
        found["median step (s)"] = record.speed.median_step_seconds
    if is_measured(record.memory) and is_measured(record.memory.peak_allocated_bytes):
        found["peak memory (bytes)"] = record.memory.peak_allocated_bytes
    if is_measured(record.parameters):
        found["parameters"] = record.parameters.total
    return found
