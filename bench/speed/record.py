"""What ``bench.speed`` measured: rows with their units, what follows from them, and their folder.

The folder is ``results_dir/speed/name``. It is complete after every row. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from bench.files import cannot_write, kind_of, read_json, shown, utc_now, write_whole
from bench.measure.rates import paired_ratios, tokens_per_second, utilisation
from bench.record import Environment, Part, part_of
from gnnmoe.config import Refused

FOLDER, FILE, TABLE = "speed", "speed.json", "rows.csv"
VERSION = 1
TOLERANCE = {"fp32": 1e-5, "tf32": 3e-2, "bf16": 3e-2}
"""How far a result may be from the expected one, as a share of the largest expected value."""
LOOPS = ("loop", "reference()")
"""Forms that take one token or one expert after the other; the first of them that was timed counts."""
PYG = "pyg"
CURVE, PARITY, STEPS, HARNESS = "curve", "parity", "steps", "harness"
"""Cases that are shown in a way of their own."""
HARNESSED, BARE, FETCH = "harness", "bare loop", "fetching a batch"
"""The forms of the case ``HARNESS``."""


Count = Annotated[int, Field(ge=0, lt=2**63)]
Bytes = Annotated[int, Field(gt=-(2**63), lt=2**63)]


class SpeedRow(Part):
    """One form at one size. A quantity that was not measured is None; ``remark`` or ``error`` says why."""

    case: str
    """What is compared: the rows of a case were timed alternating in one process."""
    subject: str
    """The coupler, or what else is timed."""
    form: str
    device: str
    precision: Literal["fp32", "tf32", "bf16"]
    batch: Count = 0
    length: Count = 0
    experts: Count = 0
    width: Count = 0
    layers: Count = 0
    """Layers of the coupler if it is timed alone, otherwise of the model."""
    forward_seconds: list[PositiveFloat] = Field(default_factory=list)
    seconds: list[PositiveFloat] = Field(default_factory=list)
    """Every timed forward + backward of a coupler, or every timed whole step."""
    first_seconds: NonNegativeFloat | None = None
    """The first call alone, with any compilation."""
    peak_bytes: Bytes | None = None
    """Peak of the live tensors: of a coupler beyond its inputs and parameters, of a step all of them."""
    saved_bytes: Bytes | None = None
    """What the forward keeps for the backward, beyond inputs, parameters and the output."""
    flops: Count | None = None
    """FLOPs of forward + backward of this form, by formula."""
    matrix_flops_per_second: PositiveFloat | None = None
    """The best rate of large matrix products on this device in this process."""
    copy_bytes_per_second: PositiveFloat | None = None
    """The rate of a large copy, read and written, in this process."""
    floor_bytes: Count | None = None
    """What any form must move; ``floor_seconds`` takes the fewest FLOPs of the timed forms into account."""
    floor_seconds: NonNegativeFloat | None = None
    roofline_seconds: NonNegativeFloat | None = None
    largest_difference: NonNegativeFloat | None = None
    """Largest difference of output and gradients from the expected ones, over the largest expected value."""
    remark: str = ""
    error: str | None = None

    @property
    def tokens(self) -> int:
        """B·L."""
        return self.batch * self.length

    @property
    def median(self) -> float | None:
        """The median of ``seconds``, None if there are none."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def bytes_floor_seconds(self) -> float | None:
        """The floor by bytes alone, which all couplers of a size share."""
        return _over(self.floor_bytes, self.copy_bytes_per_second)

    @property
    def wrong(self) -> bool:
        """Whether the form computes something else; its time then means nothing."""
        found = self.largest_difference
        return found is not None and not found <= TOLERANCE[self.precision]

    @property
    def mfu(self) -> float | None:
        """The share of the matrix rate that a median step reaches, None if it is not known."""
        if self.error or self.median is None or self.flops is None or self.matrix_flops_per_second is None:
            return None
        return utilisation(self.flops / self.median, self.matrix_flops_per_second)

    @property
    def size(self) -> str:
        """The sizes in words."""
        return f"E {self.experts}, D {self.width}, B {self.batch}, L {self.length}"


Rows = Sequence[SpeedRow]


def ratio(over: SpeedRow, under: SpeedRow) -> float | None:
    """Return how many times longer ``over`` takes: the median over rounds.

    The ratio is that of the medians if the two rows have different numbers of rounds.
    """
    if over.median is None or under.median is None or over.wrong or under.wrong:
        return None
    if len(over.seconds) == len(under.seconds):
        return statistics.median(paired_ratios(over.seconds, under.seconds))
    return over.median / under.median


def spread(over: SpeedRow, under: SpeedRow) -> str:
    """Return the 10th and 90th percentile of the ratio over rounds as text; empty below three rounds."""
    if len(over.seconds) != len(under.seconds) or len(over.seconds) < 3:
        return ""
    low, high = np.percentile(paired_ratios(over.seconds, under.seconds), [10, 90])
    return f"{low:.3g} to {high:.3g}"


def derived(row: SpeedRow, rows: Rows) -> dict[str, float | None]:
    """Return by column what follows from a row and the rows that were timed beside it."""
    median, loop, pyg = row.median, _beside(row, rows, LOOPS), _beside(row, rows, (PYG,))
    forward = statistics.median(row.forward_seconds) if row.forward_seconds else None
    rate = tokens_per_second([row.tokens] * len(row.seconds), row.seconds) if row.seconds else None
    return {
        "forward_ms": _ms(forward),
        "median_ms": _ms(median),
        "floor_ms": _ms(row.floor_seconds),
        "roofline_ms": _ms(row.roofline_seconds),
        "over_floor": _over(median, row.floor_seconds),
        "over_roofline": _over(median, row.roofline_seconds),
        "loop_over_this": ratio(loop, row) if loop else None,
        "pyg_over_this": ratio(pyg, row) if pyg else None,
        "tokens_per_second": rate,
        "mfu": row.mfu,
    }


def _beside(row: SpeedRow, rows: Rows, forms: Sequence[str]) -> SpeedRow | None:
    """Return the first of these forms that was timed beside ``row``: same case, subject and size."""
    place = row.case, row.subject, row.size
    same = {other.form: other for other in rows if (other.case, other.subject, other.size) == place}
    return next((same[form] for form in forms if form in same), None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _over(value: float | None, under: float | None) -> float | None:
    return None if value is None or not under else value / under


class SpeedRecord:
    """The folder of a measurement: speed.json and rows.csv, written anew after every row.

    ``status`` is ``running`` until it is ``ok`` or ``stopped``. A killed process leaves the rows it had.
    """

    def __init__(self, results_dir: Path, name: str, head: dict[str, Any]) -> None:
        self.path = results_dir / FOLDER / name
        self.rows: list[SpeedRow] = []
        self.data: dict[str, Any] = {
            "schema_version": VERSION,
            "name": name,
            "status": "running",
            **head,
            "start": utc_now(),
            "end": None,
            "machine": {},
            "left_out": [],
            "rows": [],
        }

    def begin(self) -> None:
        """Make the folder.

        Raises:
            Refused: the folder has a record already, or cannot be written.
        """
        if kind_of(self.path / FILE):
            raise Refused(f"{self.path} holds a record already; give another --name.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise Refused(cannot_write(self.path, error)) from error

    def add(self, rows: Rows, machine: dict[str, Any]) -> None:
        """Keep rows, and what is known of the machine by now."""
        self.rows += rows
        self.data["rows"] = [row.model_dump() for row in self.rows]
        self.data["machine"] = machine
        self._write()

    def leave_out(self, what: str) -> None:
        """Keep the name of something that was not measured."""
        self.data["left_out"].append(what)
        self._write()

    def end(self, status: str) -> None:
        """Write the last state."""
        self.data.update(status=status, end=utc_now())
        self._write()

    def _write(self) -> None:
        write_whole(self.path / FILE, json.dumps(self.data, indent=1, allow_nan=False).encode())
        if self.rows:
            table = io.StringIO(newline="")
            flat = [_cells(row, self.rows) for row in self.rows]
            writer = csv.DictWriter(table, list(flat[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
            write_whole(self.path / TABLE, table.getvalue().encode())


def _cells(row: SpeedRow, rows: Rows) -> dict[str, Any]:
    """Return a row and what follows from it, flat; of a list of times only the number of rounds."""
    found = row.model_dump()
    found["rounds"] = len(found.pop("seconds"))
    found.pop("forward_seconds")
    return {**found, **derived(row, rows)}


class MachineMeasured(Part):
    """The device and its rates; a record that has no row yet has none of them."""

    device: str = ""
    copy_bytes_per_second: PositiveFloat | None = None
    matrix_flops_per_second: dict[str, PositiveFloat] = Field(default_factory=dict)


class StoredRecord(Part):
    """All that speed.json holds."""

    schema_version: Literal[1]  # VERSION
    name: str
    status: Literal["running", "ok", "stopped"]
    what: str
    command: str
    environment: Environment
    start: str
    end: str | None
    machine: MachineMeasured
    left_out: list[str]
    rows: list[SpeedRow]


def read_speed_record(place: Path) -> tuple[dict[str, Any], list[SpeedRow]]:
    """Return a record and its rows by the path of its folder or file, with texts that are safe to show.

    Raises:
        Refused: there is no record, or it cannot be read; the message names the file and the key.
    """
    path = place / FILE if kind_of(place) == "folder" else place
    if kind_of(path) != "file":
        raise Refused(f"{place} holds no record of bench.speed; name a folder with a {FILE}.")
    try:
        found = part_of(StoredRecord, shown(read_json(path)))
    except Refused as error:
        raise Refused(f"{path} is damaged: {error}.") from error
    return found.model_dump(exclude={"rows"}), found.rows
