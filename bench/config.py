"""Every flag of the harness, by group: type, range, default and help; presets, and tables of flags.

A group is a pydantic dataclass whose fields are flags; a field's docstring is its help. The command line,
TOML files, presets and sweeps make tables of flags by field. ``layered`` merges tables, and ``build`` makes
the config. Flags are flat, so field names are unique over all groups. The flags of ``PlacesConfig`` cannot
change a number; all other flags belong to a run's identity. Imports no torch, so that ``--help`` is quick.
"""

from __future__ import annotations

import importlib.util
import math
import re
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic.dataclasses
import tyro
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo

from bench.files import read_toml
from gnnmoe.config import LARGEST, GNNMoEConfig, Refused, brief, listed, nearest_name, unknown_name
from gnnmoe.reading import from_home

DEFAULT_MAX_STEPS = 120
PRESETS = Path(__file__).parent / "presets"
LENGTHS = {"epochs", "max_steps"}  # a layer that gives one of them decides alone on the training's length
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

FlagTable = dict[str, Any]
"""Values of flags, by field."""
Group = TypeVar("Group")


# Types of flags: a text is never a number, true is not 1, and infinity and NaN are refused.
MOST = 10**9  # of what is counted: more than any run needs, and far below the 64 bits of torch
Count = Annotated[int, Field(ge=1, le=MOST)]
Length = Annotated[int, Field(ge=1, le=LARGEST["max_seq_length"])]
Seed = Annotated[int, Field(ge=-(10**18), le=10**18)]
Workers = Annotated[int, Field(ge=0, le=256)] | Literal["auto"]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _from_home(path: Path, about: ValidationInfo) -> Path:
    return from_home(path, str(about.field_name))


Place = Annotated[Path, Field(strict=False), AfterValidator(_from_home)]  # also from text
Texts = Annotated[tuple[str, ...], Field(strict=False)]  # also from a list
Several = Annotated[Texts, tyro.conf.UseAppendAction]
"""A flag that may be given several times; the values of all layers add up."""


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def flags(cls: type[Group]) -> type[Group]:
    """Make a pydantic dataclass of a group of flags, which raises ``Refused`` for a wrong value."""
    bases = [base for base in cls.__mro__[1:] if is_dataclass(base)]
    frozen = all(base.__dataclass_params__.frozen for base in bases)  # pyright: ignore[reportAttributeAccessIssue]
    made = pydantic.dataclasses.dataclass(cls, kw_only=True, frozen=frozen, config=STRICT)
    construct = made.__init__

    @wraps(construct)
    def refusing(self: Any, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, str | Path) and "\0" in str(value):
                raise Refused(f"{name} is {brief(str(value))}; it must not hold a zero byte.")
        try:
            construct(self, **values)
        except ValidationError as error:
            raise _refusal(made, values, error) from None

    made.__init__ = refusing
    return made  # pyright: ignore[reportReturnType]


def _refusal(group: type, values: FlagTable, error: ValidationError) -> Refused:
    """Return the refusal of the first wrong value of a group."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "value_error":
        return first["ctx"]["error"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
    if name not in values:
        return Refused(f"{name} is missing; --help says what it is.")
    hint = get_type_hints(group, include_extras=True).get(name)
    return Refused(unknown_name("flag", name, values)) if hint is None else refused(name, values[name], hint)


def seconds_of(name: str, text: str | None) -> float | None:
    """Return the seconds of a duration such as 90s, 9m or 1.5h; ``name`` is the flag that gives it.

    Raises:
        Refused: it is not a number with s, m or h, or not greater than 0.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,9}(?:[.][0-9]{1,9})?)([smh]?)", text.strip())
    seconds = float(found[1]) * {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]] if found else 0.0
    if seconds <= 0:
        raise Refused(f"{name} is {brief(text)}; write a duration such as 90s, 9m or 1.5h.")
    return seconds


def refused(name: str, value: Any, hint: Any) -> Refused:
    """Return the refusal of a flag's value: the value, what is allowed, and the nearest choice."""
    shown = "a table" if isinstance(value, dict) else brief(value)
    choices = [choice for kind in _kinds(hint) if get_origin(kind) is Literal for choice in get_args(kind)]
    return Refused(f"{name} is {shown}; it must be {allowed(hint)}.{nearest_name(value, choices)}")


def allowed(hint: Any) -> str:
    """Return in words what a type allows: ``a whole number of at least 1 or "None"``."""
    return _allowed_by(TypeAdapter(hint, config=STRICT).json_schema())


def _allowed_by(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_allowed_by, schema["anyOf"]))
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return f"one of {listed([repr(choice) for choice in schema['enum']])}"
    kind = schema.get("type")
    if kind == "array":
        return "a list of " + " and ".join(map(_allowed_by, schema.get("prefixItems") or [schema["items"]]))
    if kind in ("integer", "number"):
        if kind == "integer":
            return f"a whole number{_range(schema)}"
        bounded = "maximum" in schema or "exclusiveMaximum" in schema
        return f"a number{_interval(schema)}" if bounded else f"a finite number{_range(schema)}"
    return {"boolean": "true or false", "null": '"None"', "object": "a table"}.get(str(kind), "text")


def _range(schema: Mapping[str, Any]) -> str:
    least, most, above = (schema.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
    if most is not None:
        return f" from {least:,} to {most:,}".replace("-", "−")
    if above is not None:
        return f" greater than {above}"
    return "" if least is None else f" of at least {least}"


def _interval(schema: Mapping[str, Any]) -> str:
    start = f"[{schema['minimum']:,g}" if "minimum" in schema else f"({schema['exclusiveMinimum']:,g}"
    end = f"{schema['maximum']:,g}]" if "maximum" in schema else f"{schema['exclusiveMaximum']:,g})"
    return f" in {start}, {end}"


@flags
class ModelConfig(GNNMoEConfig):
    """The coupler and the size of the model."""

    coupler_type: Annotated[str, tyro.conf.arg(name="coupler", aliases=("--coupler-type",))] = "HGNN"
    """Coupler: a name (--list shows all names), package.module:Class or file.py:Class."""
    coupler_options: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    coupler_option: Annotated[Several, tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Option of the coupler, such as backend=loop. Other couplers ignore HGNN.backend=loop. May be given
    several times."""
    vocab_size: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Rows of the embedding; at least the number of words in the data (default: that number)."""

    def __post_init__(self) -> None:
        for option in self.coupler_option:
            if "=" not in option:
                raise Refused(f"coupler option {brief(option)} has no value; write NAME=VALUE.")
        self.resolved(1)  # to refuse wrong sizes

    def resolved(self, vocab_size: int) -> GNNMoEConfig:
        """Return the model's config for data of this many words; a given ``vocab_size`` wins."""
        values = {f.name: getattr(self, f.name) for f in fields(GNNMoEConfig)}
        options = dict(option.split("=", 1) for option in self.coupler_option)
        values["coupler_options"] = {**self.coupler_options, **options}
        if self.vocab_size is None:
            values["vocab_size"] = vocab_size
        return GNNMoEConfig(**values)


@flags
class DataConfig:
    """The text, and how much of it is used."""

    dataset_name: Annotated[str | None, tyro.conf.arg(aliases=("--dataset",))] = None
    """Text data set on the hub; wikitext is WikiText-2. If you name a data set, it must be available. If you
    name none, and neither a folder nor the hub is available, the run uses a small embedded text."""
    dataset_config_name: str | None = None
    """Configuration of the data set (default: wikitext-2-v1 for wikitext)."""
    text_column: str = "text"
    """Column of the data set that contains the text."""
    tokenizer: str = "word"
    """word, or bpe:SIZE for byte-level BPE with SIZE tokens, trained on the training split."""
    num_train_samples: Count | None = None
    """Number of training blocks of max_seq_length tokens (default: all)."""
    num_eval_samples: Count | None = 512
    """Number of evaluation blocks of max_seq_length tokens, from the beginning of the text. None: all."""
    evaluate_test: bool = False
    """Evaluate on the test split too, once, at the end."""


SCHEDULE_FORM = 'write "epoch:size" pairs in rising order from epoch 0, such as "0:16,2:32"'


@dataclass(frozen=True)
class BatchSchedule:
    """The batch size of every epoch: ``sizes`` holds pairs of a first epoch and its samples per batch.

    Raises:
        Refused: the first pair is not at epoch 0, the epochs do not rise, or a size is below 1.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.sizes]
        if epochs[:1] != [0] or epochs != sorted(set(epochs)):
            raise Refused(f"batch_schedule is {brief(str(self))}; {SCHEDULE_FORM}.")
        small = [size for _, size in self.sizes if size < 1]
        if small:
            raise Refused(f"batch_schedule is {brief(str(self))}; a size must be 1 or more.")

    @classmethod
    def parse(cls, text: str) -> BatchSchedule:
        """Return the schedule of a text such as ``"0:16,2:32"``: 16 from epoch 0 on, 32 from epoch 2 on."""
        pairs = []
        for part in text.split(","):
            if not re.fullmatch(r"\s*[0-9]{1,9}\s*:\s*[0-9]{1,9}\s*", part):
                raise Refused(f"batch_schedule has {brief(part)}, which is no epoch:size; {SCHEDULE_FORM}.")
            epoch, size = part.split(":")
            pairs.append((int(epoch), int(size)))
        return cls(tuple(pairs))

    def __str__(self) -> str:
        return ",".join(f"{epoch}:{size}" for epoch, size in self.sizes)

    def simplified(self, epochs: int | None = None) -> BatchSchedule:
        """Return the schedule without pairs that change no size in the first ``epochs`` (None: all)."""
        reached = [pair for pair in self.sizes if epochs is None or pair[0] < max(1, epochs)]
        sizes = [None, *(size for _, size in reached)]
        return BatchSchedule(
            tuple(pair for pair, before in zip(reached, sizes, strict=False) if pair[1] != before)
        )


def in_steps(value: float, total_steps: int) -> int:
    """Return a whole number as it is, and a share as steps of the training, rounded up."""
    return value if isinstance(value, int) else math.ceil(value * total_steps - 1e-9)


@flags
class TrainingConfig:
    """Optimizer, schedule and length of the training."""

    batch_size: Count = 16
    """Sequences per update, over all micro-batches and ranks."""
    max_steps: Count | None = None
    """Number of updates (default: 120, unless epochs is given). It replaces the epochs of a preset or of a
    --config file."""
    epochs: Count | None = None
    """Passes over the training data. With max_steps, the training ends at the first of the two limits. It
    replaces the max_steps of a preset or of a --config file."""
    max_batches_per_epoch: Count | None = None
    """End each epoch after this many batches."""
    min_steps_per_epoch: Count = 10
    """Refuse data with fewer batches per epoch. max_batches_per_epoch may be smaller."""
    batch_schedule: str | None = None
    """Batch size per epoch. 0:16,2:32 means 16 from epoch 0 and 32 from epoch 2."""
    curriculum: str | None = None
    """Train on easy blocks first. rarity: blocks with rare words are hard. model:CHECKPOINT: blocks with a
    high loss of a finished run are hard."""
    curriculum_pacing: Literal["linear", "competence_sqrt"] = "competence_sqrt"
    """How the share of the blocks grows over the epochs. The last epoch has all blocks."""
    curriculum_start: Share = 0.2
    """Share of the blocks in the first epoch of a curriculum."""
    strict_curriculum: bool = False
    """Refuse a curriculum whose model is missing. Without this flag, the order is then random."""
    learning_rate: Positive = 8e-3
    """Peak learning rate of AdamW."""
    adam_betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's weight decay, on matrices only."""
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] | Share = 0.125
    """Steps of linear warm-up, or a share of all steps, such as 0.1. A cosine to min_lr_ratio follows
    (default: 0.125)."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Last learning rate, as a share of the peak."""
    max_grad_norm: Positive = 1.0
    """Clip the norm of the gradient to this value."""
    eval_every: Count | Share = 1 / 3
    """Steps between evaluations on validation, or a share of all steps, such as 0.1. The run keeps the best
    weights (default: a third)."""
    seed: Seed = 0
    """Seed of all random numbers."""

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes of the training, over all ranks: one size, or the sizes of the schedule."""
        if self.batch_schedule is None:
            return [self.batch_size]
        schedule = BatchSchedule.parse(self.batch_schedule).simplified(self.epochs)
        return [size for _, size in schedule.sizes]

    def settled(self, total_steps: int) -> TrainingConfig:
        """Return the config with steps in place of shares of the training, which has ``total_steps``."""
        warmup_steps = in_steps(self.warmup_steps, total_steps)
        return replace(self, warmup_steps=warmup_steps, eval_every=in_steps(self.eval_every, total_steps))


@flags
class ExecutionConfig:
    """How the model is computed. Results are equal up to rounding."""

    experts: Literal["auto", "loop", "batched"] = "auto"
    """loop: one expert after the other. batched: all experts in a few large products. auto: batched on CUDA,
    else loop."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: autocast, with parameters and optimizer in float32. tf32: matrix products of rounded float32, on
    NVIDIA GPUs."""
    compile: bool = False
    """Compile the forward and backward of a training step with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    """reduce-overhead: replay the compiled step as CUDA graphs."""

    def __post_init__(self) -> None:
        if self.compile_mode != "default" and not self.compile:
            raise Refused(
                f"compile_mode {self.compile_mode} does nothing without --compile: add that, or drop it."
            )

    def experts_on(self, device_type: str) -> str:
        """Return the form of the experts on this device.

        ``auto`` depends on the type of the device alone. The form is part of a run's identity, so a choice by
        measurement could give the runs of one sweep different ids.
        """
        if self.experts == "auto":
            return "batched" if device_type == "cuda" else "loop"
        return self.experts

    def identity(self, device_type: str) -> dict[str, Any]:
        """Return the flags that can change a number: none for a plain loop in float32."""
        mode = self.compile_mode if self.compile else None
        form = {"experts": self.experts_on(device_type), "precision": self.precision, "compile": mode}
        plain = {"experts": "loop", "precision": "fp32", "compile": None}
        return {name: value for name, value in form.items() if value != plain[name]}


@flags
class MeasureConfig:
    """Speed, memory and the leak check."""

    speed: bool = True
    """Measure speed and memory after the training."""
    speed_warmup_steps: Count | Literal["auto"] = "auto"
    """Steps before the clock starts. auto: until the median of ten steps changes by less than 2%, at most 50
    steps."""
    speed_steps: Count = 10
    """Number of timed steps."""
    marginal: bool = False
    """Also measure the cost of the coupler: time the model and the same model with the mean coupler,
    alternating."""
    profile: bool = False
    """Also write the trace of a profiler into the folder of the run; on CUDA also a snapshot of the
    memory."""
    audit: Literal["sample", "full"] = "sample"
    """sample: evaluate one batch in ten again at the end, with the later tokens replaced; no loss may change.
    full: evaluate every batch again."""
    diagnostics: bool = True
    """Measure what the experts learned: how alike they are, and whether the loss rises without one."""
    allow_failed_check: bool = False
    """Train a coupler that fails the leak check. The record has the status check_failed."""

    def __post_init__(self) -> None:
        if not self.speed and (self.marginal or self.profile):
            raise Refused(
                "--no-speed leaves out what --marginal and --profile measure; drop one of the flags."
            )


@flags
class MemoryConfig:
    """Micro-batches: how many sequences of a batch run at once."""

    micro_batch_size: Count | None = None
    """Sequences that run at once; it must divide batch_size (default: the whole batch)."""
    tune_batch_size: bool = False
    """Before training, find the largest micro-batch that fits into memory_target of memory_budget."""
    memory_budget: str | None = None
    """Memory that a search may fill: 16GiB, a share such as 0.5, or device (default: device)."""
    memory_target: Share = 0.85
    """Share of the budget that the peak of a trial may reach. There is no other safety factor."""
    tune_mode: Literal["binsearch", "power"] = "binsearch"
    """power: double the size until a trial fails. binsearch: then search for the exact largest size."""
    tune_init: Count | None = None
    """Size of the first trial (default: batch_size)."""
    tune_max_trials: Count = 12
    """Largest number of trials, including trials that fail."""
    tune_max_seconds: Annotated[float, Field(gt=0, le=10**6)] = 110.0
    """Start no trial that is expected to end later than this many seconds after the start of the search."""
    tune_max_batch_size: Count | None = None
    """Largest micro-batch of a search and of --control-memory."""
    tune_fallback: bool = False
    """If the search fails, train with the size that the flags give. The record says failed."""
    fit_shape: bool = False
    """Before training, find the longest sequence length, then the largest micro-batch, that fit into
    memory_target of memory_budget. The whole run uses that length."""
    control_memory: bool = False
    """During training, measure the peak memory of each step. Change the micro-batch, and between epochs the
    length, to stay within memory_target of memory_budget."""
    shape_min_length: Length | None = None
    """Shortest length of --fit-shape and --control-memory (default: a quarter of max_seq_length)."""
    shape_max_length: Length | None = None
    """Longest length of --fit-shape (default: max_seq_length)."""
    shape_length_step: Count = 16
    """Difference between two lengths that are tried, in tokens."""

    def __post_init__(self) -> None:
        if self.tune_batch_size and self.micro_batch_size is not None:
            raise Refused("tune_batch_size finds the micro-batch: drop micro_batch_size, or the search.")


def _folder_name(study: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", study):
        raise Refused(
            f"study is {brief(study)}; it must be a plain folder name of at most 100 letters, digits, '_', "
            "'-' and '.', that begins with a letter or a digit."
        )
    return study


@flags
class PlacesConfig:
    """Folders, names and output. These flags change no number."""

    data_dir: Place | None = None
    """Folder of the text: wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or parquet files
    (default: the environment variable GNNMOE_DATA_DIR)."""
    data_source: Literal["auto", "folder", "hub", "embedded"] = "auto"
    """auto: the folder, else the local cache, else the hub, else the embedded text."""
    results_dir: Place = Path("results")
    """Folder of all results. A run writes into results_dir/study/run_id."""
    study: Annotated[str, AfterValidator(_folder_name)] = "default"
    """Name of the study: the runs that bench.report compares."""
    run_name: str | None = None
    """Name of the run, shown in place of the run_id."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA if it is available, else the CPU."""
    force: bool = False
    """Run a finished run again. Its earlier record is kept as run_id.1."""
    keep_stale: bool = False
    """Keep or continue a run of an earlier version of the code. Without this flag, it runs again."""
    resume: bool = False
    """Continue an interrupted run."""
    resume_checkpoint: Place | None = None
    """Continue from this checkpoint file, which must be of a run with the same config."""
    checkpoint_dir: Place | None = None
    """Folder of the checkpoint (default: the folder of the run)."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints (default: eval_every)."""
    num_workers_dataloader: Workers = 0
    """Processes that load data during training. auto: half the cores, at most 4."""
    rank_timeout: Annotated[float, Field(gt=0, le=10**7)] = 600.0
    """With torchrun: seconds that a rank waits for the other ranks. Then the run ends as crashed."""
    plots: bool = True
    """Draw the plots of the run at its end."""
    track: Literal["tensorboard", "wandb"] | None = None
    """Show the run in TensorBoard or in Weights & Biases while it trains. Without a wandb account, set
    WANDB_MODE=offline. pip install 'gnnmoe[track]' installs both."""
    reuse_check: bool = False
    """Reuse the passing leak check of another seed of this configuration, made by the same code on the same
    device. The trained model is always checked. bench.sweep uses this flag."""
    quiet: bool = False
    """Print only the results."""

    def __post_init__(self) -> None:
        if self.track is not None and importlib.util.find_spec(self.track) is None:
            raise Refused(
                f"track is {self.track}, which is not installed; pip install 'gnnmoe[track]' installs it."
            )


@flags
class RunConfig:
    """Train one model, measure it and write its record.

    Exit status: 0 ok, 2 wrong input, 74 a file cannot be written, 130 interrupted, else 1.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    places: PlacesConfig = field(default_factory=PlacesConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)


@flags
class TuneConfig(RunConfig):
    """Find the largest batch size that fits into the memory, and the smallest one that is nearly as fast.
    Each trial runs full training steps. No model is kept, and the next search reuses the answer. Exit status:
    0 found, 1 nothing fits, 2 wrong input."""

    measure: tyro.conf.Suppress[MeasureConfig] = field(default_factory=MeasureConfig)


@dataclass(frozen=True)
class Flag:
    """One flag: its field, its type with the range, and its names; messages show the first name."""

    field: str
    hint: Any
    names: tuple[str, ...]

    @cached_property
    def kinds(self) -> tuple[Any, ...]:
        """The types that the flag may have, without ranges; None is a type too."""
        return _kinds(self.hint)

    @cached_property
    def is_list(self) -> bool:
        """Whether the flag has several values."""
        return get_origin(self.kinds[0]) is tuple

    @cached_property
    def adds_up(self) -> bool:
        """Whether the flag may be given several times; the values of several layers add up."""
        return tyro.conf.UseAppendAction in getattr(self.hint, "__metadata__", ())

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.hint, config=STRICT)

    def option(self) -> str:
        """Return the flag as the command line shows it."""
        return self.names[0] if tyro.conf.Positional in _marks(self.hint) else f"--{self.names[0]}"

    def read(self, words: str | bool | Sequence[str]) -> Any:
        """Return the value of the words of a command line; words without a value stay text, to be refused."""
        if isinstance(words, bool):
            return words
        if isinstance(words, str):
            return _value(words, self.kinds)
        kinds = _kinds(get_args(self.kinds[0])[0])
        return [_value(word, kinds) for word in words]

    def plain(self, value: Any, name: str | None = None) -> Any:
        """Return a value from TOML in its plain form: ``"None"`` as None, 1 as 1.0, a path as text.

        Raises:
            Refused: the flag has no such value; the message calls the flag ``name``.
        """
        try:
            return plain(self._adapter.validate_python(self.unset(value)))
        except ValidationError:
            raise refused(name or self.field, value, self.hint) from None

    def unset(self, value: Any) -> Any:
        """Return ``"None"`` as None where the flag may be None, since TOML has no such value."""
        return None if value == "None" and types.NoneType in self.kinds else value


def plain(value: Any) -> Any:
    """Return a value as JSON and TOML store it: a tuple as a list, a path as text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _kinds(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for member in get_args(hint) for kind in _kinds(member))
    return (hint,)


def _marks(hint: Any) -> tuple[Any, ...]:
    return tuple(getattr(hint, "__metadata__", ()))


def _value(word: str, kinds: Sequence[Any]) -> Any:
    for kind in kinds:
        if kind is types.NoneType and word == "None":
            return None
        if kind is bool and word.lower() in ("true", "false"):
            return word.lower() == "true"
        if kind in (int, float):
            with suppress(ValueError):
                return kind(word)
    return word


def flags_of(config_type: type) -> dict[str, Flag]:
    """Return every flag of a config and of its groups, by each of the flag's names with underscores."""
    found: dict[str, Flag] = {}
    for name, hint in get_type_hints(config_type, include_extras=True).items():
        marks = _marks(hint)
        if tyro.conf.Suppress in marks:
            continue
        if is_dataclass(hint):
            found |= flags_of(hint)  # pyright: ignore[reportArgumentType]
            continue
        shown = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        names = dict.fromkeys(each.removeprefix("--").replace("_", "-") for each in (shown, name, *aliases))
        flag = Flag(name, hint, tuple(names))
        found |= {each.replace("-", "_"): flag for each in names}
    return found


def preset_names() -> list[str]:
    """Return the names of the presets: the TOML files in bench/presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


PRESET = Flag("preset", Literal[tuple(preset_names())], ("preset",))  # pyright: ignore[reportInvalidTypeForm]


@cache
def run_flags() -> dict[str, Flag]:
    """Return every flag of a run, by each of the flag's names with underscores."""
    return flags_of(RunConfig)


@cache
def defaults() -> FlagTable:
    """Return the default of every flag of a run, by field, plain."""
    config = RunConfig()
    values = {
        name: value for group in fields(config) for name, value in vars(getattr(config, group.name)).items()
    }
    return {name: plain(value) for name, value in values.items() if name in run_flags()}


def by_field(entries: FlagTable, known: Mapping[str, Flag]) -> tuple[FlagTable, dict[str, str]]:
    """Return the values of a TOML table by field, not yet checked, and the key of each field.

    Raises:
        Refused: a key is no flag, or a flag stands there under two names.
    """
    table: FlagTable = {}
    names: dict[str, str] = {}
    for key, value in entries.items():
        flag = flag_named(key, known)
        other = names.setdefault(flag.field, key)
        if other != key:
            raise Refused(f"{key} and {other} are the same flag; keep one of them.")
        table[flag.field] = flag.unset(value)
    return table, names


def flag_named(key: str, known: Mapping[str, Flag]) -> Flag:
    """Return the flag of a key of a TOML table, with hyphens or underscores.

    Raises:
        Refused: there is no such flag.
    """
    flag = known.get(key.replace("-", "_"))
    if flag is None:
        near = nearest_name(key, known)
        raise Refused(f"unknown key {brief(key)}; python -m bench.run --help-all lists all flags.{near}")
    return flag


def as_flags(table: FlagTable) -> list[str]:
    """Return the command-line flags of ``table``: one flag for each text of a list of texts."""
    words = []
    for name, value in table.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value and isinstance(value, list) and not any(isinstance(item, str) for item in value):
            words += [f"--{flag}", *map(str, value)]
        else:
            words += [f"--{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return words


@cache
def preset(name: str) -> FlagTable:
    """Return the flags of a preset, by field, plain."""
    entries = read_toml("preset", PRESETS / f"{name}.toml")
    return {key: run_flags()[key].plain(value) for key, value in entries.items()}


def layered(under: FlagTable, over: FlagTable) -> FlagTable:
    """Return the flags of two layers, by field: ``over`` wins, as the command line wins over a preset.

    Where ``over`` gives the length of the training, the length in ``under`` is dropped. The values of a flag
    that may be given several times add up.
    """
    if not over.keys().isdisjoint(LENGTHS):
        under = {key: value for key, value in under.items() if key not in LENGTHS}
    merged = {**under, **over}
    for key in under.keys() & over.keys() & run_flags().keys():
        if run_flags()[key].adds_up and isinstance(under[key], list) and isinstance(over[key], list):
            merged[key] = under[key] + over[key]
    return merged


def resolved(flags: FlagTable) -> FlagTable:
    """Return the plain flags (by field, with or without ``preset``) and the flags of their preset."""
    found = layered(preset(flags.get("preset", "quick")), flags)
    found.pop("preset", None)
    if found.get("epochs") is None and found.get("max_steps") is None:
        found["max_steps"] = DEFAULT_MAX_STEPS
    return found


def complete(flags: FlagTable) -> FlagTable:
    """Return every flag of the run that these plain flags make, by field, and its preset."""
    return {**defaults(), **resolved(flags), "preset": flags.get("preset", "quick")}


def config_of(flags: FlagTable) -> RunConfig:
    """Return the config of the run that these flags make (by field, with or without ``preset``).

    Raises:
        Refused: no run can have one of the values.
    """
    return build(RunConfig, layered(preset(flags.get("preset", "quick")), flags))


def build(
    config_type: type[Group], table: FlagTable, names: Mapping[str, str] | None = None, default: Any = None
) -> Group:
    """Return a config and its groups from flags by field; flags of other configs are left out.

    ``names`` has the user's name of a field, for the message; ``default`` has the values that the table does
    not give.

    Raises:
        Refused: the config cannot have one of the values.
    """
    values = {} if default is None else dict(vars(default))
    for each in fields(config_type):  # pyright: ignore[reportArgumentType]
        group = values.get(each.name)
        if each.default_factory is not MISSING and group is None:
            group = each.default_factory()
        if is_dataclass(group):
            values[each.name] = build(type(group), table, names, group)
        elif each.name in table:
            values[each.name] = table[each.name]
    try:
        return config_type(**values)
    except Refused as error:
        first, space, rest = str(error).partition(" ")
        raise Refused(f"{(names or {}).get(first, first)}{space}{rest}") from None
