"""A study read for comparison: which runs are seeds of one configuration, and which may share a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from bench.analysis.labels import Settings, labels, settings_of
from bench.analysis.run_data import RunData, article_sums, damaged_arrays, read_record, read_run
from bench.analysis.setting import Setting, asked
from bench.measure.quantity import is_measured
from bench.records.schema import Record


@dataclass(frozen=True)
class Run:
    """One run: its record, and on demand its history, its weights over time and its losses by article."""

    folder: Path
    record: Record

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.record["seed"]

    @property
    def status(self) -> str:
        """The status of the record."""
        return self.record["status"]

    @property
    def counts(self) -> bool:
        """Whether the run may enter a comparison: it ended well and its perplexity was measured."""
        return self.status == "ok" and self.loss() is not None

    def loss(self, split: str = "validation") -> float | None:
        """Return the mean loss of ``split`` in nats a token, None where it was not measured."""
        quality = self.record["quality"]
        if not is_measured(quality) or not is_measured(quality.get(split)):
            return None
        return quality[split]["nll_sum"] / quality[split]["tokens"]

    @cached_property
    def data(self) -> RunData:
        """The history and the weights over time; read when first asked for."""
        return read_run(self.folder)

    @cached_property
    def articles(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Σ nll and tokens of each article of the final validation, each (A,); None without a sound file."""
        try:
            return article_sums(self.folder, "validation")
        except (ValueError, KeyError, TypeError):  # missing, damaged, or without documents
            return None

    @cached_property
    def key(self) -> str:
        """What all seeds of a configuration have in common, as text."""
        return json.dumps(settings_of(self.record["config"]), sort_keys=True, default=str)


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seed only."""

    label: str
    settings: Settings
    """The value of every field of the config that can change a number, but the seed."""
    runs: tuple[Run, ...]
    """By seed; failed ones too."""

    @cached_property
    def counted(self) -> dict[int, Run]:
        """The runs that may enter a comparison, by seed."""
        return {run.seed: run for run in self.runs if run.counts}

    @property
    def coupler(self) -> str:
        """The name of the coupler."""
        return self.settings["coupler_type"]


@dataclass(frozen=True)
class Group:
    """Configurations that may share a table."""

    setting: Setting
    configurations: list[Configuration]

    @property
    def embedded(self) -> bool:
        """Whether the text is the embedded one, which every table and plot must say."""
        return any(run.record["data"].get("source") == "embedded" for run in self.runs)

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

    @property
    def runs(self) -> list[Run]:
        """All runs, failed ones too."""
        return [run for group in self.groups for run in group.runs]


def load_study(path: Path, allow_unequal: bool = False) -> Study:
    """Read the records of every run folder in ``path``, but for runs that were set aside (``run_id.1``).

    Raises:
        ValueError: ``path`` is no folder or holds no record.
    """
    if not path.is_dir():
        raise ValueError(f"there is no study {path}; python -m bench.report ls lists those there are.")
    runs, unreadable = [], []
    for file in sorted(path.glob("*/record.json")):
        try:
            record = read_record(file.parent)
        except ValueError as error:
            unreadable.append((file.parent, str(error)))
            continue
        if record["run_id"] == file.parent.name:
            runs.append(Run(file.parent, record))
            unreadable += [(file.parent, why) for why in damaged_arrays(file.parent)]
    if not runs:
        why = f": {unreadable[0][1]}" if unreadable else "; run something with --study first."
        raise ValueError(f"study {path} holds no record that can be read{why}")
    return Study(path.resolve().name, path, grouped(runs, allow_unequal), unreadable)


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
    groups = [(setting, _configurations(some)) for setting, some in by_setting]
    names = iter(labels([settings for _, found in groups for settings, _ in found]))
    result = [
        Group(setting, [Configuration(next(names), settings, tuple(some)) for settings, some in found])
        for setting, found in groups
    ]
    return sorted(result, key=lambda group: -len(group.runs))


def _home(setting: Setting, run: Run, groups: Iterable[tuple[Setting, list[Run]]]) -> list[Run] | None:
    """Return the runs of the group that a run belongs to, None where it begins its own.

    A run that ended before everything is known stands with its own configuration; without one there, and
    where nothing was used, with runs that asked for the batch and length that it asked for.
    """
    fitting = [some for known, some in groups if known.fits(setting)]
    if setting.unknown:
        own = max(fitting, key=lambda some: sum(other.key == run.key for other in some), default=[])
        if any(other.key == run.key for other in own):
            return own
        if setting.used is None and setting.asked is not None:
            wanted = setting.asked
            fitting = [some for some in fitting if any(asked(other.record) == wanted for other in some)]
    return fitting[0] if fitting else None


def _configurations(runs: Iterable[Run]) -> list[tuple[Settings, list[Run]]]:
    found: dict[str, tuple[Settings, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: (run.record["time"].get("start") or "", run.seed)):
        found.setdefault(run.key, (settings_of(run.record["config"]), []))[1].append(run)
    return [(settings, sorted(some, key=lambda run: run.seed)) for settings, some in found.values()]
