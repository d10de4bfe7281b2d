"""Flags that let a run's length and micro-batch follow from a memory budget; part of ``MemoryConfig``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class ShapeConfig:
    """Length and micro-batch by memory: once before training, or step by step in it."""

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
