"""Causality of the whole model: later tokens and padding change nothing.

Shapes: B batch (rows), L length (positions), V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bench.check.subject import (
    TOLERANCE,
    CheckFailed,
    Subject,
    is_random,
    modes,
    relative_difference,
    without_dropout,
)
from gnnmoe.model import GNNMoEModel

LENGTH, LAYERS, VOCABULARY = 16, 2, 64
ROWS = 3  # of the batch at the run's own length


def causality(subject: Subject) -> str:
    """Check a small model with the run's own experts, width, coupler and options.

    The check covers every cut of 16 tokens in float64, and a few cuts at the run's own length in float32.
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
    """Return a model with at most two layers in float64, with every parameter perturbed."""
    layers = min(subject.config.num_layers, LAYERS)
    config = replace(subject.config, num_layers=layers, vocab_size=VOCABULARY, max_seq_length=length)
    model = GNNMoEModel(config, seed=subject.seed)
    without_dropout(model)
    return subject.perturb(model.to(subject.device, torch.float64))


def _future_changes_nothing(model: GNNMoEModel, tokens_L: Tensor, others_L: Tensor, mode: str) -> None:
    """Change the tokens from t on in row t of one batch, and compare each row with the last row."""
    L = tokens_L.numel()
    changed = positions(tokens_L[None]) >= torch.arange(L + 1, device=tokens_L.device)[:, None]
    logits_BLV = _finite_logits(model, torch.where(changed, others_L, tokens_L))
    difference = (logits_BLV - logits_BLV[-1]).abs().amax(-1) / logits_BLV.abs().max()
    seen = (difference > TOLERANCE) & ~changed
    if seen.any():
        cut, before = seen.nonzero()[0].tolist()
        raise CheckFailed(
            f"the logits at position {before} move when tokens from {cut} on change, in {mode} mode"
        )


def _padding_changes_nothing(model: GNNMoEModel, tokens_L: Tensor, others_L: Tensor, mode: str) -> None:
    """Pad one sequence with two different fillings, beside a full sequence, and compare the results."""
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


@torch.no_grad()
def _future_changes_nothing_at_length(subject: Subject) -> None:
    """Change the tokens from a cut on in one row, one row whole and one row not at all."""
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
        if float(moved.max()) > 4.0 * float((again - base).abs().max()):  # 0 unless kernels are unordered
            row, position = divmod(int(moved.argmax()), L)
            cut = int(start[row])
            what = "other sequences" if cut == L else f"its tokens from {cut} on or other sequences"
            raise CheckFailed(
                f"the loss at position {position} of a sequence of {L} moves when {what} change, "
                f"in {mode} mode"
            )


# --- where inputs are replaced: here and in the audit ------------------------------------------------


def starts(scored: Tensor, reported: Tensor, draw: np.random.Generator) -> list[Tensor]:
    """Return the first replaced position of each row, (B,), for each forward that a check runs.

    0 replaces a whole row; L leaves the row as it is. A cut lies behind a scored position. In every other
    row all scored positions are equally likely. In the remaining rows a position is as likely as the model
    found its target, because a leak shows where the model is sure. Of three rows or more, one row is
    replaced whole, the row before it is left, and the other rows are cut. Two rows need two forwards.

    Args:
        scored: Which positions are scored, (B, L).
        reported: The loss of each position in nats, (B, L).
        draw: Source of random numbers.
    """
    B, L = scored.shape
    cut = torch.full((B,), L)
    for row in range(B):
        candidates = scored[row, : L - 1].nonzero().flatten()
        if len(candidates):
            chances = np.exp(-reported[row, candidates].double().numpy()) if row % 2 else None
            total = 0.0 if chances is None else chances.sum()
            chances = chances / total if chances is not None and 0 < total < np.inf else None
            cut[row] = 1 + int(draw.choice(candidates.numpy(), p=chances))
    if B == 1:
        return [cut]
    whole = int(draw.integers(1, B))
    together = cut.clone() if B > 2 else torch.full((B,), L)
    together[whole - 1], together[whole] = L, 0
    return [together] if B > 2 else [cut, together]


def replaced(ids: Tensor, others: Tensor, start: Tensor, words: int) -> Tensor:
    """Return ``ids`` (B, L) with ``others`` from ``start`` (B,) on; every replaced token differs."""
    others = torch.where(others == ids, (others + 1) % words, others)
    return torch.where(positions(ids) < start.to(ids.device)[:, None], ids, others)


def positions(ids: Tensor) -> Tensor:
    """Return the numbers of the positions, (L,), on the device of ``ids`` (B, L)."""
    return torch.arange(ids.shape[1], device=ids.device)
