"""A study to publish: records, histories, weights over time and hypotheses, without bulk and without places.

Of each run stay ``record.json``, ``history.jsonl`` (compressed), ``communication.npz`` and ``log.txt``, with
neutral texts (``bench.records.neutral``). The losses of tokens become ``articles.npz``, their float64 sums
by article (about 1 kB a run): that is all that a report reads of them, so its bootstrap over articles gives
the same interval, and ``--verify`` still adds them up to the record's sum. Of the arrays the record keeps the
sha256 (``left_out``), of the values and not of the file, which an archive of the original, or the run done
again, can be held against. Checkpoints, traces, plots, logs of children, locks, reports and runs that were
set aside stay behind; when those began is kept, since it bears on when hypotheses were stated.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bench.analysis.run_data import (
    ARTICLES,
    NLL,
    PACKED_HISTORY,
    REDACTED,
    SPLITS,
    TRACE,
    article_sums,
    history_text,
    read_arrays,
    read_json,
    read_record,
    redaction,
    set_aside,
)
from bench.records.foreign import not_linked_out
from bench.records.neutral import FOLDERS, PLACE, Neutral, base_name
from bench.records.schema import Record
from gnnmoe.config import Refused

FORMAT = 1
LOG, HYPOTHESES = "log.txt", "hypotheses*.json"
Files = dict[str, bytes]


def redact_study(study: Path, target: Path, hide: Sequence[str] = ()) -> str:
    """Write ``study`` into the folder ``target`` as it may be published; return what was done, in a sentence.

    What is redacted already stays as it is. The folder is there whole or as it was.

    Args:
        study: Folder of the study.
        target: New, empty, or what an earlier call wrote.
        hide: Names to hide besides those of this machine and user.

    Raises:
        Refused: a file of the study is damaged, or ``target`` is another's, in the study, or unwritable.
    """
    _refuse_target(study, target)
    files = _redacted(study, hide)
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


def _redacted(study: Path, hide: Sequence[str]) -> Files:
    """Return every file of the redacted study, by its path in it."""
    folders = [path.parent for path in sorted(study.glob("*/record.json")) if "." not in path.parent.name]
    for path in [path for folder in folders for path in folder.iterdir()] + sorted(study.glob(HYPOTHESES)):
        not_linked_out(study, path.relative_to(study).as_posix())  # else what lies elsewhere is published
    found = {folder: read_record(folder, as_stored=True) for folder in folders}
    records = {folder: record for folder, record in found.items() if record["run_id"] == folder.name}
    neutral = Neutral(_known_paths(list(records.values())), hide)
    files: Files = {}
    for folder, record in records.items():
        for name, data in _of_run(folder, record, neutral):
            files[f"{folder.name}/{name}"] = data
    for path in sorted(study.glob(HYPOTHESES)):
        files[path.name] = _json(neutral.value(read_json(path)))
    about = {"format": FORMAT, "made_by": "python -m bench.report STUDY --redact DIR",
             "set_aside": neutral.value(set_aside(study))}  # fmt: skip
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return {**files, REDACTED: _json({**about, "files": hashes})}


def _of_run(folder: Path, record: Record, neutral: Neutral) -> Iterator[tuple[str, bytes]]:
    sums, left_out = _articles(folder)
    if left_out:
        record = record | {"left_out": left_out}
    redacted = neutral.value({**record, "command": ""}) | {"command": neutral.command(record["command"])}
    for part, own in zip(redacted["time"].get("parts", ()), record["time"].get("parts", ()), strict=True):
        part["command"] = neutral.command(own["command"])
    _settle_places(redacted["config"].get("places", {}))
    yield "record.json", _json(redacted)
    if sums:
        yield ARTICLES, sums
    if (folder / TRACE).is_file():
        read_arrays(folder / TRACE)
        yield TRACE, (folder / TRACE).read_bytes()
    history = history_text(folder)
    if history is not None:
        lines = "".join(f"{line}\n" for line in _history(history, neutral))
        yield PACKED_HISTORY, gzip.compress(lines.encode(), mtime=0)
    if (folder / LOG).is_file():
        text = neutral.text((folder / LOG).read_text(encoding="utf-8", errors="replace"))
        yield LOG, "".join(f"{line}\n" for line in text.splitlines()).encode()


def _articles(folder: Path) -> tuple[bytes | None, dict[str, Any]]:
    """Return the file of sums by article, and the sha256 of each array that it stands for."""
    if not (folder / NLL).is_file():
        path = folder / ARTICLES
        return (path.read_bytes() if path.is_file() and read_arrays(path) else None), {}
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


def _history(text: str, neutral: Neutral) -> Iterator[str]:
    """Yield the lines of a history; one that was cut short by a kill is no row, and stays behind."""
    for line in text.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            after = neutral.value(row)
            yield line if after == row else json.dumps(after)


def _settle_places(places: dict[str, Any]) -> None:
    for field, word in FOLDERS.items():
        if places.get(field) is not None:
            places[field] = word


def _known_paths(records: Sequence[Record]) -> dict[str, str]:
    """Return the paths that the configs name and what each becomes: of a file its name, told apart.

    Two couplers from files of one name stay two configurations.
    """
    paths, known = [], {}
    for record in records:
        config = record["config"]
        places, model = config.get("places", {}), config["model"]
        known |= {places[field]: PLACE for field in FOLDERS if places.get(field)}
        paths += [str(model["coupler_type"]).rpartition(":")[0], places.get("resume_checkpoint")]
        named = (model.get("static_hyperedge_strategy"), config["training"].get("curriculum"))
        paths += [str(text).partition(":")[2] for text in named]
    names: dict[str, str] = {}
    for path in sorted(filter(None, dict.fromkeys(paths)), key=lambda path: path != base_name(path)):
        stem, dot, end = base_name(path).partition(".")
        name, number = f"{stem}{dot}{end}", 1
        while name in names.values():
            number += 1
            name = f"{stem}-{number}{dot}{end}"
        names[path] = name
    return {**known, **names}


def _refuse_target(study: Path, target: Path) -> None:
    there, here = target.resolve(), study.resolve()
    if there == here or here in there.parents or there in here.parents:
        raise Refused(f"{target} and the study lie in each other; name a folder beside {study}.")
    if target.exists() and not target.is_dir():
        raise Refused(f"{target} is no folder; name another.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    known: Mapping[str, str] = (redaction(target) or {"files": {}})["files"]
    foreign = [name for name in _contents(target) if name not in known and name != REDACTED]
    if not known or foreign:
        example = f" ({foreign[0]})" if foreign else ""
        raise Refused(f"{target} holds files that --redact did not write{example}; name another folder.")


def _contents(folder: Path) -> Files:
    """Return the files in a folder by their paths, but for a report that was made of it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).parts[0] != "report"}  # fmt: skip


def _replace(target: Path, files: Files) -> None:
    """Write the files under a temporary name beside ``target`` and put that in its place.

    Raises:
        OSError: the disk refuses; ``target`` is as it was, and nothing half-written stays.
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
