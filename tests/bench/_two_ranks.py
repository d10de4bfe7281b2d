"""What one of several gloo processes does for ``test_ranks.py``; everything it finds goes into a file.

Also imported by the test, which does the same things alone and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from bench.config import MeasureConfig, TrainingConfig
from bench.data.corpus import Corpus, load_corpus
from bench.data.loader import create_loader
from bench.measure import speed_pass
from bench.measure.ledger import Ledger
from bench.measure.timing import StepTimes, TrainingSteps, time_steps
from bench.training.evaluation import evaluate
from bench.training.loop import Trainer
from bench.training.ranks import Ranks
from bench.training.step import Batch, add_gradients, make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.config import Refused
from gnnmoe.head import IGNORED

CPU, ROWS, LENGTH, VOCABULARY = torch.device("cpu"), 8, 8, 40
WINDOWS = (1, 7)  # to evaluate: fewer than ranks, and an odd number


def model(
    vocabulary: int = VOCABULARY, length: int = LENGTH, idle: bool = False, **fields: Any
) -> GNNMoEModel:
    """Return a small model in float64; with ``idle`` it has a parameter that no loss depends on."""
    shape = {"embed_dim": 8, "num_heads": 2, "num_layers": 1, "num_experts": 3}
    config = GNNMoEConfig(vocab_size=vocabulary, max_seq_length=length, **{**shape, **fields})
    made = GNNMoEModel(config, seed=0).double()
    if idle:
        made.register_parameter("idle", nn.Parameter(torch.ones(2, 2, dtype=torch.float64)))
    return made


def batch(rank: int = 0, world_size: int = 1) -> Batch:
    """Return a rank's rows of a batch whose targets lie unevenly: the last rank's are nearly all ignored."""
    tokens = (torch.arange(ROWS * (LENGTH + 1)) ** 2 * 7).view(ROWS, -1) % VOCABULARY
    targets = tokens[:, 1:].clone()
    targets[5:] = IGNORED
    targets[4, 1:] = IGNORED
    whole = {"input_ids": tokens[:, :-1].contiguous(), "targets": targets}
    rows = ROWS // world_size
    return {name: value[rank * rows : (rank + 1) * rows] for name, value in whole.items()}


def gradients(ranks: Ranks, micro: int | None) -> tuple[Tensor, list[Tensor]]:
    """Return the nll and the gradients of the batch."""
    made = model().eval()
    loss = add_gradients(ranks.parallel(made), batch(ranks.rank, ranks.world_size), micro, [], ranks)
    return loss, [p.grad.clone() for p in made.parameters() if p.grad is not None]


def idle_parameter(ranks: Ranks) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of three steps, and the parameters after them, of a model with an idle one."""
    made, config = model(idle=True), TrainingConfig()
    optimizer, called, own = (
        make_optimizer(made, config),
        ranks.parallel(made),
        batch(ranks.rank, ranks.world_size),
    )
    losses = [float(training_step(called, own, optimizer, 1.0, ranks=ranks)[0]) for _ in range(3)]
    return losses, {name: value.detach() for name, value in made.named_parameters()}


def sums_of_gradients(ranks: Ranks) -> list[int]:
    """Return how often gradients were summed over the ranks in a step of 1, 2 and 4 pieces."""
    called, counts = ranks.parallel(model()), []
    assert isinstance(called, DistributedDataParallel)
    calls: list[int] = []

    def counted(state, bucket):  # torch refuses annotations as text
        calls.append(1)
        return allreduce_hook(state, bucket)

    called.register_comm_hook(None, counted)
    for micro in (4, 2, 1):
        calls.clear()
        add_gradients(called, batch(ranks.rank, ranks.world_size), micro, [], ranks)
        counts.append(len(calls))
    return counts


class Rows(list):
    """Hooks of a trainer that count with a ledger and keep the rows."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ledger = Ledger(ranks=ranks)

    def on_epoch(self, plan):
        self.ledger.begin_epoch(plan)

    def on_batch(self, batch):
        return self.ledger.batch(batch)

    def on_update(self, shapes):
        self.ledger.update(shapes)

    def after_epoch(self):
        self.ledger.end_epoch()

    def on_step(self, row):
        self.append(row)

    def on_evaluation(self, row):
        self.append(row)

    def after_step(self):
        pass


def train(ranks: Ranks, corpus: Corpus, dropout: float) -> dict[str, Any]:
    """Train six steps; return rows, seed of the dropout, parameters, ledger and the state's random states."""
    made = model(corpus.vocabulary.size, 16, dropout_rate=dropout)
    config = TrainingConfig(batch_size=4, max_steps=6, eval_every=3, warmup_steps=1, max_batches_per_epoch=4)
    share: dict[str, Any] = {"max_seq_length": 16, "rank": ranks.rank, "world_size": ranks.world_size}
    train, val = (create_loader(corpus, split, 4 // ranks.world_size, **share) for split in ("train", "val"))
    rows = Rows(ranks)
    trainer = Trainer(made, train, val, config, CPU, rows, ranks=ranks)
    trainer.run()
    return {
        "rows": list(rows), "seed": torch.initial_seed(), "ledger": rows.ledger.to_record(),
        "batch_shapes": rows.ledger.batch_shapes, "random": trainer.state_dict()["random"],
        "parameters": [p.detach() for p in made.parameters()],
    }  # fmt: skip


def evaluations(ranks: Ranks, corpus: Corpus) -> list[dict[str, Any]]:
    """Return evaluations of few windows at a stride that overlaps."""
    made, found = model(corpus.vocabulary.size, 16), []
    for windows in WINDOWS:
        loader = create_loader(corpus, "val", 2, max_seq_length=16, stride=8, num_samples=windows,
                               rank=ranks.rank, world_size=ranks.world_size)  # fmt: skip
        result = evaluate(made, loader, CPU, None, ranks)
        found.append(
            {"nll": torch.from_numpy(np.array(result.nll)), "sum": result.nll_sum, "tokens": result.tokens}
        )
    return found


def measured(ranks: Ranks) -> dict[str, Any]:
    """Return the speed of steps that take a second on rank 0 and two on rank 1, and the memory."""
    steps = TrainingSteps(model(), [batch(0, 2)], TrainingConfig(), 4 - 3 * ranks.rank, ranks)
    memory = speed_pass.peak_memory(steps, CPU)
    real = speed_pass.time_steps
    speed_pass.time_steps = lambda *_, steps, **__: StepTimes([1.0 + ranks.rank] * steps, [], False, None)
    try:
        found = speed_pass.measure_speed(steps, MeasureConfig(speed_steps=3), CPU)
    finally:
        speed_pass.time_steps = real
    durations = np.ones(60) if ranks.first else np.repeat(np.arange(1.0, 7.0), 10)
    ticks = iter(np.cumsum(np.stack([np.zeros(60), durations], axis=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.measure.timing.perf_counter", lambda: float(next(ticks)))
        until_steady = time_steps(lambda _: None, device=CPU, warmup="auto", steps=1, agree=ranks.largest)
    return {"speed": found.model_dump(), "memory": memory.model_dump(),
            "warmup_steps": until_steady.warmup.warmup_steps}  # fmt: skip


def refused() -> None:
    """Refuse the user."""
    raise Refused("the disk is full")


def words_of(function: Any) -> str:
    """Return the words of the ValueError that ``function`` raises."""
    try:
        return f"no error: {function()}"
    except ValueError as error:
        return str(error)


def agreements(ranks: Ranks, log: Path) -> dict[str, Any]:
    """Return what all ranks make of values that differ."""

    def write() -> int:
        with log.open("a") as file:
            file.write(f"{ranks.rank}\n")
        return ranks.rank

    return {
        "totals": ranks.totals([1, 10 * ranks.rank]), "any": [ranks.any(not ranks.first), ranks.any(False)],
        "gather": ranks.gather("ab"[ranks.rank]), "largest": ranks.largest(2.5 - ranks.rank),
        "worst": ranks.worst({"x": ranks.rank}, key=lambda found: found["x"]),
        "in_turn": ranks.in_turn(write), "from_first": ranks.from_first(lambda: f"from {ranks.rank}"),
        "first_refused": words_of(lambda: ranks.from_first(refused)),
        "second_refused": words_of(lambda: ranks.in_turn(lambda: None if ranks.first else refused())),
    }  # fmt: skip


def main(out: Path, data: Path) -> None:
    """Do everything as the rank that the environment names."""
    ranks = Ranks.join("cpu", 60.0)
    corpus = load_corpus(data_dir=data)
    found = {
        "gradients": [gradients(ranks, micro) for micro in (None, 2, 1)], "idle": idle_parameter(ranks),
        "sums": sums_of_gradients(ranks), "train": train(ranks, corpus, 0.0),
        "dropout": train(ranks, corpus, 0.5), "evaluations": evaluations(ranks, corpus),
        "measured": measured(ranks), "agreements": agreements(ranks, out / "log.txt"),
    }  # fmt: skip
    torch.save(found, out / f"{ranks.rank}.pt")
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
