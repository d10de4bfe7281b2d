"""Reading the files of a run folder beside its record.

They hold the history, the losses by article, the weights over time, and the features of the experts.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.files import inside, read_json, visible
from bench.record import FEATURE_BYTES, LEAST_TOKENS, Part, Record, is_measured, part_of, read_record
from gnnmoe.config import Refused, shortened
from gnnmoe.reading import read_at_most, read_bytes

Row = dict[str, Any]
NLL, TRACE, EXPERTS, HISTORY = "nll.npz", "communication.npz", "experts.npz", "history.jsonl"
ARTICLES, PACKED_HISTORY, PUBLISHED = "articles.npz", "history.jsonl.gz", "published.json"
"""The files of a published study in place of ``NLL`` and ``HISTORY``, and the file that marks it."""
SPLITS = ("validation", "test")
MOST_ARTICLES = 2**20
"""The largest number of articles in a file of losses; a file with more tokens may have one per token."""
MOST_UNPACKED = 2**30
"""The most bytes of a compressed file, packed or unpacked; a larger file is damaged, or a trap."""
COLUMNS = {"train": ("epoch", "tokens", "loss", "learning_rate", "gradient_norm"),
           "validation": ("epoch", "tokens", "nll_sum")}  # fmt: skip
"""The numbers in a row of a history, beside its step, by the kind of row."""


@dataclass(frozen=True)
class RunData:
    """The record of one run, and its other files, each read when it is first asked for.

    A file that is missing gives an empty history or trace.
    """

    folder: Path
    record: Record

    @cached_property
    def train(self) -> list[Row]:
        """The rows of the training steps in order; none if the run has no history."""
        return self._history["train"]

    @cached_property
    def validation(self) -> list[Row]:
        """The rows of the evaluations in order."""
        return self._history["validation"]

    @cached_property
    def trace(self) -> dict[str, np.ndarray]:
        """``step`` (T,) and, by ``layer_0.name``, values with time as first axis; empty if damaged."""
        return _trace(self.folder / TRACE)

    @cached_property
    def _history(self) -> dict[str, list[Row]]:
        return _history(self.folder)

    def parts(self, prefix: str) -> dict[int, dict[str, Any]]:
        """Return layer → name → value of the record's communication, for names with this prefix."""
        communication = self.record.communication
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
        """Return in words at which step the record's communication was read."""
        quality = self.record.quality
        assert is_measured(quality), "a run with a communication was evaluated"
        return f"at step {quality.best_step:,}, the best on validation"


def read_run(folder: Path) -> RunData:
    """Read the record of a run folder, and offer its other files.

    Raises:
        Refused: as ``read_record``.
    """
    return RunData(folder, read_record(folder))


def train_rows(folder: Path) -> list[Row]:
    """Return the rows of the training steps in order; none if the run has no history."""
    return _history(folder)["train"]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an npz file.

    Raises:
        Refused: it is not there, is cut short or is no npz file; names it.
    """
    try:
        data = read_bytes(path, MOST_UNPACKED)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > MOST_UNPACKED:
            raise Refused(
                f"{path} has arrays of {unpacked >> 20:,} MiB, more than {MOST_UNPACKED >> 20:,} MiB"
            )
        with np.load(io.BytesIO(data)) as arrays:
            return dict(arrays)
    except zipfile.BadZipFile as error:  # np.load would read a .npy file, which has no arrays by name
        raise Refused(f"{path} is cut short or no npz file") from error
    except Refused:
        raise
    except Exception as error:  # garbage fails in many ways
        raise Refused(f"{path} cannot be read: {shortened(str(error))}") from error


def article_sums(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return Σ nll in nats and the number of tokens of each scored article, each (A,) in float64.

    They are summed from the losses per token, or read from the sums that a published study keeps. None where
    neither file has the ``split``.

    Raises:
        Refused: both files are missing, or the file cannot be used; names the file and the reason.
    """
    if not (folder / NLL).is_file() and (folder / ARTICLES).is_file():
        return _kept_sums(folder / ARTICLES, split)
    arrays = read_arrays(folder / NLL)
    nll, article = (arrays.get(f"{split}_{name}") for name in ("nll", "document"))
    if nll is None:
        return None
    why = _unlike_losses(nll, article)
    if why or article is None:
        raise Refused(f"{folder / NLL} holds no usable losses of {split}: {why}")
    article = article.astype(np.int64)
    return np.bincount(article, weights=nll.astype(np.float64)), np.bincount(article).astype(np.float64)


def _unlike_losses(nll: np.ndarray, article: np.ndarray | None) -> str:
    """Return why these arrays are not losses per token with an article for each; empty where they are."""
    if nll.ndim != 1 or nll.dtype.kind != "f":
        return f"they are {nll.dtype} of shape {nll.shape}, not one row of floating-point numbers"
    if not np.isfinite(nll).all():
        return "they are not all finite"
    if article is None:
        return "the articles of the tokens are missing"
    if article.shape != nll.shape or article.dtype.kind not in "iu":
        return (
            f"the articles are {article.dtype} of shape {article.shape}, not a whole number for each "
            f"of {len(nll):,} tokens"
        )
    most = max(len(nll), MOST_ARTICLES)
    if len(article) and not 0 <= int(article.min()) <= int(article.max()) < most:
        return f"the articles are numbered {article.min():,} to {article.max():,}, not 0 to {most - 1:,}"
    return ""


def _kept_sums(path: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the sums of ``split`` that a published study keeps; None where it has none.

    Raises:
        Refused: the file cannot be read, or its arrays are no sums by article.
    """
    arrays = read_arrays(path)
    sums, tokens = (arrays.get(f"{split}_{name}") for name in ("nll_sum", "tokens"))
    if sums is None:
        return None
    sound = (
        tokens is not None
        and sums.ndim == 1
        and sums.shape == tokens.shape
        and all(found.dtype.kind in "fiu" and np.isfinite(found).all() for found in (sums, tokens))
    )
    if tokens is None or not sound or (tokens < 0).any():
        raise Refused(f"{path} holds no usable sums by article of {split}")
    return sums.astype(np.float64), tokens.astype(np.float64)


def expert_features(folder: Path) -> dict[int, np.ndarray]:
    """Return by layer the features (E, n, D) that a run keeps of its experts; nothing without their file.

    E experts, n of the fixed validation tokens, D dimensions; float16.

    Raises:
        Refused: the file cannot be read, or an array of it is no such features; names the file.
    """
    if not (folder / EXPERTS).is_file():
        return {}
    found = {}
    for name, features in read_arrays(folder / EXPERTS).items():
        layer = re.fullmatch(r"layer_(\d{1,6})\.features", name)
        fits = features.ndim == 3 and 0 not in features.shape and features.shape[1] >= LEAST_TOKENS
        if layer is None or not fits or features.dtype != np.float16:
            what = f"{visible(name)}, {features.dtype} of shape {features.shape}"
            raise Refused(f"{folder / EXPERTS} holds no usable features of experts: {what}")
        if not np.isfinite(features).all():
            raise Refused(f"{folder / EXPERTS} holds features of experts that are not all finite")
        found[int(layer[1])] = features
    if sum(features.nbytes for features in found.values()) > FEATURE_BYTES:
        raise Refused(f"{folder / EXPERTS} holds more than {FEATURE_BYTES:,} bytes of features of experts")
    return found


def set_aside(study: Path) -> list[dict[str, Any]]:
    """Return run_id, status and start of the runs that were set aside, also of runs not published.

    Raises:
        Refused: as ``publication``.
    """
    found = []
    for path in sorted(study.glob("*.*/record.json")):
        with suppress(Refused):
            record = read_record(path.parent)
            name = path.parent.name
            if re.fullmatch(rf"{re.escape(record.run_id)}\.[1-9]\d*", name):  # not a copy
                found.append({"run_id": name, "status": record.status, "start": record.time.start})
    return found + (publication(study) or {"set_aside": []})["set_aside"]


def publication(study: Path) -> dict[str, Any] | None:
    """Return what ``--publish`` wrote about a study; None where the study was not published.

    ``files`` holds the sha256 of each published file by name, ``set_aside`` what ``set_aside()`` returned.

    Raises:
        Refused: the file cannot be read, was not written by ``--publish``, or names a file elsewhere.
    """
    path = study / PUBLISHED
    if not path.is_file():
        return None
    said = read_json(path)
    try:
        part_of(_Publication, said)
    except Refused as error:
        remedy = "fetch the study again, or delete that file"
        raise Refused(f"{path} is not what --publish writes: {error}; {remedy}.") from error
    for name in said["files"]:
        inside(study, name, path)
    return said


class _SetAside(Part):
    run_id: str
    status: str
    start: str | None


class _Publication(Part):
    """What ``--publish`` wrote about a study."""

    format: int
    made_by: str
    set_aside: list[_SetAside]
    left_out: dict[str, dict[str, dict[str, str]]]
    files: dict[str, str]


def damaged_arrays(folder: Path) -> list[str]:
    """Return why compressed files of a run folder cannot be read; of an npz file only its end is checked."""
    paths = [folder / name for name in (NLL, ARTICLES, TRACE, EXPERTS)]
    found = [
        f"{path} is cut short or no npz file; the report is made without it"
        for path in paths
        if path.is_file() and not zipfile.is_zipfile(path)
    ]
    if (folder / PACKED_HISTORY).is_file():
        try:
            history_text(folder)
        except Refused as error:
            found.append(f"{error}; the report is made without it")
    return found


def history_text(folder: Path) -> str | None:
    """Return the history of a run, compressed in a published study; None where there is none.

    Raises:
        Refused: the compressed file cannot be read; names it.
    """
    path = _history_path(folder)
    if not path.is_file():
        return None
    try:
        data: bytes | None = read_bytes(path, MOST_UNPACKED)
        if path.name == PACKED_HISTORY:
            with gzip.open(io.BytesIO(data)) as file:
                data = read_at_most(file, MOST_UNPACKED)
    except Exception as error:  # as of arrays
        why = getattr(error, "strerror", None) or shortened(str(error))
        raise Refused(f"{path} cannot be read: {why}") from error
    if data is None:
        raise Refused(f"{path} has more than {MOST_UNPACKED >> 20:,} MiB")
    return data.decode(errors="replace")


def _history_path(folder: Path) -> Path:
    plain = folder / HISTORY
    return plain if plain.is_file() else folder / PACKED_HISTORY


def _history(folder: Path) -> dict[str, list[Row]]:
    """Return the rows by kind, in the order of steps; if a step has two rows, the later row counts.

    A killed process can leave a last line cut short, which is skipped. Other lines that are no rows are
    skipped with a warning.
    """
    rows: dict[str, dict[int, Row]] = {kind: {} for kind in COLUMNS}
    with left_out():
        lines = (history_text(folder) or "").splitlines()
        read = [_row(line) for line in lines]
        for row in filter(None, read):
            rows[row["kind"]][row["step"]] = row
        wrong = [number for number, row in enumerate(read[:-1], 1) if row is None]
        if wrong:
            many = f"{len(wrong):,} of {len(read):,} lines are no rows of a history"
            where = f"{_history_path(folder)} is damaged"
            warnings.warn(f"{where}: {many} and are left out; the first is line {wrong[0]:,}.", stacklevel=4)
    return {kind: [found[step] for step in sorted(found)] for kind, found in rows.items()}


def _row(line: str) -> Row | None:
    """Return a row of a history, or None where a line holds none."""
    try:
        row = json.loads(line)
        kind, columns = row["kind"], COLUMNS[row["kind"]]
        found = {name: row[name] for name in ("step", *columns)}
    except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: also an integer of 5,000 digits
        return None
    found = {name: math.nan if value is None else value for name, value in found.items()}  # null: not finite
    counts = [found[name] for name in ("step", "epoch", "tokens")]
    sums = [found[name] for name in columns[2:]]
    whole = all(type(count) is int and 0 <= count < 2**63 for count in counts) and found["tokens"]
    return {"kind": kind, **found} if whole and all(type(value) is float for value in sums) else None


@contextmanager
def left_out() -> Iterator[None]:
    """Warn of a file that is refused in the block, and go on without it."""
    try:
        yield
    except Refused as error:
        warnings.warn(f"{error}; it is left out.", stacklevel=4)


def _trace(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays over time, without arrays that are not as long as the steps."""
    arrays: dict[str, np.ndarray] = {}
    if path.is_file():
        with left_out():
            arrays = read_arrays(path)
    steps = arrays.get("step", np.array(None))
    shape = steps.shape
    if len(shape) != 1 or not shape[0] or steps.dtype.kind not in "iu":
        return {}
    return {
        name: values
        for name, values in arrays.items()
        if values.shape[:1] == shape and values.dtype.kind in "fiu"
    }
