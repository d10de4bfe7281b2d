"""The origin of the runs of a study: their environments, versions of the code, and data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.record import NotMeasured, Record, is_measured
from bench.report.quantities import counted, in_parts, number
from bench.study.runs import Run
from gnnmoe.discovery import short_name

CODE = ("project_sha256", "code_sha256", "git_commit", "git_changes_sha256")
COUPLER = "coupler_sha256"
DIGITS = 12
"""Digits of a hash of code in a text."""
MEASURED = ("parameters", "flops", "quality", "speed", "memory", "communication")
Facts = list[tuple[str, str]]
NULL = set(NotMeasured.model_fields)


@dataclass(frozen=True)
class Kind:
    """An environment, a version of the code or a corpus that some runs share."""

    key: str
    """The anchor on the page: environment-1."""
    words: str
    """The kind in one line."""
    facts: Facts
    runs: int
    identity: str


@dataclass(frozen=True)
class RunFacts:
    """The facts of one run that the page shows beside its row."""

    run_id: str
    name: str
    configuration: str
    status: str
    command: str
    error: str | None
    kinds: list[tuple[str, Kind]]
    """Environment, code and data."""
    facts: Facts


@dataclass(frozen=True)
class Codes:
    """The versions of the project's code that made some runs."""

    runs: dict[str, list[Run]]
    """The runs by hash, the most frequent hash first."""
    unknown: int
    """The number of runs whose record does not say which code made them, if other records do."""

    @property
    def mixed(self) -> bool:
        """Whether several versions made the runs."""
        return len(self.runs) > 1

    def words(self, commits: bool = False) -> str:
        """Return the versions with their number of runs, and with ``commits`` their commits."""
        return ", ".join(
            f"{text[:DIGITS]}{_commits(some) if commits else ''} ({counted(len(some), 'run')})"
            for text, some in self.runs.items()
        )

    def silent(self) -> str:
        """Return how many records do not say which code made them; empty if all or none say so."""
        verb = "does" if self.unknown == 1 else "do"
        return f"{counted(self.unknown, 'run')} {verb} not say which code made them" if self.unknown else ""


def codes_of(runs: Iterable[Run]) -> Codes:
    """Return the versions of the code that made runs; without hashes of it, by the hash of all code."""
    known = [(run, run.record.environment) for run in runs if is_measured(run.record.environment)]
    of_project = [environment.project_sha256 for _, environment in known]
    old = not any(of_project)
    hashes = [environment.code_sha256 for _, environment in known] if old else of_project
    found = {text: [] for text, _ in Counter(filter(None, hashes)).most_common()}
    for (run, _), text in zip(known, hashes, strict=True):
        if text:
            found[text].append(run)
    return Codes(found, 0 if old else sum(not text for text in of_project))


def code_note(runs: Sequence[Run]) -> str:
    """Return which versions of the code made runs, and which versions of each coupler from a file."""
    codes = codes_of(runs)
    parts = [f"code {codes.words(commits=True)}" if codes.runs else "code not known", codes.silent()]
    own: dict[str, list[str]] = {}
    for run in runs:
        code = run.key[1]
        name = run.record.config.coupler
        if ":" in name and code:
            own.setdefault(name, []).append(code)
    for name, hashes in own.items():
        versions = Counter(hashes).most_common()
        said = ", ".join(f"{text[:DIGITS]} ({counted(count, 'run')})" for text, count in versions)
        parts.append(f"{short_name(name)} {said}")
    return "; ".join(filter(None, parts))


def _commits(runs: Sequence[Run]) -> str:
    """Return the commits of some runs, and whether the code had uncommitted changes."""
    found = {}
    for run in runs:
        environment = run.record.environment
        if is_measured(environment) and environment.git_commit:
            changed = " with changes" if environment.git_changes_sha256 else ""
            found[environment.git_commit[:8] + changed] = None
    few = [*list(found)[:2], "…"] if len(found) > 2 else list(found)
    return f" of commit {', '.join(few)}" if few else ""


def kinds_of(runs: Sequence[Run], key: str) -> list[Kind]:
    """Return the kinds of ``environment``, ``code`` or ``data`` of some runs, the most frequent first."""
    found: dict[str, tuple[Any, int]] = {}
    for run in runs:
        part = _part(run.record, key)
        identity = _identity(part)
        found[identity] = part, found.get(identity, (part, 0))[1] + 1
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return [
        Kind(f"{key}-{place}", _words(part, key), list(_flat(part)), count, identity)
        for place, (identity, (part, count)) in enumerate(ordered, 1)
    ]


def run_facts(run: Run, configuration: str, kinds: Mapping[str, Sequence[Kind]]) -> RunFacts:
    """Return the facts of one run; ``kinds`` are the kinds of all runs."""
    record, identities = run.record, {key: _identity(_part(run.record, key)) for key in kinds}
    own = [
        (key, next(kind for kind in found if kind.identity == identities[key]))
        for key, found in kinds.items()
    ]
    return RunFacts(
        run_id=record.run_id,
        name=record.run_name or "",
        configuration=configuration,
        status=run.status,
        command=record.command,
        error=record.error,
        kinds=own,
        facts=_facts(run),
    )


def check_words(record: Record) -> str:
    """Return the verdict of the leak check, with the checks that failed."""
    found = record.check
    if not is_measured(found):
        return f"no verdict: {found.reason}"
    if found.passed:
        return f"passed: {', '.join(found.checks)}"
    failed = [f"{name}: {check.detail}" for name, check in found.checks.items() if not check.passed]
    return f"FAILED: {'; '.join(failed) or 'no check says why'}"


def _facts(run: Run) -> Facts:
    record, time = run.record, run.record.time
    seconds = time.seconds.get("total")
    spent = f"{number(seconds, 1)} s{in_parts(time)}" if seconds else ""
    started = ", ".join(filter(None, (time.start, spent)))
    loss, test, used = run.loss(), run.loss("test"), record.used
    found = [
        ("name", record.run_name),
        ("started", started),
        ("loss on validation", loss and f"{loss:.6f} nats per token"),
        ("loss on test", test and f"{test:.6f} nats per token"),
        ("steps", number(used.steps, 0) if is_measured(used) else None),
        ("hash of the configuration", run.key[0]),
        ("hash of the coupler's code", run.key[1]),
        ("leak check", check_words(record)),
        ("not measured", _not_measured(record)),
    ]
    return [(name, str(text)) for name, text in found if text]


def _not_measured(record: Record) -> str:
    """Return which parts of a record were not measured, and why."""
    by_reason: dict[str, list[str]] = {}
    for key in MEASURED:
        found = getattr(record, key)
        if isinstance(found, NotMeasured):
            by_reason.setdefault(found.reason, []).append(key)
    return "; ".join(f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items())


def _part(record: Record, key: str) -> dict[str, Any]:
    found = record.data if key == "data" else record.environment
    if isinstance(found, NotMeasured) or key == "data":
        return found.model_dump()
    code = {*CODE, COUPLER}
    return found.model_dump(include=set(CODE)) if key == "code" else found.model_dump(exclude=code)


def _identity(part: Any) -> str:
    return json.dumps(part, sort_keys=True, default=str)


def _words(part: Any, key: str) -> str:
    if set(part) == NULL:
        return f"not known: {part['reason']}"
    if key == "data":
        names = [part["name"], part["config_name"], part["verdict"] and f"({part['verdict']})"]
        return " ".join(str(name) for name in names if name) + f", sha256 {part['sha256']}"
    if key == "code":
        dirty = ", with changes" if part["git_changes_sha256"] else ""
        commit = part["git_commit"]
        text = part["project_sha256"] or part["code_sha256"]
        return f"sha256 {text}" + (f", commit {commit[:12]}{dirty}" if commit else "")
    return f"{part['device_name']}, Python {part['python']}, torch {part['packages'].get('torch')}"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names and texts of nested values, None as "none"."""
    if isinstance(value, dict) and value and set(value) != NULL:
        for key, item in value.items():
            yield from _flat(item, f"{name} {key}".strip())
    elif isinstance(value, dict) and value:
        yield name or "value", f"not measured: {value['reason']}"
    else:
        text = "none" if value is None or value == {} else number(value, 0) if type(value) is int else value
        yield name, str(text)
