"""The folder of one run: every file is written under a temporary name and renamed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from bench.files import Busy, cannot_write, lock, remove_left_over, replacing, utc_now
from bench.records.schema import KEYS, Record
from gnnmoe.config import Refused

BUSY = "another process is at run"


class RunFolder:
    """``results_dir/study/run_id``: record.json, history.jsonl, the npz files and log.txt."""

    def __init__(self, results_dir: Path, study: str, run_id: str) -> None:
        self.path = results_dir / study / run_id

    @property
    def lock(self) -> Path:
        """The file whose lock a process holds while it is at the run."""
        return self.path.with_name(f".{self.path.name}.lock")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this run while the block lasts.

        Raises:
            Busy: another process is at it.
            Refused: the study's folder cannot be written.
        """
        study = self.path.parent
        made = [folder for folder in (study, study.parent) if not folder.exists()]
        try:
            study.mkdir(parents=True, exist_ok=True)
            held = lock(self.lock)
        except OSError as error:
            raise Refused(cannot_write(self.path, error)) from error
        if held is None:
            raise Busy(f"{BUSY} {self.path.name}; wait for it.")
        try:
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            held.release()
            with suppress(OSError):  # what was refused leaves no empty folders
                for folder in made:
                    folder.rmdir()

    def create(self, record: Record, log: str = "") -> None:
        """Make the folder with this first record, or go on in it: its history and its log stay.

        ``log`` is the log of the run's earlier parts, which is added where the folder's log lacks it.

        Raises:
            Refused: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_left_over()
            (self.path / "history.jsonl").touch()
            (self.path / "log.txt").touch()
            there = self.read_log()
            if there and not there.endswith("\n"):  # the part before was killed as it wrote the last line
                self._append_log("\n")
            if not there.startswith(log):
                self._append_log(log)
            self.write_record(record)
        except OSError as error:
            raise Refused(cannot_write(self.path, error)) from error

    def _remove_left_over(self) -> None:
        """Remove the temporary files of processes that were killed; the run is locked."""
        for name in ("record.json", "history.jsonl", "*.npz", "checkpoint.pt"):
            remove_left_over(self.path / name)

    def read_record(self) -> Record | None:
        """Return the record, None where there is no folder, or one with status ``damaged``."""
        if not self.path.exists():
            return None
        try:
            record = json.loads((self.path / "record.json").read_text())
            return record if set(KEYS) <= set(record) else {"status": "damaged"}
        except (OSError, ValueError, TypeError):
            return {"status": "damaged"}

    def set_aside(self) -> Path:
        """Rename the folder to the first free ``run_id.1``, ``run_id.2``, … and return its new path."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        return self.path.rename(target)

    def write_record(self, record: Record) -> None:
        """Write record.json; NaN and infinity are refused, since JSON has neither."""
        text = json.dumps(record, indent=2, allow_nan=False)
        self._write("record.json", lambda file: file.write(text.encode()))

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write ``name`` (an npz file) with the arrays."""
        self._write(name, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore[reportArgumentType]

    def read_history(self) -> str:
        """Return history.jsonl as it stands."""
        return (self.path / "history.jsonl").read_text()

    def write_history(self, text: str) -> None:
        """Put ``text`` in the place of history.jsonl."""
        self._write("history.jsonl", lambda file: file.write(text.encode()))

    def append_history(self, row: dict[str, Any]) -> None:
        """Add one line to history.jsonl."""
        with (self.path / "history.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def read_log(self) -> str:
        """Return log.txt as it stands, an empty text where there is none."""
        path = self.path / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def log(self, line: str) -> None:
        """Add one line, with the time in UTC, to log.txt."""
        self._append_log(f"{utc_now()} {line}\n")

    def _append_log(self, text: str) -> None:
        with (self.path / "log.txt").open("a", encoding="utf-8") as file:
            file.write(text)

    def _write(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        with replacing(self.path / name) as file:
            write(file)


class ReadOnlyFolder(RunFolder):
    """The folder of a run as all its ranks but the first have it: nothing is written, and nothing locked."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Do nothing: the first rank has the lock."""
        yield

    def create(self, record: Record, log: str = "") -> None:
        """Do nothing."""

    def log(self, line: str) -> None:
        """Do nothing."""

    def append_history(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def read_history(self) -> str:
        """Return nothing: it is the first rank's."""
        return ""

    def read_log(self) -> str:
        """Return nothing: it is the first rank's."""
        return ""

    def _write(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        """Do nothing."""


def study_records(study: Path) -> list[Record]:
    """Return the records of a study's runs, without those that were set aside or cannot be read."""
    folders = [path.parent for path in sorted(study.glob("*/record.json")) if "." not in path.parent.name]
    records = [RunFolder(folder.parent, ".", folder.name).read_record() for folder in folders]
    return [record for record in records if record and record["status"] != "damaged"]


def check_writable(results_dir: Path) -> None:
    """Make sure that ``results_dir`` can be written, and leave nothing behind.

    Raises:
        Refused: it, or the nearest folder above it that exists, is no folder or refuses.
    """
    nearest = results_dir.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise Refused(cannot_write(results_dir, error)) from error
