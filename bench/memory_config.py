"""Flags of memory: what is run at once, found before training or kept in it by a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.config_checks import check_positive
from gnnmoe.config import Refused


@dataclass(kw_only=True)
class MemoryConfig:
    """How much of a batch is run at once: a micro-batch, whose gradients add up to the batch's."""

    micro_batch_size: int | None = None
    """Sequences to run at once; must divide batch_size (None: the whole batch)."""
    tune_batch_size: bool = False
    """Before training, find the largest micro-batch that fits into memory_target of memory_budget."""
    memory_budget: str | None = None
    """Memory that a search may fill: 16GiB, a share such as 0.5, or device (None: all of the device's)."""
    memory_target: float = 0.85
    """Share of the budget that a trial's peak may reach: the one safety factor."""
    tune_mode: Literal["binsearch", "power"] = "binsearch"
    """power doubles until a size fails; binsearch goes on to exactly the largest that fits."""
    tune_init: int | None = None
    """Size of the first trial (None: batch_size, so that nothing is split where nothing must be)."""
    tune_max_trials: int = 12
    """Try at most this many sizes; failures count."""
    tune_max_seconds: float = 110.0
    """Begin no trial that is not expected to end within this time."""
    tune_max_batch_size: int | None = None
    """Run no micro-batch above this: a search tries none, and a controlled run grows to none."""
    tune_fallback: bool = False
    """Where a search fails, train with the configured size; the record says failed."""
    fit_shape: bool = False
    """Before training, find the longest sequences, then the largest micro-batch, within memory_target of
    memory_budget; the whole run then has that length."""
    control_memory: bool = False
    """In training, measure the peak of each step and change the micro-batch (between epochs also the
    length) to stay within memory_target of memory_budget."""
    shape_min_length: int | None = None
    """Shortest length that may be fitted or controlled (None: a quarter of max_seq_length)."""
    shape_max_length: int | None = None
    """Longest length that may be fitted (None: max_seq_length)."""
    shape_length_step: int = 16
    """Lengths are fitted in steps of this many tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "micro_batch_size", "tune_init", "tune_max_trials", "tune_max_seconds",
                       "tune_max_batch_size", "shape_min_length", "shape_max_length",
                       "shape_length_step")  # fmt: skip
        if not 0.0 < self.memory_target <= 1.0:
            raise Refused(f"memory_target is {self.memory_target}; it must lie in (0, 1].")
        if self.tune_batch_size and self.micro_batch_size is not None:
            raise Refused("tune_batch_size finds the micro-batch: drop micro_batch_size, or the search.")
