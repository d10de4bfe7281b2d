"""A study read for comparison: which runs are seeds of one configuration, and which may share a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from bench.analysis.labels import Key, Settings, labels, settings_of
from bench.analysis.run_data import RunData, article_sums, damaged_arrays, read_run
from bench.analysis.setting import Setting, asked
from bench.files import visible
from bench.record import Record, is_measured, read_record
from gnnmoe.config import Refused


@dataclass(frozen=True)
class Run:
    """One run: its record, and on demand its history, its weights over time and its losses by article."""

    folder: Path
    record: Record

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.record.seed

    @property
    def status(self) -> str:
        """The status of the record."""
        return self.record.status

    @property
    def counts(self) -> bool:
        """Whether the run may enter a comparison: it ended well and its perplexity was measured."""
        return self.status == "ok" and self.loss() is not None

    def loss(self, split: str = "validation") -> float | None:
        """Return the mean loss of ``split`` in nats a token, None where it was not measured."""
        scored = self.record.split(split)
        return None if scored is None else scored.loss_nats

    @cached_property
    def data(self) -> RunData:
        """The history and the weights over time; read when first asked for."""
        return read_run(self.folder)

    @cached_property
    def articles(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Σ nll and tokens of each article of the final validation, each (A,); None without a sound file."""
        try:
            return article_sums(self.folder, "validation")
        except (Refused, KeyError, TypeError):  # missing, damaged, or without documents
            return None

    @property
    def key(self) -> Key:
        """What all seeds of a row have in common: the configuration, and the code of its coupler."""
        environment = self.record.environment
        return self.record.configuration, environment.coupler_sha256 if is_measured(environment) else None


def statuses(runs: Iterable[Run]) -> str:
    """Return how many runs ended how: 7 ok, 1 oom."""
    return ", ".join(
        f"{count} {status}" for status, count in Counter(run.status for run in runs).most_common()
    )


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed only."""

    label: str
    settings: Settings
    """The value of every field of the config that can change a number, but the seed; of its first run."""
    runs: tuple[Run, ...]
    """By seed; failed ones too."""
    key: Key
    """What its runs share: the configuration, and the hash of the coupler's code (None: not known)."""

    @cached_property
    def doubled(self) -> dict[int, list[Run]]:
        """The seeds that several runs count for, with these runs: nothing says which one is right."""
        found: dict[int, list[Run]] = {}
        for run in self.runs:
            if run.counts:
                found.setdefault(run.seed, []).append(run)
        return {seed: runs for seed, runs in found.items() if len(runs) > 1}

    @cached_property
    def counted(self) -> dict[int, Run]:
        """The runs that may enter a comparison, by seed; none where several runs have one seed."""
        return {} if self.doubled else {run.seed: run for run in self.runs if run.counts}

    def statuses(self) -> str:
        """Return how its runs ended, and which seeds stand there more than once."""
        return "; ".join([statuses(self.runs), *(f"{len(runs)} runs of seed {seed}, not averaged"
                                                 for seed, runs in self.doubled.items())])  # fmt: skip

    @property
    def coupler(self) -> str:
        """The name of the coupler."""
        return self.settings["coupler_type"]


def doubled_words(configuration: Configuration) -> list[str]:
    """Return, for each seed that several runs of a configuration count for, which runs they are."""
    return [
        f"{configuration.label}: several runs are of seed {seed}, "
        f"{' and '.join(run.record.run_id for run in runs)}. No run of this row is averaged or compared; "
        "move the wrong ones out of the study."
        for seed, runs in configuration.doubled.items()
    ]


@dataclass(frozen=True)
class Group:
    """Configurations that may share a table."""

    setting: Setting
    configurations: list[Configuration]

    @property
    def embedded(self) -> bool:
        """Whether the text is the embedded one, which every table and plot must say."""
        return any(run.record.embedded for run in self.runs)

    @property
    def runs(self) -> list[Run]:
        """All runs, failed ones too."""
        return [run for configuration in self.configurations for run in configuration.runs]


def text_warnings(groups: Iterable[Group]) -> list[str]:
    """Return what every table and plot must say of figures that are not of WikiText-2 or any real corpus."""
    embedded = any(group.embedded for group in groups)
    return ["NOT WIKITEXT-2: figures of the embedded text."] if embedded else []


@dataclass(frozen=True)
class Study:
    """All runs of a study, in groups that may share a table, the largest first."""

    name: str
    path: Path
    groups: list[Group]
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    """Folders whose record, or whose arrays, cannot be read, and why."""
    misplaced: list[tuple[Path, str]] = field(default_factory=list)
    """Folders that are not called as their record's run, which do not count; and why."""

    @property
    def runs(self) -> list[Run]:
        """All runs, failed ones too."""
        return [run for group in self.groups for run in group.runs]


def load_study(path: Path, allow_unequal: bool = False) -> Study:
    """Read the records of every run folder in ``path``, but for runs that were set aside (``run_id.1``).

    Raises:
        Refused: ``path`` is no folder or holds no record.
    """
    if not path.is_dir():
        raise Refused(f"there is no study {path}; python -m bench.report ls lists those there are.")
    runs, unreadable, misplaced = [], [], []
    for file in sorted(path.glob("*/record.json")):
        folder = file.parent
        try:
            record = read_record(folder)
        except Refused as error:
            unreadable.append((folder, visible(str(error))))
            continue
        if is_of_run(folder, record.run_id):
            runs.append(Run(folder, record))
            unreadable += [(folder, visible(why)) for why in damaged_arrays(folder)]
        elif not is_of_run(folder, record.run_id, set_aside=True):
            why = f"its record is of run {record.run_id}: a copy, or a renamed folder"
            misplaced.append((folder, why))
    if not runs:
        others = [f"{visible(folder.name)}: {why}" for folder, why in (*unreadable, *misplaced)]
        why = f": {others[0]}" if others else "; run something with --study first."
        raise Refused(f"study {path} holds no record that can be read{why}")
    return Study(visible(path.resolve().name), path, grouped(runs, allow_unequal), unreadable, misplaced)


def is_of_run(folder: Path, run_id: str, *, set_aside: bool = False) -> bool:
    """Whether a folder is called as the run, or, ``set_aside``, as the run set aside (``run_id.1``)."""
    name = visible(folder.name)
    if not set_aside:
        return name == run_id
    before, _, number = name.rpartition(".")
    return before == run_id and re.fullmatch(r"[1-9]\d*", number) is not None


def grouped(runs: Sequence[Run], allow_unequal: bool = False) -> list[Group]:
    """Return runs as groups that may share a table, the largest first, each of labelled configurations."""
    settings_of_runs = [(Setting.of(run.record, allow_unequal), run) for run in runs]
    by_setting: list[tuple[Setting, list[Run]]] = []
    for setting, run in sorted(settings_of_runs, key=lambda both: both[0].unknown):
        home = _home(setting, run, by_setting)
        if home is None:
            by_setting.append((setting, [run]))
        else:
            home.append(run)
    rows = [(setting, _rows(some)) for setting, some in by_setting]
    every = [(key, settings_of(some[0].record.config)) for _, found in rows for key, some in found.items()]
    names = iter(labels([settings for _, settings in every], [key for key, _ in every]))
    settings = iter([settings for _, settings in every])
    result = [
        Group(setting, [Configuration(next(names), next(settings), tuple(some), key)
                        for key, some in found.items()])
        for setting, found in rows
    ]  # fmt: skip
    return sorted(result, key=lambda group: -len(group.runs))


def _home(setting: Setting, run: Run, groups: Iterable[tuple[Setting, list[Run]]]) -> list[Run] | None:
    """Return the runs of the group that a run belongs to, None where it begins its own.

    A run that ended before everything is known stands with its own configuration; without one there, and
    where nothing was used, with runs that asked for the batch and length that it asked for.
    """
    fitting = [some for known, some in groups if known.fits(setting)]
    if setting.unknown:
        alike = [sum(other.key[0] == run.key[0] for other in some) for some in fitting]
        if any(alike):
            return fitting[alike.index(max(alike))]
        if setting.used is None and setting.asked is not None:
            wanted = setting.asked
            fitting = [some for some in fitting if any(asked(other.record) == wanted for other in some)]
    return fitting[0] if fitting else None


def _rows(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """Return the runs of each row by seed; the rows in the order in which they began.

    A run that ended before it knew its code stands with another one of its configuration.
    """
    found: dict[Key, list[Run]] = {}
    ordered = sorted(runs, key=lambda run: (run.record.time.start, run.seed))
    for run in sorted(ordered, key=lambda run: not is_measured(run.record.environment)):
        knows = is_measured(run.record.environment)
        own = None if knows else next((key for key in found if key[0] == run.key[0]), None)
        found.setdefault(own or run.key, []).append(run)
    return {key: sorted(some, key=lambda run: run.seed) for key, some in found.items()}
