"""A fit of length and micro-batch with its trials, here or in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from bench.gate.subject import global_random_state_kept
from bench.measure.activation import require_batch_applied
from bench.measure.search_process import Budgeted, Send, in_child
from bench.measure.trials import Trials, TrialSetup
from bench.training.batch_size import Trial
from bench.training.fit import Fit, OnTry, Tried, concluded, fit
from bench.training.shape import Shape


@dataclass(frozen=True)
class FitRequest(Budgeted):
    """A fit to be done."""

    shapes: tuple[Shape, ...]
    max_trials: int
    max_seconds: float


def fit_here(request: FitRequest, on_try: OnTry = lambda _: None) -> Fit:
    """Fit in this process; ``on_try`` is told of each trial.

    Raises:
        NoFeasibleBatch: nothing fits.
        ParametersNotApplied: a larger batch takes no more memory.
    """

    @cache
    def trials(length: int) -> Trials:
        return Trials(replace(request.setup, model=replace(request.setup.model, max_seq_length=length)))

    def predict(shape: Shape) -> int | None:
        return trials(shape.length).predicted(shape.rows)

    def run(shape: Shape) -> Trial:
        return trials(shape.length)(shape.rows)

    _require_applied(trials(request.shapes[0].length).setup)
    return fit(
        predict, run, request.shapes, limit_bytes=request.setup.limit_bytes,
        max_trials=request.max_trials, max_seconds=request.max_seconds, on_try=on_try,
    )  # fmt: skip


def fit_in_child(request: FitRequest, on_try: OnTry = lambda _: None) -> Fit:
    """Fit in a process of its own, which is ended after ``max_seconds``; raises as ``in_child``."""

    def so_far(tries: list[Tried]) -> Fit:
        return concluded(tries, request.shapes, request.setup.limit_bytes, "max_seconds")

    return in_child(_fit, request, request.max_seconds, on_try, so_far)


def _fit(request: FitRequest, seconds: float, send: Send) -> Fit:
    return fit_here(replace(request, max_seconds=seconds), send)


def _require_applied(setup: TrialSetup) -> None:
    device, length = torch.device(setup.device), setup.model.max_seq_length
    with global_random_state_kept(device):
        require_batch_applied(setup.build(), length, device)
