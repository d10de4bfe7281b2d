"""Whether today's code made a record; and couplers from two files that would share a run_id.

``bench.measure.code`` takes the hashes. A record keeps them in its ``environment``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure.quantity import is_measured
from bench.records.schema import Record
from gnnmoe.config import Refused

WORDS = {"coupler_sha256": "the coupler's own code", "project_sha256": "the project's code"}
"""The two hashes, and what each covers."""


def stale_code(environment: Any, today: Mapping[str, str]) -> list[str] | None:
    """Return which code differs from ``today``'s, in words; None where the record does not say.

    Args:
        environment: ``record["environment"]``, or the same part of a checkpoint.
        today: What ``code_hashes`` returns.
    """
    if not is_measured(environment) or not all(isinstance(environment.get(name), str) for name in WORDS):
        return None
    return [words for name, words in WORDS.items() if environment[name] != today[name]]


def is_stale(record: Record | None, today: Mapping[str, str]) -> bool | None:
    """Return whether other code made a record; None where a finished run's record does not say.

    False for a run without a record, with a damaged one, or without hashes of today's code.
    """
    if not today or record is None or record["status"] == "damaged":
        return False
    differing = stale_code(record["environment"], today)
    return None if differing is None and record["status"] != "interrupted" else bool(differing)


def stale_words(differing: Iterable[str]) -> str:
    """Return what ``stale_code`` found as the end of a sentence: "the coupler's own code has changed"."""
    names = list(differing)
    return f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} changed since"


def refuse_another_file(coupler: str, sha256: str, others: Iterable[tuple[str, str | None]]) -> None:
    """Refuse a coupler from a file where the study has one of the same class name from another file.

    Both would have one run_id, and each would take the place of the other.

    Args:
        coupler: As the flag names it.
        sha256: Its ``coupler_sha256``.
        others: The coupler and, where it is known, the ``coupler_sha256`` of each run of the study.

    Raises:
        Refused: saying which file has the class too.
    """
    path, _, name = coupler.rpartition(":")
    for other, known in others:
        there, _, its_name = other.rpartition(":")
        if not (path.endswith(".py") and there.endswith(".py")) or its_name != name or known == sha256:
            continue
        both = Path(path).expanduser(), Path(there).expanduser()
        if both[0].name != both[1].name or (both[1].is_file() and not both[0].samefile(both[1])):
            raise Refused(
                f"the study has runs of a class {name} from {there} already, and {path} is another file; "
                "give the class another name, or choose another --study."
            )


def stale_notes(stale: Sequence[bool | None], kept: bool) -> list[str]:
    """Return what a sweep says of its runs' records, for each of which ``is_stale`` is given."""
    count, unknown = stale.count(True), stale.count(None)
    what = "kept by --keep-stale" if kept else "to run again; the old record stays as RUN_ID.1"
    notes = [f"{_runs(count)} stale: the code has changed since ({what})"] if count else []
    if unknown:
        notes.append(f"{_runs(unknown)} kept; the record does not say which code made it")
    return notes


def _runs(count: int) -> str:
    return "1 run is" if count == 1 else f"{count:,} runs are"


def coupler_of(record: Record) -> tuple[str, str | None]:
    """Return the coupler of a run as its flag named it, and its ``coupler_sha256`` where it is known."""
    environment = record["environment"]
    known = environment.get("coupler_sha256") if is_measured(environment) else None
    return str(record["config"]["model"]["coupler_type"]), known
