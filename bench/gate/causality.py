"""Causality of the whole model: the future and the padding change nothing.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bench.gate.cuts import positions, replaced, starts
from bench.gate.report import CheckFailed
from bench.gate.subject import (
    TOLERANCE,
    Subject,
    is_random,
    modes,
    relative_difference,
    without_dropout,
)
from gnnmoe.model import GNNMoEModel

LENGTH, LAYERS, VOCABULARY = 16, 2, 64
ROWS = 3  # of a batch at the run's own length


def causality(subject: Subject) -> str:
    """A small model with the run's own experts, width, coupler and options.

    In float64 at every cut of 16 tokens; and in float32 at a few cuts of the run's own length.
    """
    length = min(subject.config.max_seq_length, LENGTH)
    model = _small_model(subject, length)
    tokens, others = (
        torch.randint(VOCABULARY, (length,), generator=subject.generator).to(subject.device) for _ in range(2)
    )
    others = torch.where(others == tokens, (others + 1) % VOCABULARY, others)
    said = f"logits before t do not move with tokens from t on, at {length} cuts; right padding is inert"
    for mode in modes(model):
        if is_random(lambda: model(tokens[None]), mode, subject.device):
            said += " (in train mode the coupler draws random numbers: not compared)"
            break
        with torch.no_grad():
            _future_changes_nothing(model, tokens, others, mode)
            if length >= 4:
                _padding_changes_nothing(model, tokens, others, mode)
    if subject.config.max_seq_length > LENGTH:
        _future_changes_nothing_at_length(subject)
        said += f"; nor does a loss at length {subject.config.max_seq_length}"
    return said


def _small_model(subject: Subject, length: int) -> GNNMoEModel:
    """Return a model of two layers at most in float64, with every parameter moved."""
    layers = min(subject.config.num_layers, LAYERS)
    config = replace(subject.config, num_layers=layers, vocab_size=VOCABULARY, max_seq_length=length)
    model = GNNMoEModel(config, seed=subject.seed)
    without_dropout(model)
    return subject.perturb(model.to(subject.device, torch.float64))


@torch.no_grad()
def _future_changes_nothing_at_length(subject: Subject) -> None:
    """Change the tokens from a cut on in each row of a batch, one row whole; one row stays as it is."""
    L = subject.config.max_seq_length
    model, draw = _small_model(subject, L).float(), np.random.default_rng(subject.seed)
    ids, others, targets = (
        torch.randint(VOCABULARY, (ROWS, L), generator=subject.generator).to(subject.device) for _ in range(3)
    )
    [start] = starts(torch.ones(ROWS, L, dtype=torch.bool), torch.ones(ROWS, L), draw)
    changed = replaced(ids, others, start, VOCABULARY)
    before = positions(ids) < start.to(ids.device)[:, None]
    for mode in modes(model):
        if is_random(lambda: model(ids[:1, : LENGTH + 1]), mode, subject.device):
            return
        base, found = (model.token_nll(tokens, targets) for tokens in (ids, changed))
        moved = torch.where(before, (found - base).abs(), 0.0)
        if not moved.any():
            continue
        again = model.token_nll(ids, targets)
        if float(moved.max()) > 4.0 * float((again - base).abs().max()):  # 0 but for unordered kernels
            row, position = divmod(int(moved.argmax()), L)
            cut = int(start[row])
            what = "other sequences" if cut == L else f"its tokens from {cut} on or other sequences"
            raise CheckFailed(
                f"the loss at position {position} of a sequence of {L} moves when {what} change, "
                f"in {mode} mode"
            )


def _future_changes_nothing(model: GNNMoEModel, tokens_L: Tensor, others_L: Tensor, mode: str) -> None:
    """Change the tokens from t on, in row t of one batch, and compare with the last row."""
    L = tokens_L.numel()
    position = torch.arange(L, device=tokens_L.device)
    changed = position >= torch.arange(L + 1, device=tokens_L.device)[:, None]
    logits_BLV = _finite_logits(model, torch.where(changed, others_L, tokens_L))
    difference = (logits_BLV - logits_BLV[-1]).abs().amax(-1) / logits_BLV.abs().max()
    seen = (difference > TOLERANCE) & ~changed
    if seen.any():
        cut, before = seen.nonzero()[0].tolist()
        raise CheckFailed(
            f"the logits at position {before} move when tokens from {cut} on change, in {mode} mode"
        )


def _padding_changes_nothing(model: GNNMoEModel, tokens_L: Tensor, others_L: Tensor, mode: str) -> None:
    """Pad one sequence with two different fillings, beside a full sequence, and compare."""
    L, real = tokens_L.numel(), tokens_L.numel() // 2
    kept = torch.arange(L, device=tokens_L.device) < real
    mask = torch.stack([kept, torch.ones_like(kept)])
    logits, losses = [], []
    for filling in (tokens_L, others_L):
        batch = torch.stack([torch.where(kept, tokens_L, filling), tokens_L])
        out = model(batch, attention_mask=mask.long(), labels=batch)
        logits.append(out["logits"][0, :real])
        losses.append(out["loss"])
    short = _finite_logits(model, tokens_L[None, :real])[0]
    for what, pair in (("logits", logits), ("loss", losses), ("logits", (logits[0], short))):
        if not relative_difference(*pair) <= TOLERANCE:
            raise CheckFailed(f"right padding moves the {what} of the real tokens, in {mode} mode")


def _finite_logits(model: GNNMoEModel, input_ids: Tensor) -> Tensor:
    logits = model(input_ids)["logits"]
    if not logits.isfinite().all():
        raise CheckFailed("the logits are not finite")
    return logits
