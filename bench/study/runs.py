"""The runs of a study: which runs are one configuration, and which configurations may share a table.

Also finds studies and runs by name. Nothing here computes a statistic.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bench.config import FlagTable
from bench.files import kind_of, visible
from bench.record import Record, is_measured, read_record
from bench.study.labels import Key, flags_that_count, labels
from bench.study.run_files import (
    ARTICLES,
    NLL,
    RunData,
    article_sums,
    damaged_arrays,
    expert_features,
    left_out,
)
from gnnmoe.config import Refused, brief, unknown_name

REFERENCE = "reference"
"""The folder in results/ that holds the reference studies, as results/ holds all other studies."""


@dataclass(frozen=True)
class Basis:
    """What must be equal for the numbers of two runs to share a table.

    A part is None where the run ended before the part was known.
    """

    corpus: tuple[Any, ...] | None
    """Name, configuration, tokenizer and hash of the corpus."""
    device: tuple[Any, ...] | None
    """Type, name, number of threads (on a CPU) and number of ranks: sums and speeds differ with each."""
    protocol: tuple[Any, ...] | None
    """Scored tokens, length, stride and unknown words of the final validation."""
    used: tuple[Any, ...] | None
    """The batch sizes and the lengths that were used; several where a controller changed them."""
    asked: tuple[Any, ...] | None = None
    """The batch size and the length that the user asked for; a search may have found other sizes."""

    @classmethod
    def of(cls, record: Record, allow_unequal: bool) -> Basis:
        """Return the basis of a run; with ``allow_unequal`` protocol and sizes count as equal."""
        if allow_unequal:
            return cls(_corpus(record), _device(record), None, None)
        return cls(_corpus(record), _device(record), _protocol(record), _used(record), _asked(record))

    @property
    def _parts(self) -> tuple[tuple[Any, ...] | None, ...]:
        return self.corpus, self.device, self.protocol, self.used

    @property
    def unknown(self) -> int:
        """The number of parts that are not known."""
        return self._parts.count(None)

    def fits(self, other: Basis) -> bool:
        """Return whether the two are equal in each part that both know."""
        pairs = zip(self._parts, other._parts, strict=True)
        return all(a is None or b is None or a == b for a, b in pairs)

    def corpus_words(self) -> str:
        """Return the corpus in words; empty where it is not known."""
        if not self.corpus:
            return ""
        name, config_name, tokenizer, sha256 = self.corpus
        return f"{' '.join(part for part in (name, config_name) if part)} ({tokenizer}, {sha256[:12]})"

    def device_words(self) -> str:
        """Return the device in words; empty where it is not known."""
        if not self.device:
            return ""
        kind, name, threads, ranks = self.device
        each = f"{name}, {threads} thread{'s' * (threads > 1)}" if threads else f"{kind}: {name}"
        return f"{each}, {ranks} ranks" if ranks > 1 else each

    def scored_words(self) -> str:
        """Return what was scored in words; empty where nothing was scored."""
        if not self.protocol:
            return ""
        tokens, length, stride, unknown = self.protocol
        words = f" ({100 * unknown / tokens:.1f}% of them unknown words)" if unknown else ""
        return f"{tokens:,} tokens{words} at length {length}, stride {stride}"

    def words(self) -> str:
        """Return the whole basis in words."""
        parts = [self.corpus_words(), self.device_words()]
        if self.protocol:
            parts.append(f"scored on {self.scored_words()}")
        if self.used:
            sizes, lengths = (" and ".join(map(str, numbers)) for numbers in self.used)
            parts.append(f"batch {sizes} × {lengths}")
        elif self.asked:
            parts.append("batch {} × {} asked for".format(*self.asked))
        return " · ".join(filter(None, parts)) or "nothing measured"


def _corpus(record: Record) -> tuple[Any, ...] | None:
    data = record.data
    return (data.name, data.config_name, data.tokenizer, data.sha256) if is_measured(data) else None


def _device(record: Record) -> tuple[Any, ...] | None:
    environment = record.environment
    if not is_measured(environment):
        return None
    threads = environment.threads if environment.device_type == "cpu" else None
    return environment.device_type, environment.device_name, threads, environment.world_size


def _protocol(record: Record) -> tuple[Any, ...] | None:
    scored = record.split()
    return scored and (scored.tokens, scored.length, scored.stride, scored.unknown_words)


def _used(record: Record) -> tuple[Any, ...] | None:
    used = record.used
    sizes = {epoch.batch_size for epoch in used.ledger.epochs} if is_measured(used) else set()
    if not sizes or not is_measured(used):
        return None
    return tuple(sorted(sizes)), tuple(used.lengths or [record.config.max_seq_length])


def _asked(record: Record) -> tuple[Any, ...]:
    return record.config.batch_size, record.config.max_seq_length


@dataclass(frozen=True)
class Run:
    """One run: its record, and, read when first asked for, its history and its losses by article."""

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
        """Whether the run may enter a comparison: its status is ok and its perplexity was measured."""
        return self.status == "ok" and self.loss() is not None

    def loss(self, split: str = "validation") -> float | None:
        """Return the mean loss of ``split`` in nats per token; None where it was not measured."""
        scored = self.record.split(split)
        return None if scored is None else scored.loss_nats

    @cached_property
    def data(self) -> RunData:
        """The history, and the weights over time."""
        return RunData(self.folder, self.record)

    @cached_property
    def articles(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Σ nll and tokens of each article of the final validation, each (A,); None if missing or damaged."""
        found = None
        if any((self.folder / name).is_file() for name in (NLL, ARTICLES)):
            with left_out():
                found = article_sums(self.folder, "validation")
        return found

    @cached_property
    def features(self) -> dict[int, np.ndarray] | str:
        """By layer the features (E, n, D) of the experts; in words why they cannot be used if damaged."""
        try:
            return expert_features(self.folder)
        except Refused as error:
            return visible(str(error))

    @property
    def key(self) -> Key:
        """What all seeds of a configuration share: its hash, and the hash of the coupler's code."""
        environment = self.record.environment
        return self.record.configuration, environment.coupler_sha256 if is_measured(environment) else None


def statuses(runs: Iterable[Run]) -> str:
    """Return how many runs have which status: "7 ok, 1 oom"."""
    return ", ".join(
        f"{count} {status}" for status, count in Counter(run.status for run in runs).most_common()
    )


@dataclass(frozen=True)
class Configuration:
    """Runs that differ only in their seed."""

    label: str
    flags: FlagTable
    """The flags that count (``flags_that_count``), of the first run."""
    runs: tuple[Run, ...]
    """Sorted by seed; also failed runs."""
    key: Key
    """The hashes of the configuration and of the coupler's code (None: not known)."""

    @cached_property
    def doubled(self) -> dict[int, list[Run]]:
        """The seeds that have several runs, with these runs: nothing says which run is right."""
        found: dict[int, list[Run]] = {}
        for run in self.runs:
            if run.counts:
                found.setdefault(run.seed, []).append(run)
        return {seed: runs for seed, runs in found.items() if len(runs) > 1}

    @cached_property
    def counted(self) -> dict[int, Run]:
        """The runs that may enter a comparison, by seed; empty where a seed has several runs."""
        return {} if self.doubled else {run.seed: run for run in self.runs if run.counts}

    def statuses(self) -> str:
        """Return how many runs have which status, and which seeds have several runs."""
        return "; ".join(
            [
                statuses(self.runs),
                *(f"{len(runs)} runs of seed {seed}, not averaged" for seed, runs in self.doubled.items()),
            ]
        )

    @property
    def coupler(self) -> str:
        """The name of the coupler."""
        return self.flags["coupler_type"]


def doubled_words(configuration: Configuration) -> list[str]:
    """Return a sentence for each seed of the configuration that has several runs."""
    return [
        f"{configuration.label}: several runs are of seed {seed}, "
        f"{' and '.join(run.record.run_id for run in runs)}. No run of this row is averaged or compared; "
        "move the wrong ones out of the study."
        for seed, runs in configuration.doubled.items()
    ]


@dataclass(frozen=True)
class Group:
    """Configurations that may share a table."""

    basis: Basis
    configurations: list[Configuration]

    @property
    def embedded(self) -> bool:
        """Whether a run used the embedded text, which every table and plot must say."""
        return any(run.record.embedded for run in self.runs)

    @property
    def runs(self) -> list[Run]:
        """All runs, also the failed runs."""
        return [run for configuration in self.configurations for run in configuration.runs]


def text_warnings(groups: Iterable[Group]) -> list[str]:
    """Return the warning that every table and plot of the embedded text must show."""
    embedded = any(group.embedded for group in groups)
    return ["NOT WIKITEXT-2: figures of the embedded text."] if embedded else []


@dataclass(frozen=True)
class Study:
    """All runs of a study, in groups that may share a table, the largest group first."""

    name: str
    path: Path
    groups: list[Group]
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    """Folders whose record or arrays cannot be read, and why."""
    misplaced: list[tuple[Path, str]] = field(default_factory=list)
    """Folders whose name is not the run id of their record, and why; their runs do not count."""

    @property
    def runs(self) -> list[Run]:
        """All runs, also the failed runs."""
        return [run for group in self.groups for run in group.runs]


def load_study(path: Path, allow_unequal: bool = False) -> Study:
    """Read the record of every run folder in ``path``, except of runs that were set aside (``run_id.1``).

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
    """Return whether a folder has the name of the run, or of the run when it was set aside (``run_id.1``)."""
    name = visible(folder.name)
    if not set_aside:
        return name == run_id
    before, _, number = name.rpartition(".")
    return before == run_id and re.fullmatch(r"[1-9]\d*", number) is not None


def grouped(runs: Sequence[Run], allow_unequal: bool = False) -> list[Group]:
    """Return runs as groups that may share a table, the largest group first, with labelled configurations."""
    by_basis: list[tuple[Basis, list[Run]]] = []
    bases = [(Basis.of(run.record, allow_unequal), run) for run in runs]
    for basis, run in sorted(bases, key=lambda both: both[0].unknown):
        home = _home(basis, run, by_basis)
        if home is None:
            by_basis.append((basis, [run]))
        else:
            home.append(run)
    rows = [(basis, key, some) for basis, found in by_basis for key, some in _rows(found).items()]
    flags = [flags_that_count(some[0].record.config) for _, _, some in rows]
    configurations: dict[int, list[Configuration]] = defaultdict(list)
    for name, own, (basis, key, some) in zip(
        labels(flags, [key for _, key, _ in rows]), flags, rows, strict=True
    ):
        configurations[id(basis)].append(Configuration(name, own, tuple(some), key))
    found = [Group(basis, configurations[id(basis)]) for basis, _ in by_basis]
    return sorted(found, key=lambda group: -len(group.runs))


def _home(basis: Basis, run: Run, groups: Iterable[tuple[Basis, list[Run]]]) -> list[Run] | None:
    """Return the runs of the group that a run belongs to; None where it begins a new group.

    A run that ended early does not know its whole basis. It joins the group with most runs of its own
    configuration. If no group has such a run and the run used no batch, it joins a group whose runs asked for
    the same batch size and length.
    """
    fitting = [some for known, some in groups if known.fits(basis)]
    if basis.unknown:
        alike = [sum(other.key[0] == run.key[0] for other in some) for some in fitting]
        if any(alike):
            return fitting[alike.index(max(alike))]
        if basis.used is None and basis.asked is not None:
            fitting = [some for some in fitting if any(_asked(other.record) == basis.asked for other in some)]
    return fitting[0] if fitting else None


def _rows(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """Return the runs of each configuration by seed; the configurations in the order in which they began.

    A run that ended before the hash of its code was known counts for a configuration that has a hash.
    """
    found: dict[Key, list[Run]] = {}
    ordered = sorted(runs, key=lambda run: (run.record.time.start, run.seed))
    for run in sorted(ordered, key=lambda run: not is_measured(run.record.environment)):
        knows = is_measured(run.record.environment)
        own = None if knows else next((key for key in found if key[0] == run.key[0]), None)
        found.setdefault(own or run.key, []).append(run)
    return {key: sorted(some, key=lambda run: run.seed) for key, some in found.items()}


def studies_in(results_dir: Path) -> list[Path]:
    """Return the folders of the studies in ``results_dir`` and in its folder of reference studies.

    Raises:
        Refused: the path cannot be looked at.
    """
    kind_of(results_dir)
    folders = [*results_dir.glob("*"), *results_dir.glob(f"{REFERENCE}/*")]
    return sorted(path for path in folders if _is_study(path))


def _is_study(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*/record.json"))


def study_folder(name: str, results_dir: Path) -> Path | None:
    """Return the folder of a study by its name or path; None where there is none."""
    places = [results_dir / name, results_dir / REFERENCE / name, Path(name)] if name else []
    return next((path for path in places if _is_study(path)), None)


def the_study(name: str, results_dir: Path) -> Path:
    """Return the folder of a study by its name or path.

    Raises:
        Refused: there is no such study; names the studies that exist.
    """
    found = study_folder(name, results_dir)
    if found is None:
        names = [path.relative_to(results_dir).as_posix() for path in studies_in(results_dir)]
        raise Refused(f"{unknown_name('study', name, names)} Studies are looked for in {results_dir}.")
    return found


def find_run(name: str, results_dir: Path) -> Run:
    """Return the run whose id begins with ``name``, in any study; ``STUDY/ID`` names the study.

    Raises:
        Refused: no run or several runs have this id, or the record cannot be read.
    """
    study, _, run_id = name.rpartition("/")
    folder = study_folder(study, results_dir)
    studies = studies_in(results_dir) if not study else [folder] if folder else []
    wanted = re.fullmatch(r"[0-9a-f]{2,12}(\.\d+)?", run_id)
    found = [path for place in studies if wanted for path in sorted(place.glob(f"{run_id}*/record.json"))]
    folders = [path.parent for path in found if path.is_file()]
    exact = [path for path in folders if path.name == run_id]
    current = exact or [path for path in folders if "." not in path.name] or folders
    if not current:
        raise Refused(
            f"no study and no run in {results_dir} is called {brief(name)}; of the 12 hex digits of a run's "
            "id the first few are enough. python -m bench.report ls lists what there is."
        )
    if len(current) > 1:
        places = ", ".join(f"{path.parent.name}/{path.name}" for path in current[:5])
        more = ", …" * (len(current) > 5)
        raise Refused(f"{brief(name)} stands for {len(current)} runs: {places}{more}; name one of them so.")
    return Run(current[0], read_record(current[0]))
