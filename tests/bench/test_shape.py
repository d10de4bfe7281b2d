"""Shapes and their proof (D1, D5), the fit before training (D4), and what counts as speed (D6)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from bench.config import TrainingConfig
from bench.training.step import split
from bench.tune.__main__ import main as tune
from bench.tune.control import ReportedUsedMismatch, cut, require_used, witnessed
from bench.tune.search import Found, NoFeasibleBatch, Shape, Trial, ladder, search
from bench.tune.trials import ParametersNotApplied, Request, TrialSetup, require_batch_applied, search_here
from gnnmoe import GNNMoEConfig, GNNMoEModel
from tests.bench._fake_memory import FakeMemory

CPU = torch.device("cpu")
CONFIG = GNNMoEConfig(embed_dim=16, num_layers=1, num_heads=2, max_seq_length=32, vocab_size=64)
SHAPES = ladder([*range(16, 64, 8), 64], [1, 2, 3, 4, 6, 12])


def batch(rows: int = 4, length: int = 16) -> dict[str, torch.Tensor]:
    tokens = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def test_d8_the_ladder_grows_length_first_then_rows():
    steps = ladder([32, 16, 64], [4, 1, 2])
    assert [str(shape) for shape in steps] == ["1 × 16", "1 × 32", "1 × 64", "2 × 64", "4 × 64"]
    tokens = [shape.tokens for shape in SHAPES]
    assert tokens == sorted(set(tokens))


def test_d3_a_batch_cut_shorter_holds_the_same_tokens_and_targets():
    whole = batch(3, 16)
    for length in (16, 8, 4, 1):
        parts = cut(whole, length)
        assert parts["input_ids"].shape == (3 * 16 // length, length)
        for name in whole:
            assert torch.equal(parts[name].flatten(), whole[name].flatten())
    with pytest.raises(ValueError, match="length 16 cannot be cut into sequences of 5"):
        cut(whole, 5)


@pytest.mark.parametrize(
    ("said", "micro", "length", "caught"),
    [
        (Shape(2, 16), 2, 16, False),
        (Shape(9, 16), None, 16, False),  # a batch has no more rows than it has
        (Shape(2, 8), 2, 8, False),
        (Shape(2, 16), 4, 16, True),  # the number was kept, the batch was run whole
        (Shape(4, 16), 2, 16, True),
        (Shape(2, 8), 2, 16, True),  # the length was kept, the batch was not cut
    ],
)
def test_d1_what_is_reported_is_held_against_the_tensors_that_the_model_saw(said, micro, length, caught):
    """D1: at the model's own door, so that no list of shapes has to be believed."""
    model, data = GNNMoEModel(CONFIG, seed=0), cut(batch(), length)
    with witnessed(model) as seen:
        for part in split(data, micro):
            model(part["input_ids"], targets=part["targets"])
    if caught:
        with pytest.raises(ReportedUsedMismatch, match=f"{said} is reported to be run at once, but the"):
            require_used(said, seen, tuple(data["input_ids"].shape))
    else:
        require_used(said, seen, tuple(data["input_ids"].shape))
        with pytest.raises(ReportedUsedMismatch, match="of the 4 rows"):
            require_used(Shape(2, 16), [(2, 16)], (4, 16))  # a part of the batch is not the batch
    assert not model._forward_pre_hooks


class Card:
    """Runs shapes on a made-up device, and predicts their peaks wrongly by a factor and an offset."""

    def __init__(self, limit: int, out_of_memory: int, factor: float | None = 1.0, offset: int = 0) -> None:
        self.memory = FakeMemory(fixed_bytes=1000, bytes_per_sample=10, limit_bytes=out_of_memory)
        self.limit, self.factor, self.offset = limit, factor, offset
        self.ran: list[Shape] = []
        self.asked: set[Shape] = set()

    def peak(self, shape: Shape) -> int:
        return self.memory.bytes_of(shape.tokens)

    def predict(self, shape: Shape) -> int | None:
        self.asked.add(shape)
        return None if self.factor is None else round(self.peak(shape) * self.factor) + self.offset

    def run(self, shape: Shape) -> Trial:
        self.ran.append(shape)
        try:
            self.memory.step(shape.tokens)
        except torch.OutOfMemoryError as error:
            return Trial(shape, str(error), self.predict(shape))
        failure = None if self.peak(shape) <= self.limit else "peak above"
        return Trial(shape, failure, self.predict(shape), self.peak(shape))

    def fit(self, **settings) -> Found:
        return search(
            self.run, SHAPES, "shape", predict=self.predict, limit_bytes=self.limit, **settings
        )  # fmt: skip


@pytest.mark.parametrize(
    ("factor", "offset", "out_of_memory"),
    [(1.0, 0, 10**6), (0.91, 0, 0), (1.09, 0, 10**6), (0.5, 0, 0), (0.5, 0, 10**6), (2.0, 0, 0),
     (1.0, 400, 0), (None, 0, 10**6), (None, 0, 0)],
)  # fmt: skip
def test_d4_the_final_peak_lies_within_one_step_below_the_target(factor, offset, out_of_memory):
    """D4: for every limit, however wrong the prediction, and the answer is the largest that fits."""
    for limit in range(1000 + 160, 1000 + 12 * 640 + 100, 37):
        card = Card(limit, out_of_memory or limit, factor, offset)
        found = card.fit(max_trials=40)
        place = SHAPES.index(found.shape)
        assert found.shape == [shape for shape in SHAPES if card.peak(shape) <= limit][-1]
        assert len(card.ran) == len(set(card.ran)), "no shape is run twice"
        assert found.trial.measured_peak_bytes == card.peak(found.shape) <= limit
        if found.stopped == "limit":
            step = card.peak(SHAPES[place + 1]) - card.peak(found.shape)
            assert limit - step < card.peak(found.shape)
            assert SHAPES[place + 1] in card.ran, "that it is too large was tried, not only predicted"
        else:
            assert (found.stopped, place) == ("largest", len(SHAPES) - 1)
        if factor in (1.0, 0.91, 1.09) and not offset:
            assert found.trial.expected_peak_bytes == pytest.approx(card.peak(found.shape), rel=0.1)
            assert len(card.ran) <= 4
        if (factor, offset) == (1.0, 0):
            assert len(card.asked) <= 4, "a prediction takes a second: along one bisection of 12 shapes"


def test_a_fit_ends_at_its_trials_and_its_time_with_a_shape_that_ran_or_none(monkeypatch):
    assert Card(3000, 10**6, None).fit(max_trials=2).stopped == "max_trials"
    ticks = iter(range(100))
    monkeypatch.setattr("bench.tune.search.monotonic", lambda: next(ticks))
    found = Card(3000, 10**6, None).fit(max_seconds=1.5)
    assert found.stopped == "max_seconds"
    assert found.trial.ran
    with pytest.raises(NoFeasibleBatch, match="smallest peak seen"):
        Card(900, 10**6).fit()


def test_a_fit_begins_no_trial_that_is_not_expected_to_end_in_time(monkeypatch):
    """B6, as a search does: a second a token, so after 64 × 1 there is no time for 64 × 4."""
    card, now = Card(3000, 10**6, None), [0.0]
    monkeypatch.setattr("bench.tune.search.monotonic", lambda: now[0])

    def run(shape: Shape) -> Trial:
        now[0] += shape.tokens
        return replace(card.run(shape), seconds=shape.tokens)

    for seconds, ran in ((64 + 255, 1), (64 + 256, 2)):
        card.ran.clear()
        now[0] = 0.0
        found = search(run, SHAPES, "shape", predict=card.predict, limit_bytes=3000, max_seconds=seconds)
        assert (found.stopped, [shape.tokens for shape in card.ran]) == ("max_seconds", [64, 256][:ran])
        assert found.shape == Shape(1, 64)


def request(limit: int, device: str = "cpu", config: GNNMoEConfig = CONFIG, rows=(1, 2, 4)) -> Request:
    setup = TrialSetup(config, TrainingConfig(), max(rows), limit, device)
    full = config.max_seq_length
    return Request(setup, limit, 1.0, "shape", (full // 2, full), rows, 1, 8, 100.0)


def test_d5_doubling_the_batch_raises_the_measured_activations(monkeypatch):
    """D5: and a model that only says that it takes the whole batch is found out."""
    model = GNNMoEModel(CONFIG, seed=0)
    before = torch.get_rng_state()
    require_batch_applied(model, 16, CPU)
    assert torch.equal(before, torch.get_rng_state())

    class RunsOneRow(GNNMoEModel):
        def forward(self, input_ids, *, targets=None, **options):
            assert targets is not None
            return super().forward(input_ids[:1], targets=targets[:1], **options)

    with pytest.raises(ParametersNotApplied, match="parameters not applied: 1 sequence at once takes"):
        require_batch_applied(RunsOneRow(CONFIG, seed=0), 16, CPU)
    for large, caught in ((20, False), (10, True), (9, True)):
        taken = {1: 10, 2: large}
        monkeypatch.setattr(
            "bench.tune.trials.activation_bytes", lambda _, rows, *__, taken=taken: taken[rows]
        )
        with pytest.raises(ParametersNotApplied, match="2 take") if caught else nullcontext():
            require_batch_applied(model, 16, CPU)


def test_bench_tune_fits_and_says_what_to_use(tiny, capsys):
    """D4: by the command, with predicted, corrected and measured peaks; nothing is trained."""
    keep = [flag for flag in tiny if flag not in ("--no-plots",)]
    for name in ("--speed-warmup-steps", "--speed-steps"):
        at = keep.index(name)
        del keep[at : at + 2]
    keep += "--coupler mean --num-experts 2 --fit-shape --shape-min-length 16 --memory-budget 1MiB".split()
    assert tune([*keep, "--quiet"]) == 0
    printed = capsys.readouterr()
    said = printed.out
    assert printed.err == "", "quiet"
    assert "length 16, micro-batches of 4 for a batch of 4: nothing larger is allowed" in said
    assert "--max-seq-length 16 --micro-batch-size 4" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_d4_d5_on_cuda():
    """D4, D5 (gpu): by the allocator's reserved peak, at sizes where its rounding is small."""
    config = replace(CONFIG, embed_dim=512, num_heads=8, num_layers=4, max_seq_length=256, vocab_size=8192)
    asked = request(4 * 2**30, "cuda", config, rows=(1, 2, 4, 8, 16, 32, 64, 128, 256))
    found = search_here(asked, lambda _: None)
    peak = found.trial.measured_peak_bytes
    assert peak is not None
    assert peak <= 4 * 2**30
    assert found.trial.expected_peak_bytes == pytest.approx(peak, rel=0.1)
    assert found.stopped == "limit"
    require_batch_applied(GNNMoEModel(config, seed=0).cuda(), 256, torch.device("cuda"))
