"""The record of a run: what it holds, the folder that it lies in, and reading it.

A quantity that was not measured is ``NotMeasured`` with the reason: ``{"value": null, "reason": …}`` in JSON.
Units are in the names. Loss, perplexity, bits per byte and tokens per second follow from the raw sums beside
them. They are written for readers; a record whose figures contradict its sums is damaged. Imports no torch.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    computed_field,
    model_validator,
)
from typing_extensions import TypeIs

from bench.files import (
    Busy,
    cannot_write,
    kind_of,
    lock,
    read_json_text,
    remove_left_over,
    replacing,
    shown,
    utc_now,
    without_places,
    writing,
)
from gnnmoe.config import Refused, brief, shortened
from gnnmoe.discovery import is_file, path_in
from gnnmoe.reading import read_bytes

SCHEMA_VERSION = "2.0"
"""The only version that is read; committed records are migrated when it changes."""
STATUSES = ("ok", "oom", "diverged", "timeout", "crashed", "check_failed", "interrupted")
BUSY = "another process is at run"
NOT_REACHED = "the run did not get this far"
ROUNDING = 1e-9
"""Relative tolerance between a figure and its value from the raw sums."""
T = TypeVar("T")


def exp_or_infinity(nats: float) -> float:
    """Return exp(nats), such as the perplexity of a loss; infinity where no float is so large."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


MINUS = "−"
READABLE = 1e9
"""Numbers from here on, unless they are counts, are shown in scientific notation."""


def number(value: float | None, digits: int = 1, sign: str = "") -> str:
    """Return a number as people read it: 1,234.5, from 1e9 on 1.2e+09, and inf; empty for None.

    A count (of type int) has all its digits. ``sign`` "+" also shows the sign of a positive number.
    """
    if value is None:
        return ""
    large = not isinstance(value, Integral) and READABLE <= abs(value) < math.inf
    return format(value, f"{sign}.1e" if large else f"{sign},.{digits}f").replace("-", MINUS)


# --- What a record holds


class Part(BaseModel):
    """A part of a record: no unknown field, no number that is NaN or infinite, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class NotMeasured(Part):
    """The null of a quantity, with the reason."""

    value: None = None
    reason: str


def _kind(value: Any) -> str:
    keys = value.keys() if isinstance(value, dict) else ()
    return NULL if isinstance(value, NotMeasured) or set(keys) == {"value", "reason"} else READING


READING, NULL = "(reading)", "(null)"
Measured = Annotated[Annotated[T, Tag(READING)] | Annotated[NotMeasured, Tag(NULL)], Discriminator(_kind)]
"""A reading, or the reason why there is none."""


def not_measured(reason: str) -> NotMeasured:
    """Return the null of a quantity, with the reason."""
    return NotMeasured(reason=reason)


def is_measured(quantity: T | NotMeasured | None) -> TypeIs[T]:
    """Return whether ``quantity`` is a reading."""
    return quantity is not None and not isinstance(quantity, NotMeasured)


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=ROUNDING)
    return ours == theirs


class Derived(Part):
    """A part that also writes figures which follow from its raw numbers."""

    @model_validator(mode="wrap")
    @classmethod
    def _derived(cls, value: Any, handler: Callable[[Any], Self]) -> Self:
        """Refuse a figure in JSON that does not follow from the raw numbers beside it."""
        names = cls.model_computed_fields
        if not isinstance(value, dict):
            return handler(value)
        made = handler({name: item for name, item in value.items() if name not in names})
        for name in value.keys() & names.keys():
            said, own = value[name], getattr(made, name)
            own = own.model_dump() if isinstance(own, NotMeasured) else own
            if not _equal(said, own):
                raise ValueError(f"{name} is {said}, by the numbers beside it {own}")
        return made


NEEDED = (
    ("model", "coupler_type", str, "a text"),
    ("model", "num_experts", int, "a whole number"),
    ("model", "max_seq_length", int, "a whole number"),
    ("model", "coupler_option", list, "a list"),
    ("training", "batch_size", int, "a whole number"),
)
"""The flags that every reader needs: group, name, type, and the type in words."""


class RecordedConfig(Part):
    """The config of the run by groups, each flag by its name; paths by their last part."""

    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    execution: dict[str, Any]
    measure: dict[str, Any]
    memory: dict[str, Any]
    places: dict[str, Any]

    @property
    def coupler(self) -> str:
        """The coupler as its flag names it; a coupler file without its folder."""
        return self.model["coupler_type"]

    @property
    def batch_size(self) -> int:
        """Sequences of one update, as asked for."""
        return self.training["batch_size"]

    @property
    def max_seq_length(self) -> int:
        """Tokens of a sequence, as asked for."""
        return self.model["max_seq_length"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for group, name, kind, words in NEEDED:
            found = getattr(self, group).get(name)
            if type(found) is not kind:
                raise ValueError(f"{group}.{name} is {brief(found)}; it must be {words}")
        return self


class Environment(Part):
    """Where a run ran, and its code, without a path or a host name."""

    python: str
    system: str
    packages: dict[str, str | None]
    """The version of each package; None: not installed."""
    device_type: str
    device_name: str
    cuda: str | None = None
    driver: str | None = None
    cpu_cores: int | None = None
    threads: int
    omp_wait_policy: str | None = None
    git_commit: str | None = None
    git_changes_sha256: str | None = None
    """Hash of the changes to the commit; None: there were no changes, or they are not known."""
    git_remark: str | None = None
    """Why git did not tell the commit or the changes."""
    code_sha256: str | None = None
    """Hash of all code: only in records from before the two hashes below existed."""
    project_sha256: str | None = None
    """Hash of the project's code that can change numbers (``bench.training.environment``)."""
    coupler_sha256: str | None = None
    """Hash of the coupler's own code."""
    world_size: PositiveInt = 1
    """Processes that shared each batch."""
    backend: str | None = None
    """The backend of ``torch.distributed``; None: there was one process."""


class Vocabulary(Part):
    """The words with their own row in the embedding."""

    size: int
    sha256: str


class TextSplit(Part):
    """One split of a corpus."""

    tokens: int
    words: int
    lines: int
    bytes: int
    documents: int
    unknown_words: int | None = None
    sha256: str
    stream_sha256: str | None = None
    verdict: str


class TrainingBlocks(Part):
    """The blocks of the training."""

    count: int
    subset_seed: int | None
    """The seed that chose the blocks; None: all blocks were taken."""
    curriculum: dict[str, Any] | None


class Data(Part):
    """The text and its tokens."""

    name: str
    config_name: str
    source: str
    """folder, hub or embedded."""
    verdict: str
    """Whether the text is the official WikiText-2."""
    tokenizer: str
    sha256: str
    """Hash of text and tokens."""
    files: dict[str, str]
    """The sha256 of each file by its name."""
    vocabulary: Vocabulary
    splits: dict[str, TextSplit]
    python_version: str | None = None
    """The Python of the embedded text, which comes with it."""
    warning: str | None = None
    training_blocks: TrainingBlocks | None = None

    @property
    def embedded(self) -> bool:
        """Whether this is the embedded text, which every table and plot must name."""
        return self.source == "embedded"


class TimePart(Part):
    """One process that ran a part of the run."""

    command: str
    start: str
    """In UTC."""
    end: str | None
    """In UTC; None: the process was killed, or still runs."""
    seconds: dict[str, float]
    """By phase, and in total."""
    resumed_at_step: int | None
    """None: the process started at step 0."""


class Time(Part):
    """When the run ran: ``seconds`` summed over its parts, ``start`` of the first part, else of the last."""

    start: str
    end: str | None
    seconds: dict[str, float]
    resumed_at_step: int | None
    parts: list[TimePart] = Field(min_length=1)

    @classmethod
    def of(cls, parts: Sequence[TimePart]) -> Time:
        """Return the time of a run from its parts."""
        seconds: dict[str, float] = {}
        for part in parts:
            for phase, spent in part.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + spent
        last = parts[-1]
        resumed = last.resumed_at_step
        return cls(
            start=parts[0].start, end=last.end, seconds=seconds, resumed_at_step=resumed, parts=list(parts)
        )


class Parameters(Part):
    """Parameters of the model by part."""

    total: PositiveInt
    expert: int
    coupler: int
    other: int


class Flops(Part):
    """Floating-point operations."""

    training_flops_per_token: float


class Requested(Part):
    """The sizes that were asked for; ``tuned`` and ``used`` have the sizes after a search."""

    batch_size: int
    max_seq_length: int
    micro_batch_size: int | None = None
    memory_budget: str | None = None
    memory_target: float | None = None


class Search(Part):
    """The answer of a memory search: the fields of all searches; each kind of search adds its own."""

    model_config = ConfigDict(extra="allow")

    status: str
    """ok or failed."""
    micro_batch_size: int | None
    length: int
    trials: list[dict[str, Any]]
    error: str | None = None
    from_cache: bool = False
    cap: int | None = None
    """The largest size that the search may find."""
    limit_bytes: int | None = None
    target: float | None = None


class Counted(Part):
    """A number as asked for, and as counted from the tensors."""

    asked: int
    got: int


class CountedEvaluations(Counted):
    """The targets of some evaluations."""

    evaluations: int


class EpochCounts(Part):
    """Batches, samples, tokens and updates of one epoch: by the plan, and counted from the tensors."""

    epoch: int
    batch_size: PositiveInt
    asked: dict[str, int]
    got: dict[str, int]


class Accounts(Part):
    """All numbers that were counted from tensors."""

    tuned_micro_batch_size: int | None = None
    epochs: list[EpochCounts]
    training: dict[str, Counted]
    """By batches, samples, tokens and updates."""
    evaluations: dict[str, CountedEvaluations]


class ExecutionUsed(Part):
    """How the model was computed."""

    experts: str
    precision: str
    compile: str | None
    """The mode; None: not compiled."""


class Used(Part):
    """The sizes, steps and shapes of the training, counted."""

    batch_shapes: dict[str, int]
    """Batches by rows x length."""
    steps: int
    tokens: int
    total_steps: int
    epochs: float
    execution: ExecutionUsed | None = None
    precision: str
    world_size: PositiveInt = 1
    backend: str | None = None
    ledger: Accounts
    batch_sizes: list[int]
    lengths: list[int]
    micro_batch_shapes: dict[str, int]
    """Micro-batches of a rank, by rows x length."""
    micro_batch_size: int | None
    """Rows of a micro-batch of the last update."""
    accumulation: int | None
    """Micro-batches of the last update."""
    recoveries: list[dict[str, Any]]
    """Steps that ran out of memory and were repeated in smaller micro-batches."""
    control: list[dict[str, Any]]
    """Changes of the shape by the memory controller."""


class SplitQuality(Derived):
    """The final evaluation of one split: raw sums in nats, and the figures that follow."""

    nll_sum: float
    tokens: PositiveInt
    """Scored tokens."""
    words: NonNegativeInt
    bytes: NonNegativeInt
    """Bytes of the text that the scored tokens cover."""
    unknown_words: NonNegativeInt
    """Scored tokens that are ``<unk>`` in place of another word."""
    unigram_nll_sum: float | None = None
    """The sum of the training split's unigram on the same tokens."""
    kneser_ney_trigram_nll_sum: float | None = None
    """The sum of a Kneser-Ney trigram (discount 0.75) on the same tokens."""
    length: PositiveInt
    stride: PositiveInt

    @computed_field
    @property
    def loss_nats(self) -> float:
        """Σ nll / tokens, in nats per token."""
        return self.nll_sum / self.tokens

    @computed_field
    @property
    def perplexity(self) -> float | None:
        """exp of the loss, per token; None where no float is so large."""
        found = exp_or_infinity(self.loss_nats)
        return found if found < math.inf else None

    @computed_field
    @property
    def bits_per_byte(self) -> Measured[float]:
        """Σ nll / (ln 2 · bytes).

        Not measured where a word is ``<unk>``: the word was not predicted, but its bytes would count.
        """
        if self.unknown_words:
            return not_measured("unknown words were not predicted")
        if not self.bytes:
            return not_measured("the scored tokens cover no byte of the text")
        return self.nll_sum / (math.log(2) * self.bytes)


class Quality(Part):
    """The final evaluation, with the weights that are best on validation."""

    validation: Measured[SplitQuality]
    test: Measured[SplitQuality]
    best_step: int


Times = Annotated[list[PositiveFloat], Field(min_length=1)]
"""Seconds of timed steps."""


class Warmup(Part):
    """Steps before the clock started."""

    warmup_steps: int
    warmup_seconds: list[float] | None = None
    steady: bool
    remark: str | None


class Marginal(Part):
    """The model and the same model with the reference coupler, alternating; differences: ours − theirs."""

    reference: str
    step_seconds: Times
    reference_step_seconds: Times
    reference_warmup: Warmup
    steady: bool
    peak_allocated_bytes: Measured[int]
    training_flops_per_token: float
    parameters: int

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        _refuse_unlike(self, "step_seconds", "reference_step_seconds")
        return self


class Speed(Warmup, Derived):
    """Timed training steps on a copy of the model; of several ranks, the steps of the slowest."""

    step_seconds: Times
    step_tokens: Annotated[list[PositiveInt], Field(min_length=1)]
    """Real targets of each step, over all ranks."""
    rank: int = 0
    """The rank of these times."""
    fetch_seconds: Times | None = None
    """Seconds of fetching each batch: the most that a step waits."""
    matrix_flops_per_second: Measured[PositiveFloat]
    """The rate of a large matrix product on the same device."""
    compile_seconds: Measured[float]
    marginal: Measured[Marginal]

    @computed_field
    @property
    def tokens_per_second(self) -> float:
        """Tokens of all timed steps over the seconds of all timed steps."""
        return sum(self.step_tokens) / sum(self.step_seconds)

    @property
    def median_step_seconds(self) -> float:
        """The median time of a training step."""
        return statistics.median(self.step_seconds)

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        _refuse_unlike(self, "step_seconds", "step_tokens")
        return self


def _refuse_unlike(place: Part, first: str, second: str) -> None:
    ours, theirs = getattr(place, first), getattr(place, second)
    if len(ours) != len(theirs):
        raise ValueError(f"{second} is {brief(theirs)}; it must be as long as {first}, {len(ours)}")


class Memory(Part):
    """Memory of one training step; of several ranks, the rank that takes most. See the meter's name."""

    meter: str
    peak_allocated_bytes: Measured[PositiveInt]
    peak_reserved_bytes: Measured[int]
    peak_active_bytes: Measured[int]
    """Allocated blocks, and freed blocks that another stream may still use."""
    allocator_retries: Measured[int]
    """How often the device was full, and the allocator gave its cache back and tried again."""
    device_used_bytes: Measured[int]
    """Used memory of the device after the step, by the driver."""
    nvml_used_bytes: Measured[int]
    """The same by NVML, as nvidia-smi shows it."""
    peak_by_part_bytes: Measured[dict[str, int]]
    process_peak_bytes: Measured[int]
    """Resident peak of the process since its start, which includes the data and the libraries."""
    by_part: Measured[dict[str, int]]
    """Bytes at the moment of the peak: model, gradients, optimizer, activations."""
    by_phase: Measured[dict[str, Measured[int]]]
    """Bytes held before the first step, and the peaks of the first step and of a later step."""
    rank: int = 0
    remark: str | None = None

    @property
    def judged_bytes(self) -> int:
        """The bytes that decide what fits: the reserved peak, else the allocated one, else the process's.

        Raises:
            ValueError: none of them was measured.
        """
        for value in (self.peak_reserved_bytes, self.peak_allocated_bytes, self.process_peak_bytes):
            if is_measured(value):
                return value
        raise ValueError(f"the meter {self.meter} read no peak on this system.")


class Verdict(Part):
    """The verdict of one check."""

    passed: bool
    detail: str
    seconds: float
    reused_from: str | None = None
    """The run that made this check; None: this run."""


class AuditCounts(Part):
    """The extent of an audit of the evaluation."""

    mode: str
    windows: int
    all_windows: int
    batches: int
    all_batches: int
    losses: int
    tolerance_nats: float
    deterministic_kernels: bool
    seconds: float
    evaluation_seconds: float
    share_of_evaluation: float | None


class LeakCheck(Part):
    """Whether the coupler leaks: the verdict of every check, in the order of the checks."""

    passed: bool
    checks: dict[str, Verdict]
    audit: AuditCounts | None = None


FEATURE_BYTES = 280_000
"""The most bytes of all features of experts that a run keeps."""
LEAST_TOKENS = 4
"""The fewest tokens of which experts can be compared: the unbiased estimate of HSIC divides by N − 3."""
SLACK = 1e-3
"""A figure that is computed may lie so far beyond the range of its definition."""
Correlation = Annotated[float, Field(ge=-1 - SLACK, le=1 + SLACK)]
AtLeastOne = Annotated[float, Field(ge=1 - SLACK, le=1e9)]
Nats = Annotated[float, Field(ge=-1e39, le=1e39)]  # losses are float32


class ExpertsOfLayer(Part):
    """What the experts of one layer learned; an update is an expert's output minus the layer's input."""

    cosine: list[list[Correlation]]
    """The cosine of each two experts' updates of a token, centred over the tokens; the mean over tokens."""
    cka: list[list[Correlation]]
    """The debiased linear CKA of each two experts' updates."""
    effective_rank: AtLeastOne
    """The effective rank of the experts' updates of a token, from 1 to E; the mean over tokens."""
    ablation_nats: list[Nats]
    """By how much the validation loss rises when an expert's output is the mean of the other experts."""
    ablation_standard_error: list[Annotated[Nats, Field(ge=0)]]
    """Of the mean over the tokens, paired."""
    load: Measured[list[Annotated[float, Field(ge=0, le=1 + SLACK)]]]
    """The mean weight of each expert; they add up to 1."""
    mutual_information: Measured[Annotated[Nats, Field(ge=0)]]
    """Of token and expert, in nats: entropy of the mean weights minus mean entropy."""
    effective_experts: Measured[AtLeastOne]
    """exp of the entropy of the mixing, from 1 to E; the mixing is measured on about 128 tokens."""

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        experts = len(self.ablation_nats)
        loads = self.load if is_measured(self.load) else self.ablation_nats
        rows = [self.ablation_standard_error, loads, self.cosine, self.cka, *self.cosine, *self.cka]
        if experts < 2 or any(len(row) != experts for row in rows):
            raise ValueError(f"a list has another length than the {experts} experts of ablation_nats")
        return self


class Diagnostics(Derived):
    """What the experts of all layers learned, on fixed validation tokens and with the best weights."""

    tokens: PositiveInt
    layers: Annotated[list[ExpertsOfLayer], Field(min_length=1)]
    seconds: float
    """The time of all measurements, also of those during the training."""
    share_of_run: float | None = None
    """``seconds`` as a share of the run; None: the run has not ended."""

    @computed_field
    @property
    def expert_cosine(self) -> float:
        """The mean cosine of two different experts, over all layers."""
        return statistics.fmean(_between(layer.cosine) for layer in self.layers)

    @computed_field
    @property
    def expert_cka(self) -> float:
        """The mean debiased CKA of two different experts, over all layers."""
        return statistics.fmean(_between(layer.cka) for layer in self.layers)

    @computed_field
    @property
    def effective_rank(self) -> float:
        """The mean over the layers."""
        return statistics.fmean(layer.effective_rank for layer in self.layers)

    @computed_field
    @property
    def ablation_nats(self) -> float:
        """The mean rise of the loss over all experts and layers."""
        return statistics.fmean(rise for layer in self.layers for rise in layer.ablation_nats)

    @computed_field
    @property
    def mutual_information(self) -> Measured[float]:
        """The mean over the layers."""
        return _mean_measured([layer.mutual_information for layer in self.layers])

    @computed_field
    @property
    def effective_experts(self) -> Measured[float]:
        """The mean over the layers."""
        return _mean_measured([layer.effective_experts for layer in self.layers])


def _between(matrix: Sequence[Sequence[float]]) -> float:
    """Return the mean of a symmetric matrix without its diagonal."""
    return statistics.fmean(value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j)


def _mean_measured(values: Sequence[float | NotMeasured]) -> float | NotMeasured:
    missing = [value for value in values if isinstance(value, NotMeasured)]
    return missing[0] if missing else statistics.fmean(value for value in values if is_measured(value))


LayerName = Annotated[str, Field(pattern=r"^layer_\d{1,6}$")]
Communication = dict[LayerName, dict[str, dict[str, float] | list[Any]]]
"""By layer_0 and name: values by member, or a matrix."""


class Record(Part):
    """All that is kept of one run."""

    model_config = ConfigDict(validate_assignment=True)

    schema_version: Literal["2.0"] = SCHEMA_VERSION
    run_id: str
    """12 hex digits: the hash of all that can change a number."""
    configuration: str
    """The hash that all seeds of the configuration share: the run_id without the seed."""
    study: str
    run_name: str | None = None
    status: str
    """One of ``STATUSES``."""
    error: str | None = None
    """Why the status is not ok."""
    command: str
    config: RecordedConfig
    seed: int
    environment: Measured[Environment]
    data: Measured[Data]
    time: Time
    parameters: Measured[Parameters] = not_measured(NOT_REACHED)
    flops: Measured[Flops] = not_measured(NOT_REACHED)
    requested: Measured[Requested] = not_measured(NOT_REACHED)
    tuned: Measured[Search] = not_measured(NOT_REACHED)
    used: Measured[Used] = not_measured(NOT_REACHED)
    quality: Measured[Quality] = not_measured(NOT_REACHED)
    speed: Measured[Speed] = not_measured(NOT_REACHED)
    memory: Measured[Memory] = not_measured(NOT_REACHED)
    check: Measured[LeakCheck] = not_measured(NOT_REACHED)
    communication: Measured[Communication] = not_measured(NOT_REACHED)
    """What the couplers report about themselves, by layer."""
    diagnostics: Measured[Diagnostics] = not_measured("the run is older than this measurement")
    """What the experts learned."""

    @property
    def embedded(self) -> bool:
        """Whether the text is the embedded text, which every table and plot must name."""
        return is_measured(self.data) and self.data.embedded

    def split(self, name: str = "validation") -> SplitQuality | None:
        """Return the final evaluation of "validation" or "test", None where there is none."""
        found = getattr(self.quality, name) if is_measured(self.quality) else None
        return found if is_measured(found) else None


# --- The folder of a run


@dataclass(frozen=True)
class Damaged:
    """A record that cannot be read."""

    why: str
    status: Literal["damaged"] = "damaged"


WRITTEN_WHOLE = ("record.json", "history.jsonl", "*.npz", "checkpoint.pt",
                 *(f"plots/*.{kind}" for kind in ("svg", "png", "csv")))  # fmt: skip
"""The files of a run that ``replacing`` writes."""


class RunFolder:
    """``results_dir/study/run_id``: record.json, history.jsonl, the npz files and log.txt."""

    def __init__(self, results_dir: Path, study: str, run_id: str) -> None:
        self.path = results_dir / study / run_id

    @property
    def lock(self) -> Path:
        """The lock file, which a process holds while it works on the run."""
        return self.path.with_name(f".{self.path.name}.lock")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of this run in the block, and remove what killed processes left.

        Raises:
            Busy: another process works on the run.
            Refused: the study's folder cannot be written.
        """
        study = self.path.parent
        made = [folder for folder in (study, study.parent) if kind_of(folder) is None]
        try:
            study.mkdir(parents=True, exist_ok=True)
            held = lock(self.lock)
        except OSError as error:
            raise Refused(cannot_write(self.path, error)) from error
        if held is None:
            raise Busy(f"{BUSY} {self.path.name}; wait for it.")
        for name in WRITTEN_WHOLE:
            remove_left_over(self.path / name)  # of processes that were killed
        try:
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            held.release()
            with suppress(OSError):  # a refused run leaves no empty folders
                for folder in made:
                    folder.rmdir()

    def create(self, record: Record, log: str = "") -> None:
        """Make the folder with this first record; where it exists, its history and its log stay.

        ``log`` is the log of the run's earlier parts, which is added where the folder's log lacks it.

        Raises:
            Refused: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path in (self.path / "history.jsonl", self.path / "log.txt"):
                if kind_of(path) is None:
                    path.touch()
            there = self.read_log()
            if there and not there.endswith("\n"):  # an earlier part was killed as it wrote the last line
                self._append("log.txt", "\n")
            if not there.startswith(log):
                self._append("log.txt", log)
            self.write_record(record)
        except OSError as error:
            raise Refused(cannot_write(self.path, error)) from error

    def read_record(self) -> Record | Damaged | None:
        """Return the record, or why it cannot be read; None where there is no folder."""
        try:
            return None if kind_of(self.path) is None else read_record(self.path)
        except Refused as error:
            return Damaged(str(error))

    def set_aside(self) -> Path:
        """Rename the folder to the first free ``run_id.1``, ``run_id.2``, … and return its new path."""
        number = 1
        while kind_of(target := self.path.with_name(f"{self.path.name}.{number}")) is not None:
            number += 1
        return self.path.rename(target)

    def write_record(self, record: Record) -> None:
        """Write record.json, with texts ``without_places``.

        Raises:
            ValueError: a number is NaN or infinite, which JSON does not have.
        """
        text = json.dumps(without_places(record.model_dump()), indent=2, allow_nan=False) + "\n"
        self._write("record.json", lambda file: file.write(text.encode()))

    def write_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write ``name`` (an npz file) with the arrays."""
        self._write(name, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore[reportArgumentType]

    def read_history(self) -> str:
        """Return the text of history.jsonl."""
        return read_bytes(self.path / "history.jsonl").decode(errors="replace")

    def write_history(self, text: str) -> None:
        """Replace history.jsonl by ``text``."""
        self._write("history.jsonl", lambda file: file.write(text.encode()))

    def append_history(self, row: dict[str, Any]) -> None:
        """Add one line to history.jsonl; NaN and infinity become null, because JSON has neither."""
        plain = {name: None if _is_no_json(value) else value for name, value in row.items()}
        self._append("history.jsonl", json.dumps(plain, allow_nan=False) + "\n")

    def read_log(self) -> str:
        """Return the text of log.txt, empty where there is no such file."""
        path = self.path / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace") if kind_of(path) == "file" else ""

    def log(self, line: str) -> None:
        """Add one line, with the time in UTC and without places, to log.txt."""
        self._append("log.txt", f"{utc_now()} {without_places(line)}\n")

    def _append(self, name: str, text: str) -> None:
        path = self.path / name
        with writing(path):
            if kind_of(path) == "other":
                raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

    def _write(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        with replacing(self.path / name) as file:
            write(file)


def _is_no_json(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class ReadOnlyFolder(RunFolder):
    """The folder of a run on all ranks but the first: nothing is written, and nothing locked."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Do nothing: the first rank has the lock."""
        yield

    def create(self, record: Record, log: str = "") -> None:
        """Do nothing."""

    def read_history(self) -> str:
        """Return nothing: the first rank has the history."""
        return ""

    def read_log(self) -> str:
        """Return nothing: the first rank has the log."""
        return ""

    def _append(self, name: str, text: str) -> None:
        """Do nothing."""

    def _write(self, name: str, write: Callable[[IO[bytes]], Any]) -> None:
        """Do nothing."""


# --- Reading a record


def read_record(folder: Path) -> Record:
    """Read the record of a run folder, with texts as ``shown`` returns them.

    Raises:
        Refused: there is no record.json, or it cannot be read, is cut short, has another schema or is no
            record; the message names the file and the key.
    """
    path = folder / "record.json"
    if kind_of(path) != "file":
        raise Refused(f"{folder} is no run folder: it holds no record.json.")
    text, stored = read_json_text(path)
    try:
        return record_of(stored, shown_as_it_is=not NOT_PLAIN.search(text))
    except Refused as error:
        raise Refused(f"{path} is damaged: {error}.") from error


NOT_PLAIN = re.compile(r'\\[^"\\/]|[^\n -~]')
"""Found in JSON where one of its texts may not be shown as it is; lines of JSON end in a newline."""


def record_of(value: Any, shown_as_it_is: bool = False) -> Record:
    """Return the record of a value of JSON, with texts as ``shown`` returns them.

    ``shown_as_it_is``: the texts are known to be plain, which saves most of the time.

    Raises:
        Refused: the message names the first key that is missing or wrong, its value and what it must be.
    """
    return part_of(Record, value if shown_as_it_is else shown(value))


MUST = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "greater_than": "a number above 0",
    "greater_than_equal": "a whole number, 0 or more",
    "less_than": "a smaller number",
    "bool_type": "true or false",
    "string_pattern_mismatch": "the name of a layer, layer_0",
    "too_short": "a list that is not empty",
}
"""What a value must be, by pydantic's name of the error."""


PartType = TypeVar("PartType", bound=Part)


def part_of(kind: type[PartType], value: Any) -> PartType:
    """Return a value of JSON as the part ``kind``.

    Raises:
        Refused: the message names the first key that is missing or wrong, its value and what it must be.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise Refused(_first_error(error)) from error


def _first_error(error: ValidationError) -> str:
    """Return the first error in words: the key, its value and what it must be."""
    first = error.errors(include_url=False)[0]
    keys = [str(key) for key in first["loc"] if key not in (READING, NULL, "[key]")]
    place = shortened(".".join(keys))
    if first["type"] == "missing":
        return f"it lacks {place}"
    if first["type"] == "extra_forbidden":
        return f"{place} is no known field"
    if first["type"] == "value_error":  # a validator above raised it and named the field
        return ".".join(filter(None, (place, str(first["ctx"]["error"]))))  # pyright: ignore
    must = MUST.get(first["type"]) or first.get("ctx", {}).get("expected", first["msg"])
    return f"{place or 'it'} is {brief(first['input'])}; it must be {must}"


def study_records(study: Path) -> list[Record]:
    """Return the records of a study's runs, except runs that were set aside or cannot be read."""
    found = []
    for path in sorted(study.glob("*/record.json")):
        if "." not in path.parent.name:
            with suppress(Refused):
                found.append(read_record(path.parent))
    return found


# --- Which code made a record

OF_CLASSES = ("coupler_type", "hgnn_conv_type")
"""The flags of a model that can name a class in a file."""
CODE_WORDS = {"coupler_sha256": "the coupler's own code", "project_sha256": "the project's code"}
"""The two hashes of the code that made a record (``bench.training.environment``), and what each covers."""


def stale_code(
    made_by: Mapping[str, Any] | Environment | NotMeasured | None, today: Mapping[str, str]
) -> list[str] | None:
    """Return in words which code differs from today's code; None where the hashes are not known.

    Args:
        made_by: The environment of a record, or the hashes of a checkpoint.
        today: The answer of ``code_hashes``.
    """
    hashes = made_by if isinstance(made_by, Mapping) else dict(made_by or ())
    if not all(isinstance(hashes.get(name), str) for name in CODE_WORDS):
        return None
    return [words for name, words in CODE_WORDS.items() if hashes[name] != today[name]]


def is_stale(record: Record | Damaged | None, today: Mapping[str, str]) -> bool | None:
    """Return whether other code made a record; None where the record of a finished run does not say.

    False for a run without a record, with a damaged record, or without hashes of today's code.
    """
    if not today or not isinstance(record, Record):
        return False
    differing = stale_code(record.environment, today)
    return None if differing is None and record.status != "interrupted" else bool(differing)


def stale_words(differing: Iterable[str]) -> str:
    """Return the answer of ``stale_code`` as a clause: "the coupler's own code has changed since"."""
    names = list(differing)
    return f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'} changed since"


def stale_notes(stale: Sequence[bool | None], kept: bool) -> list[str]:
    """Return the notes of a sweep about its runs; ``stale`` has the answer of ``is_stale`` for each run."""
    count, unknown = stale.count(True), stale.count(None)
    what = "kept by --keep-stale" if kept else "to run again; the old record stays as RUN_ID.1"
    notes = [f"{_runs(count)} stale: the code has changed since ({what})"] if count else []
    if unknown:
        notes.append(f"{_runs(unknown)} kept; the record does not say which code made it")
    return notes


def _runs(count: int) -> str:
    return "1 run is" if count == 1 else f"{count:,} runs are"


def files_of(model: Mapping[str, Any]) -> list[str]:
    """Return the coupler and the hypergraph layer of a model's flags, where they are classes from files."""
    return [model[name] for name in OF_CLASSES if is_file(str(model.get(name, "")))]


def classes_of(record: Record) -> tuple[list[str], str | None]:
    """Return the classes from files of a run, as its record names them, and its ``coupler_sha256``."""
    environment = record.environment
    return files_of(record.config.model), environment.coupler_sha256 if is_measured(environment) else None


def refuse_another_file(
    classes: Iterable[str], sha256: str, others: Iterable[tuple[Iterable[str], str | None]]
) -> None:
    """Refuse a class from a file where the study has a class of the same name from another file.

    Both would have one run_id, and each would replace the other. A record names a file without its folder, so
    a file of the same name counts as the same file, which has changed.

    Args:
        classes: The classes from files of the run: ``files_of``.
        sha256: Its ``coupler_sha256``.
        others: The classes and, where known, the ``coupler_sha256`` of each run of the study.

    Raises:
        Refused: naming the other file.
    """
    known = [(other, its_hash) for theirs, its_hash in others for other in theirs if its_hash != sha256]
    for ours, (theirs, _) in itertools.product(classes, known):
        (path, _, name), (there, _, its_name) = ours.rpartition(":"), theirs.rpartition(":")
        if name == its_name and (Path(path).name != Path(there).name or _is_elsewhere(path_in(ours), theirs)):
            raise Refused(
                f"the study has runs of a class {name} from {there} already, and {path} is another file; "
                "give the class another name, or choose another --study."
            )


def _is_elsewhere(here: Path, theirs: str) -> bool:
    """Return whether the file of another run lies in another place; a file that is not there does not."""
    try:
        other = path_in(theirs)
    except Refused:  # of a home folder that is not known, in the record of another machine
        return False
    return other.parent != Path() and kind_of(other) == "file" and not here.samefile(other)
