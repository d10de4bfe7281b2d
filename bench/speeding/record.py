"""The record of a measurement: one folder, whole after every row. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.files import cannot_write, shown, utc_now, write_whole
from bench.speeding.rows import SpeedRow, cells, row_from
from gnnmoe.config import Refused

FOLDER, FILE, TABLE = "speed", "speed.json", "rows.csv"
VERSION = 1


class SpeedRecord:
    """``results_dir/speed/name``: speed.json and rows.csv, written anew after every row.

    ``status`` is ``running`` until it is ``ok`` or ``stopped``: of a killed process the rows are there.
    """

    def __init__(self, results_dir: Path, name: str, head: dict[str, Any]) -> None:
        self.path = results_dir / FOLDER / name
        self.rows: list[SpeedRow] = []
        self.data: dict[str, Any] = {
            "schema_version": VERSION, "name": name, "status": "running", **head, "start": utc_now(),
            "end": None, "machine": {}, "left_out": [], "rows": [],
        }  # fmt: skip

    def begin(self) -> None:
        """Make the folder.

        Raises:
            Refused: there is one already, or it cannot be written.
        """
        if (self.path / FILE).exists():
            raise Refused(f"{self.path} holds a record already; give another --name.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise Refused(cannot_write(self.path, error)) from error

    def add(self, rows: Sequence[SpeedRow], machine: dict[str, Any]) -> None:
        """Keep rows, and what is known of the machine by now."""
        self.rows += rows
        self.data["rows"] = [asdict(row) for row in self.rows]
        self.data["machine"] = machine
        self._write()

    def leave_out(self, what: str) -> None:
        """Keep what was not measured, and why."""
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
            flat = [cells(row, self.rows) for row in self.rows]
            writer = csv.DictWriter(table, list(flat[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
            write_whole(self.path / TABLE, table.getvalue().encode())


def read_speed_record(place: Path) -> tuple[dict[str, Any], list[SpeedRow]]:
    """Return a record and its rows with their texts as they may be shown, by the path of folder or file.

    Raises:
        Refused: there is none, or it cannot be read.
    """
    path = place / FILE if place.is_dir() else place
    try:
        data = shown(json.loads(path.read_text()))
        if data["schema_version"] != VERSION:
            raise Refused(f"it is of version {data['schema_version']}, this is {VERSION}")
        return data, [row_from(found) for found in data["rows"]]
    except OSError as error:
        raise Refused(
            f"{place} holds no record of bench.speed ({error.strerror}); name a folder with a {FILE}."
        ) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is no record of bench.speed that can be read ({error}).") from error
