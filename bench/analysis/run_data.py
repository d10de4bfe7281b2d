"""What one run folder holds, read for the plots: nothing is computed here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.quantity import is_measured
from bench.records.schema import KEYS, Record

Row = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """The record, the history by kind of row, and the couplers' weights over time of one run."""

    record: Record
    train: list[Row]
    validation: list[Row]
    trace: dict[str, np.ndarray]
    """``step`` (T,) and, by ``layer_0.name``, values with time as first axis; empty without the file."""

    def parts(self, prefix: str) -> dict[int, dict[str, Any]]:
        """Return layer → name → value of the record's communication, for names that begin so."""
        communication = self.record["communication"]
        if not is_measured(communication):
            return {}
        found = {
            int(layer.removeprefix("layer_")): {
                name: value for name, value in parts.items() if name.startswith(prefix)
            }
            for layer, parts in communication.items()
        }
        return {layer: parts for layer, parts in found.items() if parts}

    def when(self) -> str:
        """Return, in words, the step whose state the record's communication describes."""
        return f"at step {self.record['quality']['best_step']:,}, the best on validation"


def read_record(folder: Path) -> Record:
    """Read the record of a run folder.

    Raises:
        ValueError: there is no record.json, or it is cut short or of another schema.
    """
    path = folder / "record.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no run folder: it holds no record.json.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is cut short: {error}.") from error
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is of another schema.")
    return record


def read_run(folder: Path) -> RunData:
    """Read a run folder; what is not there is empty.

    Raises:
        ValueError: as ``read_record``.
    """
    record, history = read_record(folder), _history(folder / "history.jsonl")
    return RunData(record, history["train"], history["validation"], _trace(folder / "communication.npz"))


def _history(path: Path) -> dict[str, list[Row]]:
    """Return the rows by kind and in the order of steps; of two rows for a step the later counts.

    A killed process can leave a last line cut short: it is passed over.
    """
    rows: dict[str, dict[int, Row]] = {"train": {}, "validation": {}}
    for row in _rows(path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()):
        rows.setdefault(row["kind"], {})[row["step"]] = row
    return {kind: [found[step] for step in sorted(found)] for kind, found in rows.items()}


def _rows(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _trace(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)
