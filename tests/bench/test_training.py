"""The schedule, the steps, the evaluation and the best state, against numbers worked out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import bench.training.loop
from bench.config import TrainingConfig
from bench.data.corpus import load_corpus
from bench.data.loader import create_loader
from bench.training.evaluation import CommunicationTrace, evaluate
from bench.training.loop import Diverged, Trainer, TrainingPlan
from bench.training.step import learning_rate, make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel
from tests.bench._runs import Rows

CPU = torch.device("cpu")
CONVOLUTIONS = ("HypergraphConv PyGHypergraphConv HGNNConv HNHN HypergraphAttention AllDeepSets"
                " AllSetTransformer EDHNN").split()  # fmt: skip


@pytest.fixture
def corpus(small_data_dir):
    return load_corpus(data_dir=small_data_dir)


@pytest.fixture
def model(corpus):
    config = GNNMoEConfig(
        embed_dim=8, num_layers=1, max_seq_length=16, num_experts=3, vocab_size=corpus.vocabulary.size
    )
    return GNNMoEModel(config, seed=0)


def trainer(model, corpus, **settings) -> Trainer:
    config = TrainingConfig(
        **{"batch_size": 4, "max_steps": 6, "eval_every": 2, "warmup_steps": 1, **settings}
    )
    train = create_loader(corpus, "train", config.batch_size, max_seq_length=16)
    val = create_loader(corpus, "val", 4, max_seq_length=16)
    return Trainer(model, train, val, config, CPU, Rows())


def test_the_rate_warms_up_and_ends_at_its_share():
    config = TrainingConfig(learning_rate=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(step, 11, config) for step in range(11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way down the cosine
    assert rates[10] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 120), ({"max_steps": 7}, 7), ({"epochs": 2}, 100),
        ({"epochs": 2, "max_batches_per_epoch": 9}, 18),
        ({"epochs": 2, "max_steps": 30}, 30), ({"max_batches_per_epoch": 9}, 120),
    ],
)  # fmt: skip
def test_how_many_steps_a_run_has(corpus, settings, expected):
    loader = create_loader(corpus, "train", 2, max_seq_length=16, num_samples=100)
    config = TrainingConfig(min_steps_per_epoch=1, **settings)
    assert TrainingPlan(loader, config).total_steps == expected


def test_weight_decay_is_for_matrices_only(model):
    decayed, plain = make_optimizer(model, TrainingConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert min(p.ndim for p in decayed["params"]) == 2
    assert max(p.ndim for p in plain["params"]) == 1
    assert sum(p.numel() for group in (decayed, plain) for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_a_step_is_a_clipped_adamw_step(model, corpus):
    """One step, against the same written out with torch's parts."""
    batch = next(iter(create_loader(corpus, "train", 4, max_seq_length=16)))
    config = TrainingConfig(max_grad_norm=0.01)
    twin = GNNMoEModel(model.config, seed=0)
    loss, norm = training_step(model, batch, make_optimizer(model, config), config.max_grad_norm)
    expected = twin(batch["input_ids"], targets=batch["targets"])["loss"]
    expected.backward()
    squares = sum(p.grad.square().sum() for p in twin.parameters())  # pyright: ignore
    assert float(loss) == pytest.approx(expected.item())
    assert float(norm) == pytest.approx(float(squares) ** 0.5, rel=1e-5)
    clipped = sum(p.grad.square().sum() for p in model.parameters())  # pyright: ignore
    assert float(clipped) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    bias, start = model.head.bias, twin.head.bias
    moved = (bias - start).abs()[twin.head.bias.grad.abs() > 1e-6]  # pyright: ignore
    assert moved.max() <= config.learning_rate * 1.01  # Adam's first step has the size of the rate
    assert moved.min() >= config.learning_rate * 0.9


def test_epochs_see_every_block_once_in_another_order(model, corpus, monkeypatch):
    seen: list[torch.Tensor] = []
    made = trainer(model, corpus, max_steps=None, epochs=2, eval_every=1000)
    monkeypatch.setattr(
        "bench.training.loop.training_step",
        lambda model, batch, *_: (seen.append(batch["input_ids"]), (torch.tensor(1.0), torch.tensor(1.0)))[1],
    )
    done = made.run()
    per_epoch = len(made.train_loader)
    assert (done.steps, len(seen)) == (2 * per_epoch, 2 * per_epoch)
    first, second = torch.cat(seen[:per_epoch]), torch.cat(seen[per_epoch:])
    assert len(torch.unique(first, dim=0)) == len(first)
    assert not torch.equal(first, second)
    totals = made.hooks.ledger.totals()  # pyright: ignore[reportAttributeAccessIssue]
    assert totals["tokens"] == dict.fromkeys(("asked", "got"), sum(batch.numel() for batch in seen))


def test_training_ends_with_the_state_that_was_best(model, corpus):
    made = trainer(model, corpus, max_steps=8)
    keep_row = made.hooks.on_step

    def spoil(row):
        keep_row(row)
        if row["step"] == 5:
            with torch.no_grad():
                model.token_embedding.weight.mul_(-30.0)

    made.hooks.on_step = spoil  # pyright: ignore[reportAttributeAccessIssue]
    done = made.run()
    rows = [row for row in made.hooks if row["kind"] == "validation"]  # pyright: ignore
    sums = {row["step"]: row["nll_sum"] for row in rows}
    assert list(sums) == [2, 4, 6, 8]
    best = min(sums, key=lambda step: sums[step])
    assert best in (2, 4)
    assert done.best_step == best
    again = evaluate(model, made.val_loader, CPU)
    assert again.nll_sum == pytest.approx(sums[best], rel=1e-6)


def test_an_evaluation_sums_every_target_once_in_float64(model, corpus):
    loader = create_loader(corpus, "val", 3, max_seq_length=16, stride=8, num_samples=5)
    result = evaluate(model.train(), loader, CPU)
    assert model.training
    assert result.tokens == 5 * 16 == len(result.nll)
    expected = 0.0
    model.eval().requires_grad_(False)
    for batch in loader:
        logits = model(batch["input_ids"])["logits"].double()
        for row, targets in zip(logits, batch["targets"], strict=True):
            kept = targets >= 0
            expected -= float(row.log_softmax(-1)[kept, targets[kept]].sum())
    assert result.nll_sum == pytest.approx(expected, rel=1e-6)


def test_a_trace_keeps_copies_over_time(model):
    trace = CommunicationTrace(torch.arange(12).view(2, 6))
    trace.sample(0, model)
    with torch.no_grad():
        model.layers[0].coupler.hyperedge_weights.add_(1.0)
    trace.sample(5, model)
    arrays = trace.arrays()
    assert arrays["step"].tolist() == [0, 5]
    raised = math.log1p(math.exp(math.log(math.e - 1) + 1.0))
    assert arrays["layer_0.hyperedge_weights"][:, 0] == pytest.approx([1.0, raised], rel=1e-6)
    assert arrays["layer_0.mixing"].shape == (2, 3)
    assert arrays["layer_0.mixing"].sum(1) == pytest.approx([1.0, 1.0], rel=1e-5)


def test_on_cuda_a_loss_is_read_while_the_next_step_runs(model, corpus, monkeypatch):
    """And all are told, in order, before an evaluation, before a checkpoint and at the end."""
    twin, order = copy.deepcopy(model), []
    expected = trainer(model, corpus, max_steps=5, eval_every=4)
    made = trainer(twin, corpus, max_steps=5, eval_every=4)
    made._late = True  # as on CUDA
    step = bench.training.loop.training_step
    counted = lambda *args: order.append(made.done.steps + 1) or step(*args)  # noqa: E731
    monkeypatch.setattr("bench.training.loop.training_step", counted)
    keep_row = made.hooks.on_step
    made.hooks.on_step = lambda row: order.append(-row["step"]) or keep_row(row)  # pyright: ignore
    made.run()
    assert order == [1, 2, -1, 3, -2, 4, -3, -4, 5, -5]
    expected.run()
    assert list(made.hooks) == list(expected.hooks)  # pyright: ignore[reportArgumentType]
    made.done.steps, made._unread = 6, ({"step": 5}, torch.tensor(math.nan), torch.tensor(1.0))
    with pytest.raises(Diverged, match="training loss is nan at step 5"):
        made.state_dict()


def test_dropout_follows_the_seed(corpus):
    config = GNNMoEConfig(embed_dim=8, num_layers=1, max_seq_length=16, dropout_rate=0.3,
                          vocab_size=corpus.vocabulary.size)  # fmt: skip
    losses = []
    for seed in (0, 0, 1):
        made = trainer(GNNMoEModel(config, seed=0), corpus, max_steps=3, seed=seed)
        torch.manual_seed(len(losses))  # what came before must not matter
        made.run()
        losses.append([row["loss"] for row in made.hooks if row["kind"] == "train"])  # pyright: ignore
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("conv_type", [
    pytest.param(name, marks=[pytest.mark.slow] * (name != "HNHN"))
    for name in CONVOLUTIONS
])  # fmt: skip
def test_a_trace_holds_weights_adjacency_and_mixing_of_every_hypergraph_layer(conv_type):
    made = GNNMoEModel(
        GNNMoEConfig(hgnn_conv_type=conv_type, embed_dim=8, max_seq_length=6, vocab_size=50), 0
    )
    trace = CommunicationTrace(torch.arange(12).view(2, 6))
    for step in (0, 1):
        trace.sample(step, made)
    arrays = trace.arrays()
    for layer in ("layer_0", "layer_1"):
        assert arrays[f"{layer}.hyperedge_weights"].shape == (2, 6)
        assert arrays[f"{layer}.adjacency"].shape == (2, 4, 4)
        assert arrays[f"{layer}.mixing"].shape == (2, 4)
