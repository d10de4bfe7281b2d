"""What each of two gloo processes does for ``test_ranks.py``, under one torchrun; the results go into a file.

Each process first makes whole runs, then calls single parts. The test imports the parts too: it calls them in
one process and compares.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.rendezvous import rendezvous as real_rendezvous
from torch.nn.parallel import DistributedDataParallel

from bench.config import MeasureConfig, TrainingConfig
from bench.data.corpus import Corpus, load_corpus
from bench.data.loader import create_loader
from bench.measure import speed_pass
from bench.measure.timing import StepTimes, TrainingSteps, time_steps
from bench.run.__main__ import main as run_main
from bench.training import loop
from bench.training import ranks as ranks_module
from bench.training.evaluation import evaluate
from bench.training.loop import Trainer
from bench.training.ranks import Ranks
from bench.training.step import Batch, add_gradients, make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.config import Refused
from gnnmoe.head import IGNORED
from tests.bench._runs import Rows

CPU, ROWS, LENGTH, VOCABULARY = torch.device("cpu"), 8, 8, 40
WINDOWS = (1, 7)  # to evaluate: fewer than ranks, and an odd number
FLAGS = (
    "--embed-dim 8 --num-heads 2 --num-layers 1 --max-seq-length 16 --batch-size 4 --warmup-steps 1"
    " --speed-warmup-steps 1 --speed-steps 2 --num-eval-samples 7 --no-plots"
).split()
SHORT = [*FLAGS, *"--max-steps 6 --eval-every 3 --micro-batch-size 1 --evaluate-test".split()]
DROPOUT = [*FLAGS, *"--max-steps 12 --eval-every 6 --dropout-rate 0.1 --quiet".split()]
STOPPED_AFTER, FAILED_AFTER = 3, 3


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
    optimizer, called = make_optimizer(made, config), ranks.parallel(made)
    own = batch(ranks.rank, ranks.world_size)
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


def train(ranks: Ranks, corpus: Corpus) -> dict[str, Any]:
    """Train six steps; return rows, seed of the dropout, parameters and the state's random states."""
    made = model(corpus.vocabulary.size, 16, dropout_rate=0.5)
    config = TrainingConfig(batch_size=4, max_steps=6, eval_every=3, warmup_steps=1, max_batches_per_epoch=4)
    share: dict[str, Any] = {"max_seq_length": 16, "rank": ranks.rank, "world_size": ranks.world_size}
    train, val = (create_loader(corpus, split, 4 // ranks.world_size, **share) for split in ("train", "val"))
    rows = Rows(ranks=ranks)
    trainer = Trainer(made, train, val, config, CPU, rows, ranks=ranks)
    trainer.run()
    return {
        "rows": list(rows), "seed": torch.initial_seed(), "random": trainer.state_dict()["random"],
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


def own_keys(attempt: int) -> None:
    """Give each attempt its own keys in torchrun's store, which keeps those of the attempts before."""

    def rendezvous(*arguments: Any, **options: Any) -> Any:
        for store, *rest in real_rendezvous(*arguments, **options):
            yield PrefixStore(str(attempt), store), *rest

    ranks_module.rendezvous = rendezvous


def run(flags: list[str], data: Path, results: Path, attempt: int) -> dict[str, Any]:
    """Make a whole run; return its exit status, what it printed and its record, which only rank 0 reads."""
    own_keys(attempt)
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            status: Any = run_main([*flags, "--data-dir", str(data), "--results-dir", str(results)])
        except SystemExit as end:
            status = end.code
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    found = list(results.glob("*/*/record.json")) if os.environ["RANK"] == "0" else []
    record = json.loads(found[0].read_text()) if found else None
    return {"status": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue(), "record": record}


def on_rank_1(after: int, action: Callable[[], object]) -> pytest.MonkeyPatch:
    """Do ``action`` on rank 1 before its step number ``after`` + 1."""
    real, steps = loop.training_step, []

    def step(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == after + 1 and os.environ["RANK"] == "1":
            action()
        return real(*arguments, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "training_step", step)
    return patch


def stop() -> None:
    """Send the signal that stops a run."""
    os.kill(os.getpid(), signal.SIGTERM)


def run_out_of_memory() -> None:
    """Fail as a GPU that is full does."""
    raise torch.OutOfMemoryError("memory ran out, for the test's sake")


def runs(out: Path, data: Path) -> dict[str, dict[str, Any]]:
    """Make every whole run, each into its own folder of results."""
    found = {
        "two": run(SHORT, data, out / "two", 0),
        "undisturbed": run(DROPOUT, data, out / "undisturbed", 1),
    }
    patch = on_rank_1(STOPPED_AFTER, stop)
    found["stopped"] = run(DROPOUT, data, out / "stopped", 2)
    patch.undo()
    if os.environ["RANK"] == "0":
        shutil.copytree(out / "stopped", out / "left as stopped")
    found["continued"] = run([*DROPOUT, "--resume"], data, out / "stopped", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.cli.OTHERS_WAIT_SECONDS", 0.0)
        found["refused"] = run([*FLAGS, "--batch-size", "5"], data, out / "refused", 4)
    patch = on_rank_1(FAILED_AFTER, run_out_of_memory)
    found["failed"] = run(DROPOUT, data, out / "failed", 5)
    patch.undo()
    return found


def main(out: Path, data: Path) -> None:
    """Do everything as the rank that torchrun names."""
    whole = runs(out, data)
    own_keys(6)
    ranks = Ranks.join("cpu", 60.0)
    corpus = load_corpus(data_dir=data)
    found = {
        "runs": whole,
        "gradients": [gradients(ranks, micro) for micro in (None, 2, 1)], "idle": idle_parameter(ranks),
        "sums": sums_of_gradients(ranks), "dropout": train(ranks, corpus),
        "evaluations": evaluations(ranks, corpus),
        "measured": measured(ranks), "agreements": agreements(ranks, out / "log.txt"),
    }  # fmt: skip
    torch.save(found, out / f"{ranks.rank}.pt")
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
