"""Every flag of the harness: plain dataclasses, grouped by what they decide.

Imports no torch, so that ``--help`` stays quick. Flags are flat, so field names are unique over
all groups. ``Places`` holds what cannot change a number; everything else is part of a run's
identity.
"""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bench.config_checks import check_positive
from bench.execution_config import ExecutionConfig
from bench.memory_config import MemoryConfig
from bench.schedule import BatchSchedule
from gnnmoe.config import GNNMoEConfig, Refused

DEFAULT_MAX_STEPS = 120


@dataclass(kw_only=True)
class ModelConfig(GNNMoEConfig):
    """The model's own config as flags."""

    coupler_type: Annotated[str, tyro.conf.arg(name="coupler", aliases=("--coupler-type",))] = "HGNN"
    """Coupler: a registered name (an unknown one lists them all), package.module:Class or file.py:Class."""
    coupler_options: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    coupler_option: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")
    ] = ()
    """An option of the coupler's own, such as backend=loop, or HGNN.backend=loop, which other couplers
    ignore; may be given several times."""
    vocab_size: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Rows for this many words, at least those of the data (None: as many as the data have)."""

    def __post_init__(self) -> None:
        for option in self.coupler_option:
            if "=" not in option:
                raise Refused(f"coupler option {option!r} has no value; write NAME=VALUE.")
        self.resolved(1)  # refuses wrong sizes

    def resolved(self, vocab_size: int) -> GNNMoEConfig:
        """Return the plain model config for data of this many words, or the ``vocab_size`` asked for."""
        values = {f.name: getattr(self, f.name) for f in fields(GNNMoEConfig)}
        options = dict(option.split("=", 1) for option in self.coupler_option)
        values["coupler_options"] = {**self.coupler_options, **options}
        if self.vocab_size is None:
            values["vocab_size"] = vocab_size
        return GNNMoEConfig(**values)


@dataclass(kw_only=True)
class DataConfig:
    """Which text, and how much of it."""

    dataset_name: Annotated[str | None, tyro.conf.arg(aliases=("--dataset",))] = None
    """Text data set on the hub; wikitext is WikiText-2. Named, by this or by its configuration, it
    must be had; unnamed, an embedded text serves where neither a folder nor the hub can be reached."""
    dataset_config_name: str | None = None
    """Configuration of the data set (None: wikitext-2-v1 for wikitext, none for others)."""
    text_column: str = "text"
    """Column of the data set that holds the text."""
    tokenizer: str = "word"
    """word, or bpe:SIZE: byte-level BPE of this many tokens, trained on the training split."""
    num_train_samples: int | None = None
    """Train on this many blocks of max_seq_length tokens (None: all)."""
    num_eval_samples: int | None = 512
    """Evaluate on the first blocks of max_seq_length tokens, this many (None: all)."""
    evaluate_test: bool = False
    """Score the test split once, at the end."""

    def __post_init__(self) -> None:
        check_positive(self, "num_train_samples", "num_eval_samples")


@dataclass(kw_only=True)
class TrainingConfig:
    """Optimizer, schedule and length of the training."""

    batch_size: int = 16
    """Sequences of one update, over all micro-batches and ranks."""
    max_steps: int | None = None
    """Optimizer steps in all (default: 120 where epochs is not given). Given, the epochs of a preset
    or of a --config file do not count."""
    epochs: int | None = None
    """Passes over the training data; with max_steps, whichever ends first. Given, the max_steps of a
    preset or of a --config file do not count."""
    max_batches_per_epoch: int | None = None
    """End an epoch after this many batches."""
    min_steps_per_epoch: int = 10
    """Refuse data that give an epoch fewer batches than this (max_batches_per_epoch may cut it further)."""
    batch_schedule: str | None = None
    """Batch size by epoch, such as 0:16,2:32 (16 from epoch 0 on, 32 from epoch 2 on)."""
    curriculum: str | None = None
    """Easy blocks first: rarity (rare words are hard), or model:CHECKPOINT of a finished run."""
    curriculum_pacing: Literal["linear", "competence_sqrt"] = "competence_sqrt"
    """How the share of the blocks grows over the epochs; the last epoch has all."""
    curriculum_start: float = 0.2
    """Share of the blocks in the first epoch of a curriculum."""
    strict_curriculum: bool = False
    """Refuse a curriculum whose model is missing, instead of a random order of the same sizes."""
    learning_rate: float = 8e-3
    """Peak learning rate of AdamW."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on matrices only."""
    warmup_steps: int = 15
    """Steps of linear warm-up; then a cosine to min_lr_ratio."""
    min_lr_ratio: float = 0.05
    """Last learning rate as a share of the peak."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm."""
    eval_every: int = 40
    """Evaluate on validation every so many steps; the best state is kept."""
    seed: int = 0
    """Seed of all random streams."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "max_steps", "epochs", "max_batches_per_epoch",
                       "min_steps_per_epoch",
                       "learning_rate", "eval_every", "max_grad_norm")  # fmt: skip
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise Refused(f"min_lr_ratio is {self.min_lr_ratio}; it must lie in [0, 1].")
        if self.warmup_steps < 0 or not 0 <= self.weight_decay < math.inf:
            raise Refused("warmup_steps and weight_decay must be finite and not negative.")
        if not all(0.0 <= beta < 1.0 for beta in self.adam_betas):
            raise Refused(f"adam_betas are {self.adam_betas}; each must lie in [0, 1).")

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes of the training, over all ranks: one, or those of its schedule."""
        if self.batch_schedule is None:
            return [self.batch_size]
        schedule = BatchSchedule.parse(self.batch_schedule).simplified(self.epochs)
        return [size for _, size in schedule.sizes]


@dataclass(kw_only=True)
class MeasureConfig:
    """The speed pass, and what to do about a coupler that fails the gate."""

    speed_warmup_steps: int | Literal["auto"] = 3
    """Steps before the clock starts; auto: until the median of ten moves by less than 2 % (at most 50)."""
    speed_steps: int = 10
    """Steps on the clock."""
    marginal: bool = False
    """Also time the same model with the mean coupler, in turn with this one: what the coupler alone costs."""
    profile: bool = False
    """Also write a profiler's trace (on CUDA also a snapshot of the memory) into the run's folder."""
    audit: Literal["sample", "full"] = "sample"
    """Score one batch in ten again at the end with later tokens replaced, or all: no loss may move."""
    allow_failed_gate: bool = False
    """Train a coupler that fails the gate all the same; the record says gate_failed."""

    def __post_init__(self) -> None:
        fixed = [] if self.speed_warmup_steps == "auto" else ["speed_warmup_steps"]
        check_positive(self, *fixed, "speed_steps")


@dataclass(kw_only=True)
class PlacesConfig:
    """Where things are and what they are called: nothing here changes a number."""

    data_dir: Path | None = None
    """Folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, or parquet files
    (default: the environment variable GNNMOE_DATA_DIR)."""
    data_source: Literal["auto", "folder", "hub", "embedded"] = "auto"
    """auto: a folder, else the local cache, else the hub, else the embedded text."""
    results_dir: Path = Path("results")
    """Folder of all results; a run's record lies in results_dir/study/run_id."""
    study: str = "default"
    """Runs that belong together."""
    run_name: str | None = None
    """A name for people to read."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA where there is one, else the CPU."""
    force: bool = False
    """Run again what is finished; the earlier record is kept as run_id.1."""
    keep_stale: bool = False
    """Keep a finished run that other code made, and continue one, instead of running it again."""
    resume: bool = False
    """Continue this run where it was interrupted."""
    resume_checkpoint: Path | None = None
    """Continue from this checkpoint file, which must be of this run's config."""
    checkpoint_dir: Path | None = None
    """Folder of the checkpoint (default: the run's own folder)."""
    checkpoint_every: int | None = None
    """Save a checkpoint every so many steps (default: at every evaluation)."""
    num_workers_dataloader: int | Literal["auto"] = 0
    """Processes that load data beside the training (0: none; auto: half the cores, at most 4)."""
    rank_timeout: float = 600.0
    """Under torchrun: seconds that a rank waits for the others before the run ends as crashed."""
    plots: bool = True
    """Draw the run's plots at its end."""
    track: Literal["tensorboard"] | None = None
    """Show the run in TensorBoard while it trains, from the folder tensorboard in its own
    (pip install 'gnnmoe[track]')."""
    reuse_gate: bool = False
    """Take the gate's verdict of another seed of this configuration, where the study has one by the same code
    on the same device, instead of checking again (bench.sweep does; the trained model is always checked)."""
    quiet: bool = False
    """Print the final table only."""

    def __post_init__(self) -> None:
        check_positive(self, "rank_timeout")
        if self.num_workers_dataloader != "auto" and self.num_workers_dataloader < 0:
            raise Refused(
                f"num_workers_dataloader is {self.num_workers_dataloader}; it must be 0 or more, or auto."
            )
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", self.study):
            raise Refused(
                f"study is {self.study!r}; it must be a plain folder name of at most 100 letters, digits, "
                "'_', '-' and '.'."
            )
        if self.track is not None and importlib.util.find_spec(self.track) is None:
            raise Refused(
                f"track is {self.track}, which is not installed; pip install 'gnnmoe[track]' installs it."
            )


@dataclass(kw_only=True)
class RunConfig:
    """Train and measure one model on one text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    places: PlacesConfig = field(default_factory=PlacesConfig)


@dataclass(kw_only=True)
class TuneConfig:
    """Try batch sizes with full training steps; print each trial, the largest that fits and the knee.

    Nothing is trained or written but the answer, which is kept for the next time. Exit status: 0 found,
    1 nothing fits, 2 wrong input.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    places: PlacesConfig = field(default_factory=PlacesConfig)
