"""Out of memory in training (D7): the same batch again in smaller micro-batches, nothing skipped."""

from __future__ import annotations

import math

import pytest
import torch

import bench.training.loop
from bench.config import TrainingConfig
from bench.data.corpus import load_corpus
from bench.data.loader import create_loader
from bench.run.__main__ import main
from bench.training.loop import Trainer, TrainingPlan
from bench.training.step import UpdateOutOfMemory
from bench.tune.control import ControlledSteps, Recovery
from gnnmoe import GNNMoEConfig, GNNMoEModel
from tests.bench._runs import Rows, act_at_step, interrupt, only_run, results_of

pytestmark = pytest.mark.core("recovery")
CPU = torch.device("cpu")


@pytest.fixture
def corpus(small_data_dir):
    return load_corpus(data_dir=small_data_dir)


def trainer(corpus, micro: int | None = None, **settings) -> Trainer:
    model = GNNMoEConfig(embed_dim=8, num_layers=1, max_seq_length=16, num_experts=3, dropout_rate=0.2,
                         vocab_size=corpus.vocabulary.size)  # fmt: skip
    config = TrainingConfig(
        **{"batch_size": 8, "max_steps": 4, "eval_every": 2, "warmup_steps": 1, **settings}
    )
    train = create_loader(corpus, "train", config.batch_size, max_seq_length=16,
                          batch_schedule=config.batch_schedule)  # fmt: skip
    val = create_loader(corpus, "val", 4, max_seq_length=16)
    made = GNNMoEModel(model, seed=0)
    unit = math.gcd(*TrainingPlan(train, config).batch_sizes())
    steps = ControlledSteps(made, unit, CPU, micro)
    return Trainer(made, train, val, config, CPU, Rows(), steps=steps)


def run_out(made: Trainer, fits: int, calls: list[int], at: int = 0) -> None:
    """Let the model run out of memory on more rows than fit, from its forward number ``at`` on."""

    def before(_, arguments):
        calls.append(len(arguments[0]))
        if made.model.training and len(arguments[0]) > fits and len(calls) > at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    made.model.register_forward_pre_hook(before)


def recoveries_of(made: Trainer) -> list[Recovery]:
    assert isinstance(made.steps, ControlledSteps)
    return made.steps.recoveries


def rows(made: Trainer, kind: str) -> list[dict]:
    return [row for row in made.hooks if row["kind"] == kind]  # pyright: ignore


def same(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.state_dict()["model"].values(), other.state_dict()["model"].values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and rows(one, "train") == rows(other, "train")


def test_d7_the_same_batches_are_done_again_in_smaller_pieces_and_nothing_is_skipped(corpus):
    """From the first step on: bit for bit the training that had this micro-batch, dropout included."""
    recovered, expected, calls = trainer(corpus), trainer(corpus, micro=2), []
    run_out(recovered, fits=2, calls=calls)
    recovered.run()
    expected.run()
    assert calls[:6] == [8, 4, 2, 2, 2, 2]
    assert same(recovered, expected)
    assert [r.micro_batch_size for r in recoveries_of(recovered)] == [4, 2]
    assert [r.failed_micro_batch_size for r in recoveries_of(recovered)] == [8, 4]
    assert {r.step for r in recoveries_of(recovered)} == {1}
    ledger = recovered.hooks.ledger  # pyright: ignore
    assert ledger.micro_batch_shapes == {"2x16": 16}, "what ran to its end, not what was tried"
    assert ledger.totals()["updates"]["got"] == 4
    assert ledger.totals()["samples"]["got"] == 32


def test_d7_gradients_of_pieces_before_the_failing_one_are_not_counted_twice(corpus):
    """The third piece of the first step fails; what the first two left must be gone."""
    recovered, expected, calls = trainer(corpus, micro=2), trainer(corpus, micro=1), []
    run_out(recovered, fits=1, calls=calls, at=2)
    recovered.run()
    expected.run()
    assert calls[:4] == [2, 2, 2, 1]
    assert same(recovered, expected)


def test_d7_retries_are_bounded_and_no_step_is_half_applied(corpus):
    made, calls = trainer(corpus), []
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    run_out(made, fits=0, calls=calls)
    with pytest.raises(torch.OutOfMemoryError, match="step 1 does not fit in micro-batches of 1"):
        made.run()
    assert calls == [8, 4, 2, 1]
    assert all(torch.equal(before[name], value) for name, value in made.model.state_dict().items())
    assert not made.optimizer.state
    assert made.done.steps == 0


def test_d7_an_update_that_ran_out_of_memory_is_never_repeated(corpus, monkeypatch):
    """It may be half done: parameters moved in part, moments made in part."""
    made, updates = trainer(corpus), []

    def step(*_):
        updates.append(1)
        raise torch.OutOfMemoryError("no room for the moments")

    monkeypatch.setattr(made.optimizer, "step", step)
    with pytest.raises(UpdateOutOfMemory, match="in the optimizer's update: no room for the moments"):
        made.run()
    assert updates == [1]
    assert recoveries_of(made) == []


@pytest.fixture
def small_card(monkeypatch) -> None:
    """Let training steps run out of memory on more than two rows at once."""
    real = bench.training.loop.training_step

    def step(model, batch, optimizer, norm, micro, shapes, ranks):
        if (micro or len(batch["input_ids"])) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, optimizer, norm, micro, shapes, ranks)

    monkeypatch.setattr(bench.training.loop, "training_step", step)


def test_d7_everything_is_in_the_record_and_it_is_said_once(tiny, small_card, capsys):
    """E3: asked and used stand side by side, in the record and in the final table."""
    assert main([*tiny, "--no-speed", "--batch-size", "8"]) == 0
    _, record = only_run(results_of(tiny))
    used = record["used"]
    assert record["status"] == "ok"
    assert record["requested"]["batch_size"] == 8
    assert used["batch_sizes"] == [8]
    assert (used["micro_batch_size"], used["accumulation"]) == (2, 4)
    assert used["micro_batch_shapes"] == {"2x16": 16}
    assert used["ledger"]["training"]["updates"] == {"asked": 4, "got": 4}
    steps = [(r["step"], r["failed_micro_batch_size"], r["micro_batch_size"]) for r in used["recoveries"]]
    assert steps == [(1, 8, 4), (1, 4, 2)]
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("ran out of memory") == 1
    assert "note: step 1 ran out of memory: this batch and the following batches run in micro-b" in printed
    assert "as 16 micro-batches of 2 × 16; at the end 4 micro-batches of 2 per update;" in printed
    assert "memory ran out 2 times" in printed


def test_d7_a_schedule_that_is_cut_off_early_has_one_unit(tiny, small_card):
    """Three steps, of the first size: what a recovery may run is what a controller may."""
    schedule = "--coupler mean --batch-size 4 --batch-schedule 0:4,3:6 --epochs 2 --max-steps 3"
    assert main([*tiny, "--no-speed", "--control-memory", *schedule.split()]) == 0
    _, record = only_run(results_of(tiny))
    (size,) = record["used"]["batch_sizes"]
    assert record["used"]["micro_batch_shapes"] == {"2x16": 3 * size // 2}
    assert record["used"]["recoveries"][-1]["micro_batch_size"] == 2
    assert [(one["reason"], one["to_rows"]) for one in record["used"]["control"]] == [("out of memory", 2)]


def test_d7_a_resumed_run_goes_on_with_its_smaller_pieces(tiny, small_card, monkeypatch):
    flags = [*tiny, "--no-speed", "--batch-size", "8"]
    steps = act_at_step(monkeypatch, 6, interrupt)  # two attempts that failed, then the fourth step
    assert main(flags) == 130
    assert main([*flags, "--resume"]) == 0
    assert steps == [None, 4, 2, 2, 2, 2, 2, 2]
    _, record = only_run(results_of(tiny))
    assert len(record["used"]["recoveries"]) == 2
    assert record["used"]["micro_batch_shapes"] == {"2x16": 16}


def test_d7_later_steps_alone_are_split(corpus):
    recovered, plain = trainer(corpus), trainer(corpus)
    run_out(recovered, fits=4, calls=[], at=2)  # two steps and an evaluation are whole
    recovered.run()
    plain.run()
    ours, theirs = rows(recovered, "train"), rows(plain, "train")
    assert [recovery.step for recovery in recoveries_of(recovered)] == [3]
    assert ours[:2] == theirs[:2]
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    assert recovered.hooks.ledger.micro_batch_shapes == {"8x16": 2, "4x16": 4}  # pyright: ignore


def test_d7_a_schedule_s_batches_are_all_divided(corpus):
    made = trainer(
        corpus, batch_size=8, batch_schedule="0:8,1:12", max_steps=None, epochs=2, max_batches_per_epoch=2
    )
    run_out(made, fits=4, calls=[])
    made.run()
    assert made.steps.micro_batch_size == 4
    assert set(made.hooks.ledger.micro_batch_shapes) == {"4x16"}  # pyright: ignore
