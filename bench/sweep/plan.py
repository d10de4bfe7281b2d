"""What a sweep will do, before it does anything: each run's id, its cost, and what is there already.

With ``--match`` every model costs as much as a reference: the width of its experts is solved for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.config import DEFAULT_MAX_STEPS, RunConfig, as_flags, complete, config_of, resolved
from bench.data.cache import cache_folder, kept, key_of, replace_file
from bench.device import cpu_threads, resolve_device
from bench.measure.memory import CannotPredict
from bench.measure.timing import Training, step_time_ratio
from bench.record import (
    Data,
    RecordedConfig,
    RunFolder,
    classes_of,
    files_of,
    is_stale,
    refuse_another_file,
    stale_notes,
    study_records,
)
from bench.run.prepare import Identified, config_dict, run_id, settings_in_record
from bench.study.hypotheses import Hypothesis, seeds_needed
from bench.study.labels import flags_that_count, labels
from bench.sweep.executors.local import slots_for
from bench.sweep.specification import RunRequest, Sweep
from bench.training.environment import code_hashes, device_name
from bench.tune.find import format_bytes
from gnnmoe.config import GNNMoEConfig, Refused, brief, unknown_name
from gnnmoe.cost import QUANTITIES as BY_FORMULA
from gnnmoe.cost import Cost, matched_ffn_dim, model_cost
from gnnmoe.couplers.registry import coupler_class

Identify = Callable[[RunConfig], Identified]
DENSE = "dense"
TOLERANCES = {"memory": 0.001, "time": 0.02}  # of the reference: the prediction is exact, a clock is not
QUANTITIES = (*BY_FORMULA, *TOLERANCES)
OF_A_COUPLER = (
    "coupler_type",
    "coupler_options",
    "ffn_dim",
    "hgnn_conv_type",
    "static_hyperedge_strategy",
    "hgnn_learnable_edge_weights",
)
"""Fields in which a model may differ from the reference that it is matched to."""
MOST_TRIALS, MOST_WIDTHS = 16, 64  # widths that are tried, and times the width to begin with
FORMAT = 2  # add 1 whenever the same match would be answered or stored differently
Ratio = Callable[[str, GNNMoEConfig, GNNMoEConfig], float]
"""From memory or time, a model and the reference to how many times as much of it the model takes."""
MOST_ROWS = 40
DONE = ("ok", "check_failed")
COMPILED_PEAK = "peaks are of uncompiled steps; compiled ones took up to 1.8 times that on a GPU"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    run_id: str
    label: str
    """For people, such as ``HGNN all_pairs E 4 · seed 0``."""
    arguments: tuple[str, ...]
    """The flags of ``python -m bench.run``, complete but for places."""
    folder: Path
    """``results_dir/study/run_id``."""
    cost: float | None = None
    """FLOPs of the whole run, to compare with other runs; None: unknown."""
    steps: int | None = None
    """Training steps of the whole run, to show; None: unknown."""
    known: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Keys of its record that are known beforehand (config, seed, …), for a run that dies too early."""
    code: Mapping[str, str] = field(default_factory=dict, compare=False)
    """The hashes of the code that would run, to see whether a record is stale; empty: no record is."""


@dataclass
class PlannedConfiguration:
    """The runs that differ only in their seed, and what they share."""

    label: str
    """The label in the report of the study; set when all configurations are known."""
    flags: dict[str, Any]
    """Plain, by field; the seed is the first run's."""
    known: Identified
    training: Training
    """The training of its first run."""
    cost: Cost
    """The model's, by formula."""
    off_by: float | None
    """The share by which it costs more than ``match`` asked for; None without ``match``."""
    runs: list[PlannedRun] = field(default_factory=list)
    statuses: list[str | None] = field(default_factory=list)
    """The status of each run's record; None where there is none."""
    stale: list[bool | None] = field(default_factory=list)
    """Whether other code made each record; None: the record does not say."""

    @property
    def flops_per_token(self) -> float | None:
        """FLOPs of training per token: three times a forward; None: unknown."""
        flops = self.cost.flops
        return None if flops is None else 3 * flops / self.training.model.max_seq_length

    @cached_property
    def settings(self) -> RecordedConfig:
        """The config of its first run, as a record holds it."""
        return settings_in_record(self.training.config)

    @cached_property
    def data(self) -> Data:
        """The text, as a record describes it."""
        return Data(**self.known.corpus.to_record())

    @cached_property
    def steps(self) -> int:
        """About how many steps the training has, without a curriculum or a batch schedule."""
        config = self.training.config
        training, length = config.training, config.model.max_seq_length
        blocks = self.known.corpus.splits["train"].num_tokens // length
        batches = min(config.data.num_train_samples or blocks, blocks) // training.batch_size
        batches = min(batches, training.max_batches_per_epoch or batches)
        limits = [] if training.epochs is None else [training.epochs * batches]
        if training.max_steps is not None or not limits:
            limits.append(training.max_steps or DEFAULT_MAX_STEPS)
        return min(limits)

    def run(self, seed: int, label: str, study: Path) -> PlannedRun:
        """Return the run with a seed; ``label`` is the label of the configuration."""
        self.known.identity["training"]["seed"] = seed
        name = run_id(self.known.identity)
        config, per_token = self.training.config, self.flops_per_token
        tokens = self.steps * config.training.batch_size * config.model.max_seq_length
        settings = self.settings.model_copy(update={"training": {**self.settings.training, "seed": seed}})
        record = {"seed": seed, "configuration": self.known.configuration, "config": settings}
        return PlannedRun(
            name,
            f"{label} · seed {seed}",
            tuple(as_flags({**self.flags, "seed": seed})),
            study / name,
            cost=None if per_token is None else per_token * tokens,
            steps=self.steps,
            known={**record, "data": self.data},
            code=self.known.code,
        )

    def ended(self, keep_stale: bool = False) -> list[str | None]:
        """Return the statuses of the records that stay as they are; None for a run that is to be done."""
        pairs = zip(self.statuses, self.stale, strict=True)
        return [status if keep_stale or not stale else None for status, stale in pairs]


@dataclass
class Plan:
    """The runs in their order, and the configurations that they belong to."""

    study: str
    seeds: Sequence[int]
    configurations: list[PlannedConfiguration]
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

    ``device`` is the device of runs on other machines, which this machine may lack; None: that of ``places``.

    Raises:
        Refused: naming the run that cannot be, and why.
    """
    made = _made(sweep, places, identify, match, device)
    study = Path(places["results_dir"]) / sweep.study
    _refuse_two_files(made, study)
    configurations: dict[str, PlannedConfiguration] = {}
    for found in made:
        configurations.setdefault(found.known.configuration, found)
    flags = [flags_that_count(found.settings) for found in configurations.values()]
    keys = [(name, found.known.code["coupler_sha256"]) for name, found in configurations.items()]
    for found, label in zip(configurations.values(), labels(flags, keys), strict=True):
        found.label = label
    runs = []
    for request, found in zip(sweep.runs, made, strict=True):
        configuration = configurations[found.known.configuration]
        run = found.run(request.seed, configuration.label, study)
        if any(run.run_id == other.run_id for other in configuration.runs):
            continue  # it differs only in flags that change no number
        record = RunFolder(study.parent, study.name, run.run_id).read_record()
        configuration.runs.append(run)
        configuration.statuses.append(None if record is None else record.status)
        configuration.stale.append(is_stale(record, run.code))
        runs.append(run)
    return Plan(sweep.study, sweep.seeds, list(configurations.values()), runs)


def _made(
    sweep: Sweep, places: dict[str, Any], identify: Identify, match: Match | None, device: torch.device | None
) -> list[PlannedConfiguration]:
    """Return the configuration of each run of the sweep; the seeds of a configuration share it.

    Raises:
        Refused: names the run that is impossible, and why.
    """
    matcher = None if match is None else _matcher(sweep, places, identify, match)
    by_flags: dict[int, PlannedConfiguration] = {}
    made = []
    for request in sweep.runs:
        key = id(request.flags)  # the seeds of a configuration share one table
        try:
            by_seed = key in by_flags and by_flags[key].training.config.training.curriculum is not None
            if key not in by_flags or by_seed:
                by_flags[key] = _make(request, places, identify, matcher, device)
        except Refused as error:
            raise Refused(f"run {_label_by_flags(request, sweep)} (seed {request.seed}): {error}") from error
        made.append(by_flags[key])
    return made


def _label_by_flags(request: RunRequest, sweep: Sweep) -> str:
    """Return a label for a run that was refused, from the flags of all runs of the sweep."""
    tables = list({id(other.flags): other.flags for other in sweep.runs}.values())
    keys = [(str(place), None) for place in range(len(tables))]
    names = labels([complete(flags) for flags in tables], keys)
    return next(name for flags, name in zip(tables, names, strict=True) if flags is request.flags)


def _refuse_two_files(made: Sequence[PlannedConfiguration], study: Path) -> None:
    """Refuse two files whose classes have one name, in the plan or beside the study's records.

    Raises:
        Refused: as ``refuse_another_file``.
    """
    ours = [(files_of(vars(each.training.config.model)), each.known.code["coupler_sha256"]) for each in made]
    if any(classes for classes, _ in ours):
        others = [*ours, *map(classes_of, study_records(study))]
        for classes, sha256 in ours:
            refuse_another_file(classes, sha256, others)


def _matcher(
    sweep: Sweep, places: dict[str, Any], identify: Identify, match: Match
) -> Callable[[GNNMoEConfig, TrainingCosts], Matched]:
    """Return what matches a model to the sweep's first model with the reference's coupler."""
    tables = {id(request.flags): request.flags for request in sweep.runs}.values()
    of_reference = [
        table for table in tables if resolved(table).get("coupler_type", "HGNN") == match.reference
    ]
    models = [identify(config_of({**table, **places})).model for table in of_reference]
    return lambda model, costs: matched_here(model, match, reference_for(model, match, models), costs)


def _make(
    request: RunRequest,
    places: dict[str, Any],
    identify: Identify,
    matcher: Callable[[GNNMoEConfig, TrainingCosts], Matched] | None,
    device: torch.device | None,
) -> PlannedConfiguration:
    flags, off_by = {**request.flags, "seed": request.seed}, None
    config = config_of({**flags, **places})
    known = identify(config)
    device = device or resolve_device(config.places.device)
    if matcher is not None:
        found = matcher(known.model, TrainingCosts(config, device))
        off_by = found.off_by
        if found.ffn_dim is not None:
            flags |= {"ffn_dim": found.ffn_dim}
            if known.model.coupler_type == DENSE:
                flags["coupler_option"] = [*flags.get("coupler_option", []), f"{DENSE}.match=none"]
            config = config_of({**flags, **places})
            known = identify(config)
    training = Training(known.model, config, device)
    cost = model_cost(known.model)
    return PlannedConfiguration("", flags, known, training, cost, off_by)


# --- matching -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """Make every model cost as much, in ``quantity``, as the first model with the coupler ``reference``."""

    quantity: str
    reference: str

    @classmethod
    def parse(cls, text: str) -> Match:
        """Return the match that ``"params HGNN"`` or ``"time mean"`` asks for.

        Raises:
            Refused: it has another form, or names an unknown quantity or coupler.
        """
        words = text.split() if isinstance(text, str) else []
        if len(words) != 2:
            raise Refused(f'match is {brief(text)}; write a quantity and a coupler, such as "params HGNN".')
        quantity, reference = words
        if quantity not in QUANTITIES:
            raise Refused(unknown_name("quantity to match", quantity, QUANTITIES))
        if reference == DENSE:
            raise Refused(
                "match: dense has no experts whose size could be matched; name a coupler that has experts."
            )
        coupler_class(reference)
        return cls(quantity, reference)


@dataclass(frozen=True)
class Matched:
    """The result of matching one model."""

    ffn_dim: int | None
    """The width of its experts; None for the reference itself, which stays as it is."""
    off_by: float
    """The share by which it still costs more than the reference."""


def reference_for(config: GNNMoEConfig, match: Match, models: Iterable[GNNMoEConfig]) -> GNNMoEConfig:
    """Return the model that ``config`` is to cost as much as.

    It is the first of the sweep's ``models`` with the reference's coupler whose other fields, those that do
    not belong to a coupler, are the same. Without one, it is the same model with that coupler and its
    default options.
    """

    def rest(model: GNNMoEConfig) -> dict[str, object]:
        return {name: value for name, value in model.to_dict().items() if name not in OF_A_COUPLER}

    for model in models:
        if model.coupler_type == match.reference and rest(model) == rest(config):
            return model
    return replace(config, coupler_type=match.reference, coupler_options={})


def matched(config: GNNMoEConfig, match: Match, reference: GNNMoEConfig, ratio: Ratio) -> Matched:
    """Return the width of the experts that makes a model cost as much as the reference.

    A dense model's one block is matched like an expert.

    Raises:
        Refused: the quantity is flops and a coupler does not state its own; the quantity is memory and
            cannot be predicted for a coupler; or no width of up to 64 times the model's own is enough.
    """
    if config == reference:
        return Matched(None, 0.0)
    options = {"match": "none"} if config.coupler_type == DENSE else config.coupler_options
    config = replace(config, coupler_options=options)
    if match.quantity in BY_FORMULA:
        target = model_cost(reference)
        width = matched_ffn_dim(config, target, match.quantity)
        asked = getattr(target, match.quantity)
        got = getattr(model_cost(replace(config, ffn_dim=width)), match.quantity)
        return Matched(width, got / asked - 1)
    return _nearest(
        lambda width: ratio(match.quantity, replace(config, ffn_dim=width), reference),
        config.expert_width,
        TOLERANCES[match.quantity],
    )


def _nearest(ratio: Callable[[int], float], start: int, tolerance: float) -> Matched:
    """Return the width at which a ratio that rises with it is nearest to 1, or near enough.

    The range that holds the width is cut where a straight line through its ends meets 1, because the peak
    of memory consists of pieces of straight lines, and time nearly so. After a cut that leaves more than
    half of the range, the next cut goes through the middle.
    """
    found: dict[int, float] = {}
    low, high, width, middle = 0, None, start, False
    while len(found) < MOST_TRIALS:
        found[width] = ratio(width)
        if abs(found[width] - 1) <= tolerance:
            break
        before = None if high is None else high - low
        if found[width] < 1:
            low = width
        else:
            high = width
        if high is None:
            width = 2 * low
            if width > MOST_WIDTHS * start:
                raise Refused(f"experts {low:,} wide still cost less than the reference; match params.")
        elif high - low == 1:
            break
        else:
            middle = not middle and before is not None and 2 * (high - low) > before
            width = (low + high) // 2 if middle or low == 0 else _between(low, high, found)
    best = min(found, key=lambda width: abs(found[width] - 1))
    return Matched(best, found[best] - 1)


def _between(low: int, high: int, found: dict[int, float]) -> int:
    share = (1 - found[low]) / (found[high] - found[low])
    return min(max(low + round(share * (high - low)), low + 1), high - 1)


@dataclass(frozen=True)
class TrainingCosts:
    """Compares what models cost when they are trained on this device with the flags of a run."""

    config: RunConfig
    device: torch.device
    _peaks: dict[str, int] = field(default_factory=dict)

    def ratio(self, quantity: str, ours: GNNMoEConfig, theirs: GNNMoEConfig) -> float:
        """Return ours over theirs: predicted peaks for memory, steps timed alternating for time.

        Raises:
            Refused: a coupler's memory cannot be predicted.
        """
        if quantity == "memory":
            return self._peak(ours) / self._peak(theirs)
        with cpu_threads(threads_of_a_run(self.device)):
            return step_time_ratio(*(Training(model, self.config, self.device) for model in (ours, theirs)))

    def _peak(self, model: GNNMoEConfig) -> int:
        key = repr(model)
        if key not in self._peaks:
            try:
                self._peaks[key] = Training(model, self.config, self.device).peak_bytes()
            except CannotPredict as error:
                raise Refused(f"match memory: {error}") from error
        return self._peaks[key]


def threads_of_a_run(device: torch.device) -> int:
    """Return how many threads a run has on this device: those of its slot, else those of this process."""
    (slot,) = slots_for(device.type, 1)
    return int(slot.get("OMP_NUM_THREADS", torch.get_num_threads()))


def matched_here(model: GNNMoEConfig, match: Match, reference: GNNMoEConfig, costs: TrainingCosts) -> Matched:
    """Return the match of one model; a match by time that this machine found before is found again.

    No two measurements are equal, and another width would be another run: a sweep could not go on where
    it was stopped. The cache folder keeps it for model, device, torch, threads of a run and code.

    Raises:
        Refused: as ``matched``; or the answer cannot be kept.
    """
    if match.quantity != "time":
        return matched(model, match, reference, costs.ratio)
    path = cache_folder() / f"match-{_cache_key(model, match, reference, costs)}.json"
    known = kept(path, "match by time", lambda file: Matched(**json.load(file)))
    if known is not None:
        return known
    found = matched(model, match, reference, costs.ratio)
    text = json.dumps(asdict(found)).encode()
    try:
        replace_file(path, lambda file: file.write(text))
    except OSError as error:
        raise Refused(
            f"a match by time cannot be kept in {path.parent} ({error.strerror}), so that the sweep could "
            "not go on where it is stopped; name another folder in GNNMOE_CACHE_DIR."
        ) from error
    return found


def _cache_key(model: GNNMoEConfig, match: Match, reference: GNNMoEConfig, costs: TrainingCosts) -> str:
    groups = config_dict(costs.config)
    place = [device_name(costs.device), str(torch.__version__), threads_of_a_run(costs.device)]
    training = {**groups["training"], "seed": None}
    asked = [asdict(match), model.to_dict(), reference.to_dict(), training]
    asked += [groups["memory"], groups["execution"]]
    code = [code_hashes(model), code_hashes(reference)]
    return key_of(FORMAT, *asked, *place, *code)


# --- what people see of the plan ------------------------------------------------------------------


def show_plan(plan: Plan, match: Match | None, console: Console, keep_stale: bool = False) -> None:
    """Print the plan in at most 80 columns; stale runs are to be done again, unless ``keep_stale``."""
    seeds = f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}"
    title = f"{plan.study}: {len(plan.configurations)} configurations × {seeds}"
    table = _table(title, ["parameters", "FLOPs per token", *(["off by"] if match else []), "done", "left"])
    for configuration in plan.configurations[:MOST_ROWS]:
        table.add_row(*_row(configuration, match, keep_stale))
    console.print(table)
    if len(plan.configurations) > MOST_ROWS:
        console.print(f"… and {len(plan.configurations) - MOST_ROWS:,} more")
    statuses = [status for found in plan.configurations for status in found.ended(keep_stale)]
    done = sum(status in DONE for status in statuses)
    failed = sum(status not in (None, "interrupted", *DONE) for status in statuses)
    console.print(
        f"{len(plan.runs):,} runs: {done:,} done, {failed:,} failed, {len(plan.runs) - done - failed:,} to do"
    )
    for note in stale_notes([one for found in plan.configurations for one in found.stale], keep_stale):
        console.print(note)
    needed, comparisons = plan.seeds_needed(), max(1, len(plan.configurations) - 1)
    if len(plan.configurations) > 1:
        others = f"{comparisons} other{'s' * (comparisons > 1)}"
        if len(plan.seeds) >= needed:
            text = (
                f"{seeds} can give a significant result; comparing with {others} at p ≤ 0.05 needs {needed}."
            )
        else:
            text = f"Warning: {seeds} cannot give a significant result; comparing with {others} at p ≤ 0.05 "
            text += f"needs {needed}."
        console.print(text)


def warn_of_few_seeds(plan: Plan, hypotheses: Sequence[Hypothesis], console: Console) -> None:
    """Print a warning where no hypothesis can be supported, whatever the runs give."""
    needed = seeds_needed(len(hypotheses)) if hypotheses else 0
    if len(plan.seeds) < needed:
        need = f"{len(hypotheses)} at p ≤ 0.05 need {needed}"
        console.print(f"Warning: {len(plan.seeds)} seeds cannot support a hypothesis; {need}.")


def _table(title: str, headings: Sequence[str]) -> Table:
    """Return an empty table of configurations, 80 columns wide."""
    table = Table(title=title, title_justify="left", width=80, box=None, padding=(0, 1, 0, 0))
    table.add_column("configuration", overflow="fold", ratio=1)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _row(configuration: PlannedConfiguration, match: Match | None, keep_stale: bool) -> list[str]:
    per_token = configuration.flops_per_token
    done = sum(status in DONE for status in configuration.ended(keep_stale))
    cells = [
        configuration.label,
        f"{configuration.cost.params:,}",
        "?" if per_token is None else f"{per_token / 1e6:,.2f} M",
    ]
    if match is not None and configuration.off_by is not None:
        cells.append(f"{100 * configuration.off_by:+.2f} %")
    return [*cells, str(done), str(len(configuration.runs) - done)]


def show_expected(plan: Plan, console: Console) -> None:
    """Print what one run of each configuration will take here, in at most 80 columns.

    The memory is predicted. The time is the time of the training alone: its steps × the median of three
    steps. They are run now, one configuration after another, with the threads that a run has.
    """
    title = "one run here: predicted peak memory; training time = steps × measured step"
    table = _table(title, ["peak memory", "step", "steps", "training"])
    total, shown = 0.0, plan.configurations[:MOST_ROWS]
    for number, configuration in enumerate(shown, 1):
        with console.status(f"{number} of {len(shown)}: {configuration.label} …"):
            memory, seconds = expected(configuration)
        steps = configuration.steps
        total += steps * seconds * len(configuration.runs)
        table.add_row(
            configuration.label, memory, f"{1e3 * seconds:,.0f} ms", f"{steps:,}", time_words(steps * seconds)
        )
    console.print(table)
    if any(configuration.training.config.execution.compile for configuration in shown):
        console.print(COMPILED_PEAK)
    rest = "" if len(shown) == len(plan.configurations) else f" of these {len(shown)} configurations"
    console.print(
        f"The training of all runs{rest}, one after another, takes about {time_words(total)}. "
        "Each run also takes time for its start-up, evaluations and measurements."
    )


def expected(configuration: PlannedConfiguration) -> tuple[str, float]:
    """Return the predicted peak, as shown, and the seconds of a step, measured with a run's threads."""
    training = configuration.training
    try:
        memory = format_bytes(training.peak_bytes())
    except CannotPredict:
        memory = "?"
    with cpu_threads(threads_of_a_run(training.device)):
        return memory, training.step_seconds()


def time_words(seconds: float) -> str:
    """Return a duration as people read it: 45 s, 12 min 5 s, 3 h 24 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
