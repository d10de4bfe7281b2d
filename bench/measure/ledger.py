"""What was used, counted from the tensors, against what was planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from torch import Tensor

from bench.training.loop import EpochPlan
from bench.training.ranks import ALONE, Ranks
from bench.training.step import real_targets

COUNTED = ("batches", "samples", "tokens")


class BatchAccountingError(RuntimeError):
    """What was served is not what was planned."""


@dataclass
class EpochAccount:
    """One epoch: ``asked`` by the plan, ``got`` from the tensors."""

    epoch: int
    batch_size: int
    asked: dict[str, int]
    got: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*COUNTED, "updates"), 0))

    @classmethod
    def of(cls, plan: EpochPlan) -> EpochAccount:
        """Return the account of an epoch that begins."""
        asked = {name: getattr(plan, name) for name in COUNTED} | {"updates": plan.batches}
        return cls(plan.epoch, plan.batch_size, asked)


class Ledger:
    """Counts batches, samples, real targets and updates of a training, and the targets of evaluations.

    On several ranks a batch is that of all of them together, by a sum over the ranks; pieces are this
    rank's. A target is real where it is not −100. ``tuned_micro_batch_size`` is what a search gave: rows
    to run at once, never the batch of an update.
    """

    def __init__(self, tuned_micro_batch_size: int | None = None, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self.tuned_micro_batch_size = tuned_micro_batch_size
        self.epochs: list[EpochAccount] = []
        self.batch_shapes: dict[str, int] = {}
        self.micro_batch_shapes: dict[str, int] = {}
        self._shape: tuple[int, ...] = (0, 1)  # of this rank's last batch
        self.last_shapes: list[tuple[int, ...]] = []
        """Of the pieces of the last update, as the model saw them."""
        self.evaluations: dict[str, dict[str, int]] = {}
        self._open = False

    def begin_epoch(self, plan: EpochPlan) -> None:
        """Open an epoch, or go on with it where it was left.

        Raises:
            BatchAccountingError: the epoch before it is not complete.
        """
        if self.epochs and self.epochs[-1].epoch == plan.epoch:
            self._open = True
            return
        if self._open:
            self.end_epoch()
        self.epochs.append(EpochAccount.of(plan))
        self._open = True

    def batch(self, batch: dict[str, Tensor]) -> int:
        """Count a batch that is trained on; return its real targets, over all ranks.

        Raises:
            BatchAccountingError: it is one more than planned, or larger.
        """
        account, self._shape = self.epochs[-1], tuple(batch["input_ids"].shape)
        rows, tokens = self._ranks.totals([self._shape[0], real_targets(batch)])
        for name, count in zip(COUNTED, (1, rows, tokens), strict=True):
            account.got[name] += count
        key = _key((rows, *self._shape[1:]))
        self.batch_shapes[key] = self.batch_shapes.get(key, 0) + 1
        over = [name for name in COUNTED if account.got[name] > account.asked[name]]
        if over or rows > account.batch_size:
            raise BatchAccountingError(self._difference(account, f"a batch of {key}"))
        return tokens

    def update(self, shapes: Sequence[tuple[int, ...]] = ()) -> None:
        """Count an optimizer step, and the shapes of the micro-batches in which its batch was run.

        Raises:
            BatchAccountingError: their rows are not those of the batch counted before.
        """
        self.epochs[-1].got["updates"] += 1
        rows = sum(shape[0] for shape in shapes)
        if shapes and sum(map(prod, shapes)) != prod(self._shape):  # cut shorter, it has more rows
            raise BatchAccountingError(
                f"epoch {self.epochs[-1].epoch}: a batch of {self._shape[0]} rows was served, but its "
                f"micro-batches hold {rows} ({', '.join(map(_key, shapes))})"
            )
        self.last_shapes = [tuple(shape) for shape in shapes] or self.last_shapes
        for shape in shapes:
            self.micro_batch_shapes[_key(shape)] = self.micro_batch_shapes.get(_key(shape), 0) + 1

    def end_epoch(self) -> None:
        """Close the epoch.

        Raises:
            BatchAccountingError: something was planned and did not come, or the other way round.
        """
        self._open = False
        account = self.epochs[-1]
        if account.got != account.asked:
            raise BatchAccountingError(self._difference(account, "its end"))

    def evaluated(self, name: str, asked: int, got: int) -> None:
        """Count an evaluation's targets.

        Raises:
            BatchAccountingError: more or fewer targets were scored than there are.
        """
        account = self.evaluations.setdefault(name, {"evaluations": 0, "asked": 0, "got": 0})
        account["evaluations"] += 1
        account["asked"] += asked
        account["got"] += got
        if asked != got:
            raise BatchAccountingError(f"{name}: {asked:,} targets were to be scored and {got:,} were")

    def totals(self) -> dict[str, dict[str, int]]:
        """Return ``asked`` and ``got`` of everything trained on, by what was counted."""
        names = (*COUNTED, "updates")
        return {
            name: {side: sum(getattr(account, side)[name] for account in self.epochs)
                   for side in ("asked", "got")}
            for name in names
        }  # fmt: skip

    def to_record(self) -> dict[str, Any]:
        """Return everything that was counted, ready for JSON."""
        return {
            "tuned_micro_batch_size": self.tuned_micro_batch_size,
            "epochs": [asdict(account) for account in self.epochs],
            "training": self.totals(),
            "evaluations": self.evaluations,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to go on counting."""
        return {"tuned_micro_batch_size": self.tuned_micro_batch_size,
                "epochs": [asdict(account) for account in self.epochs],
                "evaluations": {name: dict(counts) for name, counts in self.evaluations.items()},
                "batch_shapes": dict(self.batch_shapes),
                "micro_batch_shapes": dict(self.micro_batch_shapes),
                "last_shapes": list(self.last_shapes)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.tuned_micro_batch_size = state["tuned_micro_batch_size"]
        self.epochs = [EpochAccount(**account) for account in state["epochs"]]
        self.batch_shapes, self.evaluations = dict(state["batch_shapes"]), dict(state["evaluations"])
        self.micro_batch_shapes = dict(state["micro_batch_shapes"])
        self.last_shapes = [tuple(shape) for shape in state["last_shapes"]]
        self._open = bool(self.epochs)

    def _difference(self, account: EpochAccount, where: str) -> str:
        micro = self.tuned_micro_batch_size
        tuned = "not tuned" if micro is None else f"micro-batch tuned to {micro}"
        counts = "; ".join(
            f"{account.asked[name]:,} {name} expected, {account.got[name]:,} came" for name in account.got
        )
        return f"epoch {account.epoch} at {where}: batch size {account.batch_size} ({tuned}); {counts}"


def _key(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
