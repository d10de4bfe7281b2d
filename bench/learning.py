"""The training of one run: its history, its checkpoint, and going on where it was interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor

from bench.data.blocks import EvalWindows
from bench.measure.ledger import Ledger
from bench.prepare import Prepared
from bench.progress import Reporter
from bench.record import Accounts, ExecutionUsed, Record, TimePart, Used
from bench.track import Tracker
from bench.training.checkpoint import save_checkpoint
from bench.training.communication import CommunicationTrace, probe_tokens
from bench.training.interruption import Interruption
from bench.training.loop import Shapes, Trained, Trainer
from bench.training.plan import EpochPlan, TrainingPlan
from bench.training.step import Batch
from bench.tune.control import OUT_OF_MEMORY, Decision, Recovery, steps_of
from bench.tune.shape import cut
from gnnmoe.model import GNNMoEModel


class Learning:
    """Trains a prepared run's model and keeps what happens; the hooks of its trainer.

    ``state`` is a checkpoint to go on from, bit for bit on a CPU with the same number of threads, as
    ``bench.checkpoint_checks`` lets it pass. ``tuned`` is the record of the search for the micro-batch,
    where there was one. ``parts`` returns the parts of the run up to now, as ``Time.of`` takes them.
    """

    def __init__(
        self,
        prepared: Prepared,
        model: GNNMoEModel,
        reporter: Reporter,
        interruption: Interruption,
        state: dict[str, Any] | None,
        tracker: Tracker,
        tuned: dict[str, Any] | None = None,
        parts: Callable[[], list[TimePart]] = list,
    ) -> None:
        self.prepared, self.model, self.reporter, self.interruption = prepared, model, reporter, interruption
        self.tracker = tracker
        config, loaders, ranks = prepared.config.training, prepared.loaders, prepared.ranks
        self.tuned, self._parts = tuned, parts
        unit = math.gcd(*TrainingPlan(loaders["train"], config).batch_sizes())
        self.steps = steps_of(
            prepared.config, model, unit, tuned, prepared.device, ranks, self.on_recovery, self.on_decision
        )
        self.trainer = Trainer(
            model, loaders["train"], loaders["val"], config, prepared.device, self,
            steps=self.steps, ranks=ranks,
        )  # fmt: skip
        windows = loaders["val"].dataset
        assert isinstance(windows, EvalWindows)
        self._validation_tokens = windows.num_scored
        self.trace = CommunicationTrace(probed(prepared))
        self.ledger = Ledger(tuned["micro_batch_size"] if tuned else None, ranks)
        self.every = prepared.config.places.checkpoint_every or config.eval_every
        if state is None:
            self.trace.sample(0, model)
        else:
            self.trainer.load_state_dict(state["trainer"])
            self.trace.load_state_dict(state["trace"])
            self.ledger.load_state_dict(state["ledger"])
        prepared.folder.write_history(state["history"] if state else "")
        tracker.begin(model, self.trace, self.trainer.done.steps)

    @property
    def micro_batch_size(self) -> int | None:
        """Rows that the last update ran at once; None: whole batches."""
        last = self.ledger.last_shapes
        return self.steps.micro_batch_size if not last else last[0][0] if len(last) > 1 else None

    def run(self) -> Trained:
        """Train to the end; a signal stops at the end of a step, with a checkpoint.

        Raises:
            KeyboardInterrupt: a signal came.
            Diverged: a loss is no longer finite.
        """
        self.reporter.training_begins(self.trainer.plan.total_steps, self.trainer.done.steps)
        with self.interruption.deferred():
            return self.trainer.run()

    def release(self) -> None:
        """Free what only training needs: gradients, the optimizer's state and the copy of the best one."""
        self.trainer.release()

    def keep_best(self) -> None:
        """Leave a checkpoint of the best weights alone: nothing is left to go on with."""
        self._save({"model": self.model.state_dict(), "identity": self.prepared.trained_identity})

    def write(self, record: Record) -> None:
        """Write what was used and the communication so far into ``record`` and its folder."""
        self.tracker.close()
        plan, done = self.trainer.plan, self.ledger.totals()
        execution, ranks = self.prepared.execution, self.prepared.ranks
        sizes = sorted({account.batch_size for account in self.ledger.epochs})
        last, controller = self.ledger.last_shapes, self.steps.controller
        record.used = Used(
            batch_shapes=self.ledger.batch_shapes, steps=done["updates"]["got"],
            tokens=done["tokens"]["got"], total_steps=plan.total_steps, epochs=round(plan.epochs(), 6),
            execution=ExecutionUsed(**execution.to_record()), precision=execution.precision,
            world_size=ranks.world_size, backend=ranks.backend,
            ledger=Accounts.model_validate(self.ledger.to_record()), batch_sizes=sizes,
            micro_batch_shapes=self.ledger.micro_batch_shapes,
            micro_batch_size=last[0][0] if last else None, accumulation=len(last) or None,
            recoveries=self.steps.to_record(),
            lengths=sorted({int(key.split("x")[1]) for key in self.ledger.micro_batch_shapes}),
            control=controller.to_record() if controller else [],
        )  # fmt: skip
        self.prepared.folder.write_arrays("communication.npz", self.trace.arrays())

    def on_epoch(self, plan: EpochPlan) -> None:
        """Open the epoch's account."""
        self.ledger.begin_epoch(plan)

    def on_batch(self, batch: Batch) -> int:
        """Count a batch; return its real targets."""
        return self.ledger.batch(batch)

    def on_update(self, shapes: Shapes) -> None:
        """Count an optimizer step, and the pieces of its batch."""
        self.ledger.update(shapes)

    def on_recovery(self, recovery: Recovery) -> None:
        """Say the first time, and log each time, that memory ran out and how the training goes on."""
        text = (
            f"step {recovery.step} ran out of memory: the same batch again, and all that follow, in "
            f"micro-batches of {recovery.micro_batch_size} instead of {recovery.failed_micro_batch_size}"
        )
        self.prepared.folder.log(f"{text} ({recovery.error})")
        if len(self.steps.recoveries) == 1:
            self.reporter.line(f"note: {text}; smaller ones where need be")

    def on_decision(self, decision: Decision) -> None:
        """Keep and say a change of the shape in which batches are run."""
        self.prepared.folder.append_history({"kind": "shape", **asdict(decision)})
        self.prepared.folder.log(str(decision))
        if decision.reason != OUT_OF_MEMORY:  # which on_recovery says
            self.reporter.line(f"note: {decision}")

    def as_run(self, batch: Batch) -> Batch:
        """Return a batch in sequences of the length that the last update was run in."""
        last = self.ledger.last_shapes
        return cut(batch, last[0][1]) if last else batch

    def after_epoch(self) -> None:
        """Close the epoch's account."""
        self.ledger.end_epoch()

    def on_step(self, row: dict[str, Any]) -> None:
        """Keep and show a step."""
        self.prepared.folder.append_history(row)
        self.tracker.row(row)
        self.reporter.step(row)

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """Keep and show an evaluation, and sample the communication."""
        self.ledger.evaluated("validation in training", self._validation_tokens, row["tokens"])
        self.trace.sample(row["step"], self.model)
        self.prepared.folder.append_history(row)
        self.tracker.row(row)
        self.tracker.sample(self.trace)
        self.reporter.evaluated(row)

    def after_step(self) -> None:
        """Save a checkpoint when it is time or when a signal came to any rank; then stop, all of them."""
        steps, requested = self.trainer.done.steps, self.prepared.ranks.any(self.interruption.requested)
        if requested or steps % self.every == 0 or steps == self.trainer.plan.total_steps:
            state = {
                "trainer": self.trainer.state_dict(), "trace": self.trace.state_dict(),
                "ledger": self.ledger.state_dict(), "tuned": self.tuned,
            }  # fmt: skip
            folder = self.prepared.folder
            texts = {"history": folder.read_history(), "log": folder.read_log()}
            self.tracker.flush()
            self._save({**state, **texts, "parts": [part.model_dump() for part in self._parts()]})
        if requested:
            raise KeyboardInterrupt

    def _save(self, state: dict[str, Any]) -> None:
        if self.prepared.ranks.first:
            prepared = self.prepared
            known_by = {"run_id": prepared.run_id, "identity": prepared.identity, "code": prepared.code}
            save_checkpoint(self.prepared.checkpoint, {**known_by, **state})


def probed(prepared: Prepared) -> Tensor:
    """Return the validation tokens (B, L) on which couplers are asked, on the device; alike on all ranks."""
    windows, rows = prepared.loaders["val"].dataset_obj, prepared.config.training.batch_size
    batch = windows.__getitems__(list(range(min(rows, len(windows)))))
    return probe_tokens(batch["input_ids"]).to(prepared.device)
