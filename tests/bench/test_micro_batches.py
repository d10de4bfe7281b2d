"""Micro-batches (B13): loss and gradient of the pieces are those of the batch."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.config import TrainingConfig
from bench.measure.ledger import BatchAccountingError, Ledger
from bench.training.evaluation import evaluate
from bench.training.loop import EpochPlan
from bench.training.step import add_gradients, make_optimizer, split, training_step
from bench.tune.control import next_smaller
from bench.tune.find import refuse_uneven_pieces
from bench.tune.search import divisors
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.head import IGNORED

ROWS, LENGTH, VOCABULARY = 6, 8, 40


def model(coupler: str = "HGNN", **fields) -> GNNMoEModel:
    shape = {"embed_dim": 8, "num_heads": 2, "num_layers": 2, "max_seq_length": LENGTH}
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        config = GNNMoEConfig(vocab_size=VOCABULARY, coupler_type=coupler, **{**shape, **fields})
        return GNNMoEModel(config, seed=0).double()
    finally:
        torch.set_default_dtype(before)


def batch(ignored: bool = False) -> dict[str, torch.Tensor]:
    tokens = (torch.arange(ROWS * (LENGTH + 1)) ** 2 * 7).view(ROWS, -1) % VOCABULARY
    targets = tokens[:, 1:].clone()
    if ignored:
        targets[0, 3:] = IGNORED
        targets[1, :1] = IGNORED
        targets[4:] = IGNORED  # a whole piece of two rows
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": targets}


def gradients(made: GNNMoEModel, data, size: int | None) -> tuple[torch.Tensor, list[torch.Tensor], list]:
    shapes: list[tuple[int, ...]] = []
    made.zero_grad()
    loss = add_gradients(made, data, size, shapes)
    return loss, [p.grad.clone() for p in made.parameters() if p.grad is not None], shapes


@pytest.mark.parametrize(
    ("coupler", "size", "ignored"),
    [("HGNN", 1, False), ("HGNN", 2, True), ("mean", 3, True), ("mean", 4, False), ("topk", 5, True)],
)
def test_b13_loss_and_gradient_of_the_pieces_are_those_of_the_batch(coupler, size, ignored):
    """In float64 to 1e-10, also where the pieces have unequal numbers of targets, or none."""
    made, data = model(coupler).eval(), batch(ignored)  # eval: no router losses
    whole, expected, shapes = gradients(made, data, None)
    assert shapes == [(ROWS, LENGTH)]
    loss, found, shapes = gradients(made, data, size)
    assert shapes == [(len(rows), LENGTH) for rows in torch.arange(ROWS).split(size)]
    assert float(loss) == pytest.approx(float(whole), rel=1e-10, abs=0)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_b13_router_losses_count_by_the_targets_of_their_piece():
    made, data = model("topk").train(), batch(ignored=True)
    pieces = split(data, 2)
    made.zero_grad()
    counts = [int((p["targets"] != IGNORED).sum()) for p in pieces]
    total = 0.0
    for piece, count in zip(pieces, counts, strict=True):
        if count:
            output = made(piece["input_ids"], targets=piece["targets"])
            total = total + (output["loss"] + output["auxiliary_loss"]) * count / sum(counts)
    torch.as_tensor(total).backward()
    expected = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    for a, b in zip(gradients(made, data, 2)[1], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [None, ROWS + 1])
def test_b13_an_unsplit_batch_is_what_it_was_bit_for_bit(size):
    made, data = model(dropout_rate=0.2).float(), batch()
    twin = copy.deepcopy(made)
    torch.manual_seed(1)
    loss, found, _ = gradients(made, data, size)
    torch.manual_seed(1)
    output = twin(data["input_ids"], targets=data["targets"], return_logits=False)
    (output["loss"] + output["auxiliary_loss"]).backward()
    assert torch.equal(loss, output["loss"])
    expected = [p.grad for p in twin.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("sizes", "micro", "world", "said"),
    [
        ([16], 5, 1, "does not divide the batch of 16; the nearest that does is 4"),
        ([16], 40, 1, "the nearest that does is 16"),
        ([16, 24], 16, 1, "the batch of 16 and 24; the nearest that does is 8"),
        ([12], 5, 2, "the batch of 12 on 2 ranks; the nearest that does is 6"),
        ([9], 3, 2, "cannot be shared evenly by 2 ranks"),
    ],
)
def test_b13_a_micro_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(
    sizes, micro, world, said
):
    with pytest.raises(ValueError, match=said):
        refuse_uneven_pieces(sizes, micro, world)
    refuse_uneven_pieces([12, 24], 3, 2)
    assert [divisors(number) for number in (1, 7, 12)] == [[1], [1, 7], [1, 2, 3, 4, 6, 12]]


def test_a7_the_ledger_counts_the_pieces_and_refuses_others_than_the_batch():
    """D1: what was run at once is read from the tensors' shapes."""
    ledger = Ledger()
    ledger.begin_epoch(EpochPlan(epoch=0, batch_size=ROWS, batches=2, samples=12, tokens=96))
    ledger.batch(batch())
    ledger.update([(2, LENGTH)] * 3)
    assert ledger.micro_batch_shapes == {"2x8": 3}
    ledger.batch(batch())
    message = "a batch of 6 rows was served, but its micro-batches hold 4"
    with pytest.raises(BatchAccountingError, match=message):
        ledger.update([(2, LENGTH)] * 2)
    again = Ledger()
    again.load_state_dict(ledger.state_dict())
    assert again.micro_batch_shapes == {"2x8": 3}


def test_an_evaluation_in_pieces_scores_the_same_targets():
    made, loader = model(), [batch(), batch(ignored=True)]
    whole = evaluate(made, loader, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    pieces = evaluate(made, loader, torch.device("cpu"), 4)  # pyright: ignore[reportArgumentType]
    assert whole.tokens == pieces.tokens
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-6)


def test_d7_the_next_smaller_micro_batch_is_a_divisor_of_half_or_less():
    assert [next_smaller(12, size) for size in (12, 6, 4, 3, 2, 1)] == [6, 3, 2, 1, 1, None]
    assert next_smaller(7, 7) == 1


def test_b13_a_step_in_pieces_is_the_step_of_the_batch():
    settings, data = TrainingConfig(), batch(ignored=True)
    one, other = model(), model()
    optimizers = [make_optimizer(made, settings) for made in (one, other)]
    for _ in range(3):
        whole = training_step(one, data, optimizers[0], 0.05)
        pieces = training_step(other, data, optimizers[1], 0.05, 2)
        for a, b in zip(whole, pieces, strict=True):
            assert float(a) == pytest.approx(float(b), rel=1e-9)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)  # Adam divides by small second moments


def test_b13_it_is_not_a_mean_of_means():
    made, data = model().eval(), batch(ignored=True)
    loss = gradients(made, data, 2)[0]
    means = [made(p["input_ids"], targets=p["targets"])["loss"] for p in split(data, 2)[:2]]
    assert abs(float(torch.stack(means).mean().detach()) - float(loss)) > 1e-4
