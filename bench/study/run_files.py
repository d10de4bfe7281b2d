"""Reading the files of a run folder beside its record.

They hold the history, the losses by article, the weights over time, and the features of the experts.
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.files import inside, read_json, visible
from bench.record import Record, is_measured, read_record
from gnnmoe.config import Refused

Row = dict[str, Any]
NLL, TRACE, EXPERTS, HISTORY = "nll.npz", "communication.npz", "experts.npz", "history.jsonl"
ARTICLES, PACKED_HISTORY, PUBLISHED = "articles.npz", "history.jsonl.gz", "published.json"
"""The files of a published study in place of ``NLL`` and ``HISTORY``, and the file that marks it."""
SPLITS = ("validation", "test")
MOST_ARTICLES = 2**20
"""The largest number of articles in a file of losses; a file with more tokens may have one per token."""
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error)
"""The errors of reading arrays from a damaged file."""


@dataclass(frozen=True)
class RunData:
    """The record of one run, its history by kind of row, and the weights of its couplers over time."""

    record: Record
    train: list[Row]
    validation: list[Row]
    trace: dict[str, np.ndarray]
    """``step`` (T,) and, by ``layer_0.name``, values with time as first axis; empty if damaged."""

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
    """Read a run folder; a file that is missing gives an empty history or trace.

    Raises:
        Refused: as ``read_record``.
    """
    record, history = read_record(folder), _history(folder)
    return RunData(record, history["train"], history["validation"], _trace(folder / TRACE))


def train_rows(folder: Path) -> list[Row]:
    """Return the rows of the training steps in order; none if the run has no history."""
    return _history(folder)["train"]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an npz file.

    Raises:
        Refused: it is not there, is cut short or is no npz file; names it.
    """
    if not zipfile.is_zipfile(path):  # a .npy file would be read too, and be no arrays by name
        raise Refused(f"{path} is missing, cut short or no npz file")
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except DAMAGE as error:
        raise Refused(f"{path} cannot be read: {error}") from error


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
        if layer is None or features.ndim != 3 or 0 in features.shape or features.dtype != np.float16:
            what = f"{visible(name)}, {features.dtype} of shape {features.shape}"
            raise Refused(f"{folder / EXPERTS} holds no usable features of experts: {what}")
        if not np.isfinite(features).all():
            raise Refused(f"{folder / EXPERTS} holds features of experts that are not all finite")
        found[int(layer[1])] = features
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
    aside = said.get("set_aside") if isinstance(said, dict) else None
    sound = isinstance(aside, list) and all(
        isinstance(run, dict) and isinstance(run.get("start"), str | None) for run in aside
    )
    if not sound or not is_names(said.get("files")):
        raise Refused(f"{path} is not what --publish writes; fetch the study again, or delete that file.")
    for name in said["files"]:
        inside(study, name, path)
    return said


def is_names(files: Any) -> bool:
    """Return whether a JSON value is a table of texts by file name."""
    return isinstance(files, dict) and all(isinstance(text, str) for text in files.values())


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
    packed = folder / PACKED_HISTORY
    if (folder / HISTORY).is_file():
        return (folder / HISTORY).read_text(encoding="utf-8", errors="replace")
    if not packed.is_file():
        return None
    try:
        return gzip.decompress(packed.read_bytes()).decode(errors="replace")
    except DAMAGE as error:
        raise Refused(f"{packed} cannot be read: {error}") from error


def _history(folder: Path) -> dict[str, list[Row]]:
    """Return the rows by kind, in the order of steps; if a step has two rows, the later row counts.

    A killed process can leave a last line cut short. Such lines are skipped.
    """
    rows: dict[str, dict[int, Row]] = {"train": {}, "validation": {}}
    with suppress(Refused):
        for row in _rows((history_text(folder) or "").splitlines()):
            rows.setdefault(row["kind"], {})[row["step"]] = row
    return {kind: [found[step] for step in sorted(found)] for kind, found in rows.items()}


def _rows(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # no JSON, or an integer of 5,000 digits
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and type(row.get("step")) is int:
            yield row


def _trace(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays over time, without arrays that are not as long as the steps."""
    try:
        arrays = read_arrays(path)
    except Refused:
        return {}
    shape = arrays["step"].shape if "step" in arrays else ()
    if len(shape) != 1 or not shape[0]:
        return {}
    return {name: values for name, values in arrays.items() if values.shape[:1] == shape}
