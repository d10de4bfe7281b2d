"""A process of its own for a test, forked: it begins at once, since everything is already imported."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkContext, SpawnContext

import torch


def fork_context() -> ForkContext | SpawnContext:
    """Return how a test makes a process: by fork, or by spawn once CUDA is in use, which no fork survives."""
    if torch.cuda.is_initialized():
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("fork")
