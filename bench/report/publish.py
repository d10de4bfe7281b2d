"""Publishing a study: copies of records, histories, weights over time and hypotheses, without large files.

Of each run it keeps ``record.json``, ``history.jsonl`` (compressed), ``communication.npz``, ``experts.npz``
and ``log.txt``, which hold no path, host name or user name. A report matches the experts of different seeds
with ``experts.npz``, of at most 300 kB. The losses per token become ``articles.npz``: their float64 sums
by article, about 1 kB per run. A report needs only these sums, and ``--verify`` still compares them with the
record's sum.

``published.json`` keeps the sha256 of each file, and of each array that was left out (``left_out``). The hash
of an array is over its values, so an archive of the original, or a repeated run, can be compared with it.

Checkpoints, traces, plots, logs of children, locks, reports and runs that were set aside are not copied. The
times at which those runs began are kept: they decide whether hypotheses were stated before the runs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.files import kind_of, not_linked_out
from bench.record import read_record
from bench.study.run_files import (
    ARTICLES,
    EXPERTS,
    MOST_UNPACKED,
    NLL,
    PACKED_HISTORY,
    PUBLISHED,
    SPLITS,
    TRACE,
    article_sums,
    expert_features,
    history_text,
    publication,
    read_arrays,
    set_aside,
)
from gnnmoe.config import Refused
from gnnmoe.reading import read_bytes

FORMAT = 2
LOG, HYPOTHESES = "log.txt", "hypotheses*.json"
Files = dict[str, bytes]


def publish_study(study: Path, target: Path) -> str:
    """Publish ``study`` into the folder ``target``; return what was written, in a sentence.

    An unchanged published study is not written again. The folder is replaced whole or not at all.

    Args:
        study: The folder of the study.
        target: A new or empty folder, or one that an earlier call wrote.

    Raises:
        Refused: a file of the study is damaged, or ``target`` holds other files, lies in the study, or cannot
            be written.
    """
    _refuse_target(study, target)
    files = _published(study)
    size = f"{sum(map(len, files.values())) / 2**20:.1f} MiB"
    runs = sum(name.endswith("/record.json") for name in files)
    what = f"{target}: {runs:,} runs, {len(files):,} files, {size}"
    if target.is_dir() and _contents(target) == files:
        return f"{what}, as it was"
    try:
        _replace(target, files)
    except OSError as error:
        raise Refused(f"{target} cannot be written ({error.strerror}); name another folder.") from error
    return what


def _published(study: Path) -> Files:
    """Return every file of the published study, by its path in the folder."""
    folders = [path.parent for path in sorted(study.glob("*/record.json")) if "." not in path.parent.name]
    for path in [path for folder in folders for path in folder.iterdir()] + sorted(study.glob(HYPOTHESES)):
        not_linked_out(study, path.relative_to(study).as_posix())  # links lead elsewhere
    files: Files = {}
    left_out = dict((publication(study) or {}).get("left_out", {}))
    for folder in [folder for folder in folders if read_record(folder).run_id == folder.name]:
        for name in ("record.json", TRACE, EXPERTS, LOG):
            if (folder / name).is_file():
                files[f"{folder.name}/{name}"] = _read(folder / name)
        expert_features(folder)
        if (folder / TRACE).is_file():
            read_arrays(folder / TRACE)
        history = history_text(folder)
        if history is not None:
            files[f"{folder.name}/{PACKED_HISTORY}"] = gzip.compress(_whole_lines(history), mtime=0)
        sums, hashes = _articles(folder)
        if sums:
            files[f"{folder.name}/{ARTICLES}"] = sums
        if hashes:
            left_out[folder.name] = hashes
    files |= {path.name: _read(path) for path in sorted(study.glob(HYPOTHESES))}
    about = {
        "format": FORMAT,
        "made_by": "python -m bench.report STUDY --publish DIR",
        "set_aside": set_aside(study),
        "left_out": left_out,
    }
    about["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {**files, PUBLISHED: (json.dumps(about, indent=2) + "\n").encode()}


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MOST_UNPACKED)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}.") from error


def _whole_lines(text: str) -> bytes:
    """Return the complete lines of a history; a killed run can leave a last line cut short."""
    return "".join(f"{line}\n" for line in text.splitlines() if line.endswith("}")).encode()


def _articles(folder: Path) -> tuple[bytes | None, dict[str, Any]]:
    """Return the file of sums by article, and the sha256 of each array that it replaces."""
    if not (folder / NLL).is_file():
        path = folder / ARTICLES
        return (_read(path) if path.is_file() and read_arrays(path) else None), {}
    arrays, sums = read_arrays(folder / NLL), {}
    for split in SPLITS:
        found = article_sums(folder, split)
        if found is not None:
            sums |= {f"{split}_nll_sum": found[0], f"{split}_tokens": found[1]}
    file = io.BytesIO()
    np.savez_compressed(file, **sums)  # pyright: ignore[reportArgumentType]
    return file.getvalue(), {NLL: {name: _sha256(array) for name, array in sorted(arrays.items())}}


def _sha256(array: np.ndarray) -> str:
    """Return the hash of an array's type, shape and values in C order."""
    head = f"{array.dtype.str} {array.shape} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _refuse_target(study: Path, target: Path) -> None:
    kind_of(target)  # refuses links in a circle
    there, here = target.resolve(), study.resolve()
    if there == here or here in there.parents or there in here.parents:
        raise Refused(f"{target} and the study lie in each other; name a folder beside {study}.")
    if target.exists() and not target.is_dir():
        raise Refused(f"{target} is no folder; name another.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    known: Mapping[str, str] = (publication(target) or {"files": {}})["files"]
    foreign = [name for name in _contents(target) if name not in known and name != PUBLISHED]
    if not known or foreign:
        example = f" ({foreign[0]})" if foreign else ""
        raise Refused(f"{target} holds files that --publish did not write{example}; name another folder.")


def _contents(folder: Path) -> Files:
    """Return the files in a folder by their paths, without a report in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != "report"
    }


def _replace(target: Path, files: Files) -> None:
    """Write the files into a temporary folder beside ``target``, and rename it to ``target``.

    Raises:
        OSError: the disk refuses; ``target`` is unchanged, and no half-written file stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
        new, old = Path(place, "new"), Path(place, "old")
        for name, data in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(data)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                shutil.move(old, target)
            raise
