"""The ledger: what was used is counted from the tensors and compared with the plan (A3, C5, C8, A9, A10)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from bench.config import TrainingConfig
from bench.data.corpus import load_corpus
from bench.data.loader import create_loader
from bench.measure.ledger import BatchAccountingError, Ledger
from bench.run.__main__ import main
from bench.training.evaluation import evaluate, merged
from bench.training.loop import EpochPlan, Trainer, TrainingPlan
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.head import IGNORED
from tests.bench._runs import Rows, only_run, refusal, results_of

CPU = torch.device("cpu")
PLAN = EpochPlan(epoch=0, batch_size=4, batches=2, samples=8, tokens=24)


@pytest.fixture
def corpus(small_data_dir):
    return load_corpus(data_dir=small_data_dir)


def batch(samples: int = 4, length: int = 3, ignored: int = 0) -> dict[str, torch.Tensor]:
    targets = torch.zeros(samples, length, dtype=torch.int64)
    targets.view(-1)[:ignored] = IGNORED
    return {"input_ids": torch.zeros(samples, length, dtype=torch.int64), "targets": targets}


def served(*batches: dict[str, torch.Tensor], tuned: int | None = None) -> Ledger:
    ledger = Ledger(tuned)
    ledger.begin_epoch(PLAN)
    for one in batches:
        ledger.batch(one)
        ledger.update()
    return ledger


def test_a3_an_epoch_as_planned_is_recorded_with_what_was_asked_and_got():
    ledger = served(batch(), batch(), tuned=4)
    ledger.end_epoch()
    counts = {"batches": 2, "samples": 8, "tokens": 24, "updates": 2}
    assert ledger.to_record()["epochs"] == [{"epoch": 0, "batch_size": 4, "asked": counts, "got": counts}]
    assert ledger.to_record()["tuned_micro_batch_size"] == 4
    assert ledger.batch_shapes == {"4x3": 2}


@pytest.mark.parametrize(
    ("wrong", "tuned", "said"),
    [
        ([batch()], 2, "epoch 0.*batch size 4 .micro-batch tuned to 2.*2 batches expected, 1 came"),
        ([batch()] * 3, None, "2 batches expected, 3 came"),
        ([batch(5)], None, "a batch of 5x3: batch size 4 .not tuned."),
        ([batch(4, 4)] * 2, None, "24 tokens expected, 32 came"),
        ([batch(ignored=2), batch()], None, "24 tokens expected, 22 came"),  # padding is no token
    ],
)
def test_a3_other_than_planned_is_an_error_with_what_was_expected_and_what_came(wrong, tuned, said):
    with pytest.raises(BatchAccountingError, match=said):
        served(*wrong, tuned=tuned).end_epoch()
    with pytest.raises(BatchAccountingError, match="2 batches expected, 1 came"):
        served(batch()).begin_epoch(EpochPlan(1, 4, 2, 8, 24))
    ledger = served(batch())
    ledger.batch(batch())
    with pytest.raises(BatchAccountingError, match="2 updates expected, 1 came"):
        ledger.end_epoch()


@pytest.mark.parametrize(
    ("wrong", "came"), [(lambda whole: whole[:-1], 31), (lambda whole: [*whole, [0, 1, 2, 3]], 33)]
)
def test_a3_the_training_stops_where_the_loader_loses_a_batch_or_yields_another(
    corpus, monkeypatch, wrong, came
):
    made = trainer(corpus, max_steps=None, epochs=1)
    sampler = type(made.train_loader.batch_sampler)
    whole = sampler.__iter__
    monkeypatch.setattr(sampler, "__iter__", lambda self: iter(wrong(list(whole(self)))))
    with pytest.raises(BatchAccountingError, match=f"32 batches expected, {came} came"):
        made.run()


def test_scoring_a_token_too_few_or_twice_is_an_error():
    ledger = Ledger()
    ledger.evaluated("validation", 100, 100)
    assert ledger.evaluations == {"validation": {"evaluations": 1, "asked": 100, "got": 100}}
    with pytest.raises(BatchAccountingError, match="100 targets were to be scored and 101 were"):
        ledger.evaluated("validation", 100, 101)


def trainer(corpus, loader=None, **settings) -> Any:
    config = TrainingConfig(**{"batch_size": 4, "warmup_steps": 1, "eval_every": 1000, **settings})
    model_config = GNNMoEConfig(
        coupler_type="mean", embed_dim=8, num_layers=1, max_seq_length=16, vocab_size=corpus.vocabulary.size
    )
    train = loader or create_loader(corpus, "train", config.batch_size, max_seq_length=16)
    val = create_loader(corpus, "val", 4, max_seq_length=16, num_samples=4)
    return Trainer(GNNMoEModel(model_config, seed=0), train, val, config, CPU, Rows())


def test_the_plan_places_every_step_in_its_epoch_and_adds_up(corpus):
    loader = create_loader(corpus, "train", 4, max_seq_length=16, batch_schedule="0:4,1:8")
    plan = TrainingPlan(loader, TrainingConfig(max_steps=77))
    places = {0: (0, 0), 31: (0, 31), 32: (1, 0), 47: (1, 15), 48: (2, 0), 76: (3, 12)}
    assert {step: plan.place(step) for step in places} == places
    epochs = [plan.epoch(number) for number in range(4)]
    assert [epoch.batches for epoch in epochs] == [32, 16, 16, 13]
    assert [epoch.tokens for epoch in epochs] == [32 * 64, 16 * 128, 16 * 128, 13 * 128]
    assert plan.epochs() == pytest.approx(3 + 13 / 16)


@pytest.mark.parametrize(("stride", "batch_size"), [(16, 3), (8, 3), (5, 1)])
def test_c5_every_token_is_scored_once_and_perplexity_does_not_depend_on_the_ranks(
    corpus, stride, batch_size
):
    model = trainer(corpus).model.double()
    found = {}
    for world in (1, 2, 3):
        loaders = [
            create_loader(
                corpus, "val", batch_size, max_seq_length=16, stride=stride, rank=rank, world_size=world
            )
            for rank in range(world)
        ]
        found[world] = merged([evaluate(model, loader, CPU) for loader in loaders])
        assert found[world].tokens == corpus.splits["validation"].num_tokens
    for world in (2, 3):
        np.testing.assert_allclose(found[world].nll, found[1].nll, rtol=1e-6)  # kept in float32
        assert found[world].nll_sum == pytest.approx(found[1].nll_sum, rel=1e-7)


def without_steps(flags: list[str]) -> list[str]:
    place = flags.index("--max-steps")
    return flags[:place] + flags[place + 2 :]


def test_a10_a_run_with_a_curriculum_records_its_pace_and_counts_every_epoch(tiny):
    flags = without_steps(tiny)
    flags += "--epochs 3 --curriculum rarity --curriculum-pacing linear --eval-every 100".split()
    assert main(["--coupler", "mean", *flags, "--warmup-steps", "1", "--batch-size", "2"]) == 0
    _, record = only_run(results_of(tiny))
    curriculum = record["data"]["training_blocks"]["curriculum"]
    blocks = record["data"]["training_blocks"]["count"]
    assert curriculum["order_source"] == "rarity"
    assert curriculum["blocks_by_epoch"] == [round(share * blocks) for share in (0.2, 0.6, 1.0)]
    got = [epoch["got"]["samples"] for epoch in record["used"]["ledger"]["epochs"]]
    assert got == [size - size % 2 for size in curriculum["blocks_by_epoch"]]
    assert record["used"]["steps"] == sum(size // 2 for size in got)


@pytest.mark.slow
def test_a9_a_missing_difficulty_model_falls_back_loudly_or_is_refused(tiny, tmp_path, capsys):
    flags = without_steps(tiny)
    flags += "--coupler mean --epochs 2 --curriculum model:nowhere.pt --batch-size 2".split()
    assert "nowhere.pt is not there" in refusal(capsys, [*flags, "--strict-curriculum"])
    assert not (tmp_path / "results").exists()
    assert main(flags) == 0
    assert capsys.readouterr().err.count("nowhere.pt is not there") == 1
    curriculum = only_run(results_of(tiny))[1]["data"]["training_blocks"]["curriculum"]
    assert curriculum["order_source"] == "random_fallback"


def test_c7_labels_that_are_not_shifted_inputs_are_wrong_input_and_nothing_is_written(
    tiny, tmp_path, monkeypatch, capsys
):
    from bench.data.blocks import TrainBlocks

    whole = TrainBlocks.__getitems__

    def unshifted(self, indices):
        batch = whole(self, indices)
        return {**batch, "targets": batch["input_ids"].clone()}

    monkeypatch.setattr(TrainBlocks, "__getitems__", unshifted)
    assert "fails the check 'shift'" in refusal(capsys, ["--coupler", "mean", *tiny])
    assert not (tmp_path / "results").exists()


def test_the_counts_go_on_after_a_checkpoint():
    first = served(batch())
    second = Ledger()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.begin_epoch(PLAN)
    second.batch(batch())
    second.update()
    second.end_epoch()
    assert second.to_record()["training"]["samples"] == {"asked": 8, "got": 8}
    assert second.batch_shapes == {"4x3": 2}


def test_c8_the_schedule_of_batch_sizes_is_what_the_ledger_sees(corpus):
    loader = create_loader(corpus, "train", 4, max_seq_length=16, batch_schedule="0:4,1:8,3:16")
    made = trainer(corpus, loader, max_steps=None, epochs=4, max_batches_per_epoch=2)
    made.run()
    epochs = made.hooks.ledger.to_record()["epochs"]
    assert [epoch["batch_size"] for epoch in epochs] == [4, 8, 8, 16]
    assert [epoch["got"]["samples"] for epoch in epochs] == [8, 16, 16, 32]
    rows = [row for row in made.hooks if row["kind"] == "train"]  # pyright: ignore
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
