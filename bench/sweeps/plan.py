"""What a sweep will do, before it does anything: each run's id, its cost, and what is there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.config import DEFAULT_MAX_STEPS, RunConfig, as_flags, config_of, resolved
from bench.device import resolve_device
from bench.measure.expected import Training
from bench.record import (
    Data,
    RecordedConfig,
    RunFolder,
    coupler_of,
    is_stale,
    refuse_another_file,
    study_records,
)
from bench.run.identity import Identified, run_id, settings_in_record
from bench.sweeps.executor import PlannedRun
from bench.sweeps.matching import DENSE, Match, Matched, reference_for
from bench.sweeps.seeds import seeds_needed
from bench.sweeps.spec import RunRequest, Sweep
from bench.sweeps.weighing import Scales, match_here
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.cost import Cost, model_cost
from gnnmoe.couplers import is_file

Identify = Callable[[RunConfig], Identified]
PLAIN = {"coupler_type", "preset"}  # flags whose values speak for themselves in a label


@dataclass
class Configuration:
    """What the runs that differ in their seed only have in common."""

    label: str
    flags: dict[str, Any]
    """Plain, by field; the seed is the first run's."""
    model: Cost
    training: Training
    """How its first run trains."""
    off_by: float | None
    """By which share it costs more than what ``match`` asked for; None without it."""
    flops_per_token: float | None
    """Of training: three times a forward."""
    runs: list[PlannedRun] = field(default_factory=list)
    statuses: list[str | None] = field(default_factory=list)
    """The status of each run's record; None where there is none."""
    stale: list[bool | None] = field(default_factory=list)
    """Whether other code made each record; None: it does not say."""

    def ended(self, keep_stale: bool = False) -> list[str | None]:
        """Return the statuses of the records that stay as they are; None for a run that is to be done."""
        pairs = zip(self.statuses, self.stale, strict=True)
        return [status if keep_stale or not stale else None for status, stale in pairs]


@dataclass
class Plan:
    """The runs in their order, and the configurations that they belong to."""

    study: str
    seeds: Sequence[int]
    configurations: list[Configuration]
    runs: list[PlannedRun]

    def seeds_needed(self) -> int:
        """Return how many seeds a sign-flip test needs to tell one configuration from all others."""
        return seeds_needed(max(1, len(self.configurations) - 1))


def make_plan(
    sweep: Sweep,
    places: dict[str, Any],
    identify: Identify,
    match: Match | None = None,
    device: torch.device | None = None,
) -> Plan:
    """Return the plan of a sweep whose runs lie in ``places`` (results_dir, data_dir, device, …).

    ``device`` is that of runs on other machines, which this one may lack; None: the one in ``places``.

    Raises:
        Refused: naming the run that cannot be, and why.
    """
    varying = _varying([request.flags for request in sweep.runs])
    matching = None if match is None else _matching(sweep, places, identify, match)
    made: dict[int, _Made] = {}
    configurations: dict[str, Configuration] = {}
    runs = []
    for request in sweep.runs:
        key = id(request.flags)  # the seeds of a configuration share one table
        try:
            if key not in made or made[key].by_seed:
                made[key] = _make(request, varying, places, identify, matching, device)
        except Refused as error:
            raise Refused(f"run {_label(request, varying)} (seed {request.seed}): {error}") from error
        run = made[key].run(request.seed, Path(places["results_dir"]) / sweep.study)
        found = configurations.setdefault(made[key].shared, made[key].configuration)
        if any(run.run_id == other.run_id for other in found.runs):
            continue  # it differs in what changes no number
        record = RunFolder(run.folder.parent, ".", run.run_id).read_record()
        found.runs.append(run)
        found.statuses.append(None if record is None else record.status)
        found.stale.append(is_stale(record, run.code))
        runs.append(run)
    _refuse_two_files(list(made.values()), Path(places["results_dir"]) / sweep.study)
    return Plan(sweep.study, sweep.seeds, list(configurations.values()), runs)


def _refuse_two_files(made: Sequence[_Made], study: Path) -> None:
    """Refuse two files whose couplers have one class name, in the plan or beside the study's records.

    Raises:
        Refused: as ``refuse_another_file``.
    """
    ours = [(one.coupler, one.code["coupler_sha256"]) for one in made]
    if any(is_file(coupler) for coupler, _ in ours):
        others = [*ours, *map(coupler_of, study_records(study))]
        for coupler, sha256 in ours:
            refuse_another_file(coupler, sha256, others)


@dataclass
class _Made:
    """What the seeds of a configuration share."""

    configuration: Configuration
    flags: dict[str, Any]
    identity: dict[str, Any]
    cost: float | None
    steps: int
    coupler: str
    """As its flag names it."""
    config: RecordedConfig
    """As a record holds it; the seed is the first run's."""
    data: Data
    shared: str
    """What its runs share: ``configuration_id``."""
    code: dict[str, str]
    by_seed: bool
    """Whether more than the seed itself depends on the seed."""

    def run(self, seed: int, study: Path) -> PlannedRun:
        self.identity["training"]["seed"] = seed
        name = run_id(self.identity)
        arguments = tuple(as_flags({**self.flags, "seed": seed}))
        label = f"{self.configuration.label} · seed {seed}"
        config = self.config.model_copy(update={"training": {**self.config.training, "seed": seed}})
        known = {"seed": seed, "configuration": self.shared, "config": config, "data": self.data}
        return PlannedRun(name, label, arguments, study / name, self.cost, self.steps, known, self.code)


_Matching = Callable[[GNNMoEConfig, Scales], Matched]


def _matching(sweep: Sweep, places: dict[str, Any], identify: Identify, match: Match) -> _Matching:
    """Return what matches a model to the sweep's first one with the reference's coupler."""
    tables = {id(request.flags): request.flags for request in sweep.runs}.values()
    of_reference = [flags for flags in tables
                    if resolved(flags).get("coupler_type", "HGNN") == match.reference]  # fmt: skip
    models = [identify(config_of({**flags, **places})).model for flags in of_reference]
    return lambda model, scales: match_here(model, match, reference_for(model, match, models), scales)


def _make(
    request: RunRequest,
    varying: Sequence[str],
    places: dict[str, Any],
    identify: Identify,
    matching: _Matching | None,
    device: torch.device | None,
) -> _Made:
    flags, off_by = {**request.flags, "seed": request.seed}, None
    config = config_of({**flags, **places})
    known = identify(config)
    device = device or resolve_device(config.places.device)
    if matching is not None:
        found = matching(known.model, Scales(config, device))
        off_by = found.off_by
        if found.ffn_dim is not None:
            flags |= {"ffn_dim": found.ffn_dim}
            if known.model.coupler_type == DENSE:
                flags["coupler_option"] = [*flags.get("coupler_option", []), f"{DENSE}.match=none"]
            config = config_of({**flags, **places})
            known = identify(config)
    model, corpus = known.model, known.corpus
    cost = model_cost(model)
    per_token = None if cost.flops is None else 3 * cost.flops / model.max_seq_length
    steps = _training_steps(config, corpus)
    tokens = steps * config.training.batch_size * config.model.max_seq_length
    total = None if per_token is None else per_token * tokens
    training = Training(model, config, device)
    configuration = Configuration(_label(request, varying), flags, cost, training, off_by, per_token)
    return _Made(
        configuration, flags, known.identity, total, steps, config.model.coupler_type,
        settings_in_record(config), Data(**corpus.to_record()),
        known.configuration, known.code, by_seed=config.training.curriculum is not None,
    )  # fmt: skip


def _training_steps(config: RunConfig, corpus: Any) -> int:
    """Return about how many steps the training has; a curriculum and a batch schedule have others."""
    training = config.training
    blocks = corpus.splits["train"].num_tokens // config.model.max_seq_length
    batches = min(config.data.num_train_samples or blocks, blocks) // training.batch_size
    batches = min(batches, training.max_batches_per_epoch or batches)
    limits = [] if training.epochs is None else [training.epochs * batches]
    if training.max_steps is not None or not limits:
        limits.append(training.max_steps or DEFAULT_MAX_STEPS)
    return min(limits)


def _varying(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Return the flags in which some runs differ, in the order in which they first appear."""
    values: dict[str, set[str]] = {}
    complete = [resolved(table) for table in {id(table): table for table in tables}.values()]
    names = dict.fromkeys(name for table in complete for name in table)
    for name in names:
        values[name] = {repr(table.get(name)) for table in complete}
    return [name for name in names if len(values[name]) > 1]


def _label(request: RunRequest, varying: Sequence[str]) -> str:
    """Return what is special about a run, for people: ``GNN · num_experts 4``."""
    table = {"coupler_type": "HGNN", **resolved(request.flags)}
    names = ["coupler_type", *(name for name in varying if name != "coupler_type")]
    parts = []
    for name in names:
        value = table.get(name)
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if value not in (None, ""):
            parts.append(str(value) if name in PLAIN or isinstance(value, str) else f"{name} {value}")
    return " · ".join(parts)
