"""A process of its own for a test, forked: it begins at once, since everything is already imported."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

import torch


def fork_context() -> BaseContext:
    """Return how a test makes a process: by fork, or by spawn once CUDA is in use, which no fork survives."""
    return multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
