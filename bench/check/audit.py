"""The evaluation audit: no reported loss depends on a later token or on another window.

The audit looks at the trained model as a whole. It also finds leaks that no look at a single coupler can
find: from layer to layer, above some length, in one precision, for some content, or only after training. It
replaces the inputs from a cut on, and compares the losses before the cut with the reported losses.

Shapes: B windows (rows), L positions, T scored targets of a split.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.check.behaviour import positions, replaced, starts
from bench.check.subject import (
    Check,
    CheckFailed,
    deterministic,
    eval_mode,
    global_random_state_kept,
    run_check,
    seed_global_generator,
)
from bench.data.blocks import EvalWindows
from bench.data.loader import BlockLoader
from bench.device import is_out_of_memory
from gnnmoe.head import IGNORED
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed

ONE_BATCH_IN = 10
NEAR = 8  # positions before a cut whose mean loss is compared in training mode: a mean of few moves visibly
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""How far two scorings of one batch may differ, relative to the largest loss."""


@dataclass(frozen=True)
class Scored:
    """A split with the losses that the record reports."""

    name: str
    loader: BlockLoader
    nll: np.ndarray
    """The reported loss of each target in nats, (T,) float32, in the order of the text."""
    seconds: float
    """The duration of the scoring."""

    @property
    def windows(self) -> EvalWindows:
        """The windows that were scored."""
        windows = self.loader.dataset_obj
        assert isinstance(windows, EvalWindows), "evaluations have windows"
        return windows


class Piece(NamedTuple):
    """The windows that one forward scores."""

    windows: list[int]
    ids: Tensor
    """(B, L)"""
    targets: Tensor
    """(B, L); −100 at a position that is not scored."""
    reported: Tensor
    """The reported loss of each position in nats, (B, L) float32 on the CPU; 0 if it is not scored."""

    @property
    def scored(self) -> Tensor:
        """Return which positions are scored, (B, L) on the CPU."""
        return (self.targets != IGNORED).cpu()


# --- the losses that are reported --------------------------------------------------------------------


def audit_evaluation(
    model: GNNMoEModel,
    splits: Sequence[Scored],
    *,
    rows: int | None,
    seed: int,
    full: bool = False,
    fresh: Callable[[], GNNMoEModel] | None = None,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> tuple[Check, dict[str, Any]]:
    """Score some batches again with other inputs, and compare the losses that must not move.

    Every window of an audited batch has its own cut within its scored positions. The audit replaces the
    inputs from the cut on and keeps the targets. Every loss before the cut must equal the reported loss, bit
    for bit. In each forward one window is replaced whole, and the window before it stays as it is. Without a
    leak, bits differ only if kernels add in another order. Then deterministic kernels decide. If these differ
    too, the tolerance is four times the difference between two scorings of the unchanged batch.

    Args:
        model: The trained model; its training flags and the random state stay as they were.
        splits: The scored splits, in the batches of each loader.
        rows: Number of windows that were scored at once; None: a whole batch.
        seed: Seed of the run; it draws batches, cuts and inputs.
        full: Audit all batches, not one in ten.
        fresh: Builds a new model with the same weights. The audit scores that model instead of ``model``: a
            coupler that keeps something outside its weights gives other losses there.
        gather: Returns the values of all ranks; each rank audits batches of its own.

    Returns:
        The check; and for the record the number of audited and of all windows and batches, the tolerance in
        nats, and the time of the audit as a share of the evaluation's time.
    """
    audit = _Audit(model, rows, seed, full, fresh)
    with ExitStack() as stack:
        device = next(model.parameters()).device
        stack.enter_context(global_random_state_kept(device))
        stack.enter_context(torch.no_grad())
        own = run_check("evaluation_audit", lambda: audit.all(splits))
    found = gather((own, audit.counts))
    counts = _Counts.total(part for _, part in found)
    failed = next((check for check, _ in found if not check.passed), None)
    check = failed or Check("evaluation_audit", True, counts.words(), own.seconds)
    scoring = sum(split.seconds for split in splits)
    return check, {
        "mode": "full" if full else "sample",
        **counts.to_record(),
        "seconds": own.seconds,
        "evaluation_seconds": scoring,
        "share_of_evaluation": own.seconds / scoring if scoring else None,
    }


@dataclass
class _Counts:
    """How much an audit covered."""

    windows: int = 0
    all_windows: int = 0
    batches: int = 0
    all_batches: int = 0
    losses: int = 0
    tolerance: float = 0.0
    deterministic: bool = False
    shapes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def total(cls, parts: Iterable[_Counts]) -> _Counts:
        """Return the counts of all ranks together."""
        total = cls()
        for part in parts:
            for name in ("windows", "all_windows", "batches", "all_batches", "losses"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            total.tolerance = max(total.tolerance, part.tolerance)
            total.deterministic |= part.deterministic
            total.shapes += [shape for shape in part.shapes if shape not in total.shapes]
        return total

    def words(self) -> str:
        """Return the coverage and the result in one sentence."""
        how = "bit for bit"
        if self.tolerance:
            how = f"to {self.tolerance:.1e} nats, four times the difference of two scorings"
        elif self.deterministic:
            how = "bit for bit with deterministic kernels"
        shapes = " and ".join(map(str, self.shapes[:3]))
        return (
            f"{self.losses:,} losses of {self.windows:,} of {self.all_windows:,} windows, in "
            f"{self.batches:,} of {self.all_batches:,} batches at (B, L) = {shapes}: none moves with a later "
            f"token or another window, {how}"
        )

    def to_record(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        counts = ("windows", "all_windows", "batches", "all_batches", "losses")
        return {
            **{name: getattr(self, name) for name in counts},
            "tolerance_nats": self.tolerance,
            "deterministic_kernels": self.deterministic,
        }


class _Audit:
    """One audit of an evaluation."""

    def __init__(
        self,
        model: GNNMoEModel,
        rows: int | None,
        seed: int,
        full: bool,
        fresh: Callable[[], GNNMoEModel] | None,
    ) -> None:
        self.model, self.rows, self.seed, self.full, self.fresh = model, rows, seed, full, fresh
        self.device = next(model.parameters()).device
        self.counts = _Counts()

    def all(self, splits: Sequence[Scored]) -> str:
        """Audit every split; return the coverage in words."""
        if self.fresh is not None:
            try:
                return self._audit(self.fresh(), splits)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.fresh, self.counts = None, _Counts()  # the memory has no room for a second model
        return self._audit(self.model, splits)

    def _audit(self, subject: GNNMoEModel, splits: Sequence[Scored]) -> str:
        with eval_mode(subject):
            for split in splits:
                self._audit_split(subject, split)
        return self.counts.words()

    def _audit_split(self, subject: GNNMoEModel, split: Scored) -> None:
        draw = np.random.default_rng(stream_seed(self.seed, f"audit.{split.name}"))
        batches = [list(numbers) for numbers in split.loader.sampler_obj]
        self.counts.all_batches += len(batches)
        self.counts.all_windows += sum(map(len, batches))
        for number in chosen_batches(list(map(len, batches)), self.full, draw):
            numbers = batches[number]
            self.counts.batches += 1
            self.counts.windows += len(numbers)
            size = self.rows or len(numbers)
            for first in range(0, len(numbers), size):
                piece = self._piece(split, numbers[first : first + size])
                shape = (len(piece.ids), piece.ids.shape[1])
                self.counts.shapes += [shape] if shape not in self.counts.shapes else []
                for start in starts(piece.scored, piece.reported, draw):
                    self._compare(subject, split, piece, start, self._changed(split, piece, start, draw))

    def _piece(self, split: Scored, numbers: list[int]) -> Piece:
        batch = split.windows.__getitems__(numbers)
        scored = batch["targets"] != IGNORED
        reported = torch.zeros(scored.shape)
        reported[scored] = torch.from_numpy(split.nll[split.windows.target_numbers(numbers)])
        ids, targets = (batch[name].to(self.device) for name in ("input_ids", "targets"))
        return Piece(numbers, ids, targets, reported)

    def _changed(self, split: Scored, piece: Piece, start: Tensor, draw: np.random.Generator) -> Tensor:
        """Return the inputs with tokens from elsewhere in the text, from ``start`` (B,) on."""
        stream, words = split.windows.split.stream, split.loader.corpus.vocabulary.size
        others = torch.from_numpy(stream[draw.integers(len(stream), size=tuple(piece.ids.shape))])
        return replaced(piece.ids, others.to(self.device), start, words)

    def _compare(
        self, subject: GNNMoEModel, split: Scored, piece: Piece, start: Tensor, changed: Tensor
    ) -> None:
        """Compare the losses before ``start`` with the reported losses.

        Raises:
            CheckFailed: a loss moved, or the unchanged batch gives other losses than before.
        """
        before = piece.scored & (positions(piece.ids) < start[:, None])
        self.counts.losses += int(before.sum())
        found = _score(subject, changed, piece.targets)
        if torch.equal(found[before], piece.reported[before]):
            return
        if torch.equal(_score(subject, piece.ids, piece.targets), piece.reported):
            raise CheckFailed(self._explain(subject, split, piece, start, changed, found - piece.reported))
        with deterministic():
            once, twice, found = (
                _score(subject, ids, piece.targets) for ids in (piece.ids, piece.ids, changed)
            )
            self._refuse_drift(split, piece, once)
            tolerance = 4.0 * float((once - twice).abs().max())
            moved = torch.where(before, (found - once).abs(), 0.0)
            if float(moved.max()) > tolerance:
                raise CheckFailed(self._explain(subject, split, piece, start, changed, found - once))
        self.counts.deterministic = True
        self.counts.tolerance = max(self.counts.tolerance, tolerance)

    def _refuse_drift(self, split: Scored, piece: Piece, again: Tensor) -> None:
        """Refuse losses of the unchanged batch that differ from the reported losses by more than rounding.

        Raises:
            CheckFailed: naming the position that differs most.
        """
        difference = (again - piece.reported).abs()
        kind = torch.bfloat16 if self.model.precision == "bf16" else torch.float32
        if float(difference.max()) > ROUNDING[kind] * float(piece.reported.abs().max()):
            row, position = divmod(int(difference.argmax()), difference.shape[1])
            who = "a new model with the same weights" if self.fresh is not None else "the same model"
            raise CheckFailed(
                f"{_place(split, piece, row, position)}: the reported loss is "
                f"{float(piece.reported[row, position]):.4f} nats, and {who} gives "
                f"{float(again[row, position]):.4f} on the same batch: the coupler keeps something that is "
                "not in its parameters and buffers"
            )

    def _explain(
        self,
        subject: GNNMoEModel,
        split: Scored,
        piece: Piece,
        start: Tensor,
        changed: Tensor,
        difference: Tensor,
    ) -> str:
        """Name the loss that moved most, and the input that moved it."""
        before = piece.scored & (positions(piece.ids) < start[:, None])
        moved = torch.where(before, difference.abs(), 0.0)
        row, position = divmod(int(moved.argmax()), moved.shape[1])
        said = f"{_place(split, piece, row, position)}: its loss moves by {float(moved.max()):.2g} nats when"
        base = _score(subject, piece.ids, piece.targets)[row, position]

        def moves(which: int) -> bool:
            ids = piece.ids.clone()
            ids[which] = changed[which]
            return bool(_score(subject, ids, piece.targets)[row, position] != base)

        if moves(row):
            return f"{said} its inputs from position {int(start[row])} on change: it sees its future"
        others = [other for other in range(len(piece.ids)) if other != row and moves(other)]
        which = f"window {piece.windows[others[0]]} of its batch changes" if others else "its batch changes"
        return f"{said} {which}: it sees another sequence"


def chosen_batches(sizes: Sequence[int], full: bool, draw: np.random.Generator) -> list[int]:
    """Return the numbers of the audited batches: all, or one in ten and at least one.

    The batches are divided into equal stretches, and one batch is drawn from each stretch. A smaller last
    batch belongs to the audit only if the audit has two batches or more, and then always.
    """
    if full or len(sizes) < 2:
        return list(range(len(sizes)))
    number, smaller = max(1, len(sizes) // ONE_BATCH_IN), sizes[-1] != sizes[0]
    ends = [(len(sizes) - smaller) * part // number for part in range(number + 1)]
    found = [int(draw.integers(low, high)) for low, high in pairwise(ends)]
    return [*found[:-1], len(sizes) - 1] if smaller and number > 1 else found


def _score(model: GNNMoEModel, ids: Tensor, targets: Tensor) -> Tensor:
    """Return the losses in nats, (B, L) float32 on the CPU, as an evaluation computes them."""
    return model.token_nll(ids, targets).float().cpu()


def _place(split: Scored, piece: Piece, row: int, position: int) -> str:
    window = piece.windows[row]
    token = window * split.windows.stride + position
    return f"{split.name} window {window}, position {position} (token {token:,})"


# --- one batch in training mode ----------------------------------------------------------------------


def audit_training(
    model: GNNMoEModel, batch: dict[str, Tensor], *, rows: int | None, seed: int, words: int
) -> Check:
    """Check in training mode that no loss of one batch moves with a later token or another sequence.

    The forward is the forward of the training: compiled if the run asked for it, with gradients, in the
    micro-batch of the run, and with its dropout. Each forward draws the same random numbers. A compiled model
    is checked itself and restored; any other model is copied.

    Args:
        model: The trained model.
        batch: ``input_ids`` and ``targets`` (B, L) on the model's device.
        rows: Rows of one forward; None: the whole batch.
        seed: Seed of the run; it draws cuts and inputs.
        words: Size of the vocabulary.
    """
    device = batch["input_ids"].device
    size = min(rows or len(batch["input_ids"]), len(batch["input_ids"]))
    with ExitStack() as stack:
        stack.enter_context(global_random_state_kept(device))
        subject = stack.enter_context(_in_training(model))
        while True:
            ids, targets = (batch[name][:size] for name in ("input_ids", "targets"))
            trial = _TrainingTrial(subject, ids, targets, seed, words)
            try:
                return run_check("training_audit", trial.run)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or size <= 2:
                    raise
            size = max(2, size // 2)  # the copy needs memory too


class _TrainingTrial:
    """The forwards of one batch in training mode; each returns the mean loss of chosen positions."""

    def __init__(self, model: GNNMoEModel, ids: Tensor, targets: Tensor, seed: int, words: int) -> None:
        self.model, self.ids, self.targets, self.words = model, ids, targets, words
        self.draw = np.random.default_rng(stream_seed(seed, "audit.training"))

    def run(self) -> str:
        """Compare the mean loss of the last positions before each cut: a leak moves these."""
        scored = (self.targets != IGNORED).cpu()
        for start in starts(scored, torch.zeros(scored.shape), self.draw):
            others = self.ids.flatten()[torch.from_numpy(self.draw.permutation(self.ids.numel()))]
            changed = replaced(self.ids, others.view_as(self.ids), start, self.words)
            distance = start[:, None] - torch.arange(scored.shape[1])
            near = scored & (distance > 0) & (distance <= NEAR)
            if near.any():
                self._compare(changed, near, start)
        shape = tuple(self.ids.shape)
        how = ", compiled" if self.model.is_compiled else ""
        return (
            f"one batch in training mode{how}, (B, L) = {shape}: no loss moves with a later token or another "
            "sequence"
        )

    def _compare(self, changed: Tensor, mask: Tensor, start: Tensor) -> None:
        base, found = self._loss(self.ids, mask), self._loss(changed, mask)
        if base == found:
            return
        if self._loss(self.ids, mask) == base:
            raise CheckFailed(self._explain(changed, mask, start))
        with deterministic():
            once, twice, found = (self._loss(ids, mask) for ids in (self.ids, self.ids, changed))
            if abs(found - once) > 4.0 * abs(once - twice):
                raise CheckFailed(self._explain(changed, mask, start))

    def _loss(self, ids: Tensor, mask: Tensor) -> float:
        """Return the mean loss in nats of the positions of ``mask`` (B, L)."""
        seed_global_generator(0, ids.device)
        targets = self.targets.masked_fill(~mask.to(ids.device), IGNORED)
        loss = self.model(ids, targets=targets, return_logits=False)["loss"]
        assert loss is not None, "there are targets"
        return float(loss.detach())

    def _explain(self, changed: Tensor, mask: Tensor, start: Tensor) -> str:
        """Name one loss that moves: halve the set of positions until one is left."""
        places = mask.nonzero()
        while len(places) > 1:
            half, rest = places.chunk(2)
            places = half if self._moves(changed, _only(mask, half)) else rest
        row, position = places[0].tolist()
        only, ids = _only(mask, places), self.ids.clone()
        size = abs(self._loss(changed, only) - self._loss(self.ids, only))
        ids[row] = changed[row]
        if int(start[row]) < mask.shape[1] and self._moves(ids, only):
            what = f"inputs from position {int(start[row])} on change: it sees its future"
        else:
            what = "other sequences of the batch change: it sees another sequence"
        return (
            f"in training mode, the loss of sequence {row} at position {position} moves by {size:.2g} nats "
            f"when {what}; so the model has trained with a leak"
        )

    def _moves(self, ids: Tensor, mask: Tensor) -> bool:
        return self._loss(ids, mask) != self._loss(self.ids, mask)


def _only(mask: Tensor, places: Tensor) -> Tensor:
    found = torch.zeros_like(mask)
    found[places[:, 0], places[:, 1]] = True
    return found


@contextmanager
def _in_training(model: GNNMoEModel) -> Iterator[GNNMoEModel]:
    """Yield a copy in training mode; yield a compiled model itself, and restore it after the block."""
    if not model.is_compiled:
        yield copy.deepcopy(model).train()
        return
    flags = [(module, module.training) for module in model.modules()]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield model.train()
    finally:
        for module, flag in flags:
            module.training = flag
        for buffer, value in kept:
            buffer.copy_(value)
