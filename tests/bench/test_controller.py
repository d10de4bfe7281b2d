"""The memory controller: bounds and no oscillation (D8), changes in force and exact (D1 to D3), resume."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.config import TrainingConfig
from bench.data.corpus import load_corpus
from bench.data.loader import create_loader, set_epoch
from bench.run.__main__ import main
from bench.training import loop
from bench.training.loop import Trainer
from bench.training.step import split
from bench.tune.control import (
    GROW_SHARE,
    PATIENCE,
    ControlledSteps,
    Controller,
    Decision,
    ReportedUsedMismatch,
    witnessed,
)
from bench.tune.search import Shape, ladder
from gnnmoe import GNNMoEConfig, GNNMoEModel
from tests.bench._fake_memory import FakeMemory
from tests.bench._runs import Rows, interrupt, only_run, results_of

CPU = torch.device("cpu")
SHAPES = ladder([8, 16, 32], [1, 2, 3, 6])
LENGTH, BATCH = 16, 4
SMALL_RUN = "--coupler mean --num-experts 2 --control-memory --memory-budget 75KiB".split()


def controller(start: Shape = SHAPES[0], limit: int = 1000, fixed: int = 0, shapes=None) -> Controller:
    return Controller(shapes or SHAPES, start, limit_bytes=limit, fixed_bytes=fixed)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.lists(st.tuples(st.integers(0, 2000), st.booleans()), max_size=120),
)
def test_d8_for_any_peaks_the_shapes_rise_then_fall_within_the_bounds(start, steps):
    """D8: no oscillation, whatever is measured: once it has come down it never goes up again."""
    control, visited = controller(start), [SHAPES.index(start)]
    too_large: set[int] = set()

    def arrive() -> None:
        visited.append(SHAPES.index(control.shape))
        assert not (visited[-1] > visited[-2] and visited[-1] in too_large), "taken again"

    for number, (peak, new_epoch) in enumerate(steps):
        if new_epoch:
            control.begin_epoch(number)
            arrive()
        if peak > 1000:
            too_large.add(SHAPES.index(control.shape))
        length = control.shape.length
        control.observe(number, peak)
        arrive()
        assert control.shape.length == length, "the length changes between epochs only"
    changes = [b - a for a, b in pairwise(visited) if a != b]
    assert changes == sorted(changes, reverse=True), "up, up, …, down, down, …"
    assert set(changes) <= {1, -1}, "one step at a time"
    assert len(control.decisions) <= 4 * len(SHAPES) + 1


@pytest.mark.parametrize("fixed", [0, 300])
def test_d8_on_a_device_it_ends_below_the_limit_and_near_it_and_stays(fixed):
    """D8: from every start, for every limit: within the limit, and one step more would leave the band."""
    shapes = ladder([8], [1, 2, 3, 4, 6, 8, 12])
    for limit in range(400, 1400, 90):
        for start in shapes:
            memory = FakeMemory(300, 10, 10**6)
            control = controller(start, limit, fixed, shapes)
            seen = []
            for number in range(80):
                seen.append(control.shape)
                control.observe(number, memory.bytes_of(control.shape.tokens))
            end = control.shape
            assert set(seen[-40:]) == {end}, "it comes to rest"
            peak, place = memory.bytes_of(end.tokens), shapes.index(end)
            assert peak <= limit or place == 0
            if place + 1 < len(shapes) and fixed == 300 and peak <= limit:
                above = memory.bytes_of(shapes[place + 1].tokens)
                assert above > GROW_SHARE * limit, "there was room for more"


def after(control: Controller, *peaks: int, begin: int | None = None) -> Shape:
    """Return the shape after steps of these peaks; ``begin`` is the step at which an epoch begins first."""
    if begin is not None:
        control.begin_epoch(begin)
    for number, peak in enumerate(peaks):
        control.observe(number, peak)
    return control.shape


def test_d8_it_grows_length_first_and_waits_for_the_epoch_then_rows():
    control = controller(fixed=100)
    assert after(control, *[150] * (2 * PATIENCE)) == Shape(1, 8)
    (decision,) = control.decisions
    assert (decision.to_rows, decision.to_length, decision.reason) == (1, 16, "room for more"), "said once"
    assert (decision.step, decision.pending) == (PATIENCE - 1, True)
    assert after(control, *[150] * PATIENCE, begin=12) == Shape(1, 16)
    assert after(control, *[150] * (2 * PATIENCE), begin=20) == Shape(3, 32), "rows at once, at full length"
    control = controller(Shape(1, 32))
    assert after(control, *[400] * (PATIENCE - 1), 600, *[400] * (PATIENCE - 1)) == Shape(1, 32)
    assert after(control, 400) == Shape(2, 32), "room must last"


def test_d8_it_shrinks_rows_first_then_length():
    control = controller(Shape(3, 32))
    assert [after(control, 1001) for _ in range(6)] == [Shape(2, 32), *[Shape(1, 32)] * 5]
    assert [decision.pending for decision in control.decisions] == [False, False, True]
    assert after(control, 1001, begin=6) == Shape(1, 16)
    assert after(control, 1001, 1001, begin=8) == Shape(1, 8)
    assert "nothing is smaller" in control.decisions[-1].reason
    assert len(control.decisions) == 7, "said once"
    control = controller()
    assert after(control, *[100] * PATIENCE, 1001) == after(control, begin=9) == SHAPES[0], (
        "growth is dropped"
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1500), min_size=1, max_size=40), st.data())
def test_d8_a_resumed_controller_decides_as_one_that_was_not_stopped(peaks, data):
    at = data.draw(st.integers(0, len(peaks)))
    whole, control = controller(), controller()
    for number, peak in enumerate(peaks):
        if number == at:
            state = json.loads(json.dumps(control.state_dict()))
            control = controller(SHAPES[3])
            control.load_state_dict(state)
        for one in (whole, control):
            if number % 7 == 0:
                one.begin_epoch(number)
            one.observe(number, peak)
    assert control.state_dict() == whole.state_dict()


class Scripted(Controller):
    """Takes the shapes of a list, one a step; lengths at the next epoch."""

    def __init__(self, script: list[Shape]) -> None:
        super().__init__(ladder([4, 8, 16], [1, 2, 4]), script[0], limit_bytes=1)
        self.script = script

    def observe(self, step: int, peak_bytes: int) -> Decision | None:
        to = self.script[step % len(self.script)]
        if to == self.shape:
            return None
        return self._moved(step, self.shapes.index(to), peak_bytes, "scripted")


@pytest.fixture(scope="module")
def corpus(small_data_dir):
    return load_corpus(data_dir=small_data_dir)


def measured(function, owners) -> int:
    del owners
    function()
    return 1


def trainer(corpus, control: Controller | None, peak=measured, workers: int = 0) -> Trainer:
    config = TrainingConfig(batch_size=BATCH, epochs=2, eval_every=50, warmup_steps=1)
    model = GNNMoEModel(
        GNNMoEConfig(embed_dim=8, num_layers=1, num_heads=2, max_seq_length=LENGTH, num_experts=2,
                     vocab_size=corpus.vocabulary.size), seed=0,
    )  # fmt: skip
    train = create_loader(corpus, "train", BATCH, max_seq_length=LENGTH, num_samples=42, num_workers=workers)
    val = create_loader(corpus, "val", BATCH, max_seq_length=LENGTH, num_samples=4)
    told = Rows()
    steps = ControlledSteps(
        model, BATCH, CPU, controller=control, peak=peak, on_decision=told.decisions.append
    )
    return Trainer(model, train, val, config, CPU, told, steps=steps)


def blocks_of(parts) -> list[list[int]]:
    return sorted(row for part in parts for row in part.reshape(-1, LENGTH).tolist())


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4]), min_size=10, max_size=10), st.integers(0, 3))
def test_d3_any_sequence_of_micro_batches_serves_the_same_blocks(corpus, sizes, epoch):
    """D3: the set of blocks is the epoch's, each once, and what is left is exact after every step."""
    loader = create_loader(corpus, "train", BATCH, max_seq_length=LENGTH, num_samples=42)
    set_epoch(loader, epoch)
    expected = blocks_of([batch["input_ids"] for batch in loader])

    class Sees(torch.nn.Module):
        def forward(self, input_ids):
            pieces.append(input_ids)

    model, pieces = Sees(), []
    scripted = Scripted([Shape(size, 16) for size in sizes])
    steps = ControlledSteps(model, BATCH, CPU, controller=scripted, peak=measured)

    def step(batch, micro_batch_size, shapes):
        for part in split(batch, micro_batch_size):
            model(part["input_ids"])
        return torch.zeros(()), torch.zeros(())

    optimizer = torch.optim.SGD([torch.zeros(1)])
    for number, batch in enumerate(loader):
        before = len(pieces)
        steps.run(step, batch, number + 1, optimizer)
        assert {len(piece) for piece in pieces[before:]} == {sizes[number % 10]}
        assert sum(len(piece) for piece in pieces) == BATCH * (number + 1)
    assert (number + 1, blocks_of(pieces)) == (len(loader), expected)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_d2_a_change_is_in_force_at_the_next_step_also_with_workers(corpus, workers):
    """D2, D3: by the tensors that the model sees; the ledger closes every epoch exactly."""
    script = [Shape(rows, 16) for rows in (4, 1, 2, 2, 4, 1, 4)]
    made = trainer(corpus, Scripted(script), workers=workers)
    seen: list[list[tuple[int, ...]]] = []
    with witnessed(made.model) as calls:

        def after() -> None:
            seen.append(calls[:])
            calls.clear()

        made.hooks.after = after  # pyright: ignore
        made.run()
    assert made.done.steps == len(seen) == 20
    for step, shapes in enumerate(seen):
        expected = script[step % len(script)]
        training = shapes[: BATCH // expected.rows]
        assert training == [(expected.rows, 16)] * (BATCH // expected.rows), step
    totals = made.hooks.ledger.totals()  # pyright: ignore
    assert totals["samples"] == {"asked": 80, "got": 80}
    assert len(made.hooks.decisions) == sum(a != b for a, b in pairwise([*script * 3][:21]))  # pyright: ignore


def test_d1_shapes_that_are_only_written_down_are_caught(corpus, monkeypatch):
    """D1: a step that lists pieces it did not run; the ledger believes it, the witness does not."""
    real = loop.training_step

    def lies(model, batch, optimizer, norm, micro, shapes, ranks):
        result = real(model, batch, optimizer, norm, None, [])
        shapes += [(micro, 16)] * (BATCH // micro)
        return result

    monkeypatch.setattr(loop, "training_step", lies)
    made = trainer(corpus, Scripted([Shape(4, 16), Shape(2, 16)]))
    with pytest.raises(ReportedUsedMismatch, match="2 × 16 is reported to be run at once, but the model"):
        made.run()
    assert made.done.steps == 1
    assert made.steps.micro_batch_size == 2, "it did keep the number"


def test_d8_a_resumed_training_goes_on_with_the_controller_s_state(corpus):
    """D8: stopped in an epoch, after decisions; the same bits and the same decisions as in one go."""

    def made() -> Trainer:
        def peak(function, batch) -> int:
            function()
            return 900 if control.shape.rows < 2 else 1001

        control = controller(Shape(4, 16), shapes=ladder([8, 16], [1, 2, 4]))
        return trainer(corpus, control, peak)

    whole, first, second = made(), made(), made()
    whole.run()

    first.hooks.after = lambda: first.done.steps == 3 and interrupt()  # pyright: ignore
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second.load_state_dict(first.state_dict())
    second.hooks.ledger.load_state_dict(first.hooks.ledger.state_dict())  # pyright: ignore
    second.run()
    decisions = [made.steps.state_dict()["control"]["decisions"] for made in (whole, second)]
    assert len(decisions[0]) == 2
    assert decisions[1] == decisions[0]
    assert second.hooks.ledger.micro_batch_shapes == whole.hooks.ledger.micro_batch_shapes  # pyright: ignore
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_controlled_run_records_and_says_every_decision(tiny, capsys):
    """Each is a row of history, in the record under used, and on screen once; a shorter length counts (D3).

    Three steps end at one row at once; the second epoch begins with sequences of half the length.
    """
    flags = [*SMALL_RUN, "--max-steps", "5", "--eval-every", "5"]
    assert main([*tiny, *flags, "--max-batches-per-epoch", "3"]) == 0
    folder, record = only_run(results_of(tiny))
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    rows, made = [row for row in history if row["kind"] == "shape"], record["used"]["control"]
    assert [{k: v for k, v in row.items() if k != "kind"} for row in rows] == made
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("note: step 1, peak") == 1
    assert made[0]["peak_bytes"] > int(75 * 1024 * 0.85)
    assert [(one["step"], one["to_rows"], one["to_length"], one["pending"]) for one in made[:3]] == [
        (1, 2, 16, False), (2, 1, 16, False), (3, 1, 8, True),
    ]  # fmt: skip
    used = record["used"]
    assert used["lengths"] == [8, 16]
    assert used["micro_batch_shapes"].keys() >= {"4x16", "2x16", "1x16", "1x8"}
    assert used["micro_batch_size"] * used["accumulation"] * 8 == 4 * 16, "the tokens of a batch"
    assert record["memory"]["peak_allocated_bytes"] < made[0]["peak_bytes"]


def test_d1_d8_the_user_s_maximum_bounds_it_and_a_decision_after_the_last_step_is_not_used(tiny):
    """One step of two rows is too much, and nothing comes after it."""
    flags = [*SMALL_RUN, *"--tune-max-batch-size 2 --max-steps 1".split()]
    assert main([*tiny, *flags, "--eval-every", "1"]) == 0
    used = only_run(results_of(tiny))[1]["used"]
    assert [(one["step"], one["to_rows"]) for one in used["control"]] == [(1, 1)]
    assert used["micro_batch_shapes"] == {"2x16": 2}
    assert (used["micro_batch_size"], used["accumulation"]) == (2, 2)


def test_a_control_that_changes_nothing_changes_no_bit(corpus):
    plain = trainer(corpus, None)
    watched = trainer(corpus, controller(Shape(4, 16), shapes=ladder([16], [1, 2, 4])))
    plain.run()
    watched.run()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_d3_another_length_keeps_tokens_updates_and_the_ledger_exact(corpus):
    """D3: it comes at the epoch; each update still has the tokens of the configured batch."""
    control = controller(Shape(1, 16), limit=1000, shapes=ladder([4, 8, 16], [1, 2, 4]))
    made = trainer(corpus, control, lambda function, batch: (function(), 1001)[1])
    made.run()
    ledger = made.hooks.ledger  # pyright: ignore
    assert ledger.micro_batch_shapes == {"1x16": 10 * 4, "1x8": 10 * 8}
    assert ledger.batch_shapes == {"4x16": 20}
    assert {row["tokens"] for row in made.hooks if row["kind"] == "train"} == {64}  # pyright: ignore
    assert [(d.step, d.to_length, d.pending) for d in control.decisions] == [
        (1, 8, True), (10, 8, False), (11, 4, True),
    ]  # fmt: skip


def test_d1_a_length_that_is_not_applied_is_caught(corpus, monkeypatch):
    monkeypatch.setattr("bench.tune.control.cut", lambda batch, length: batch)
    with pytest.raises(ReportedUsedMismatch, match="1 × 8 is reported"):
        trainer(corpus, Scripted([Shape(1, 8)])).run()


def test_d8_after_running_out_of_memory_that_size_is_not_tried_again():
    control = controller(Shape(3, 32))
    decision = control.ran_out(5, 3, 1)
    assert (decision.reason, control.shape) == ("out of memory", Shape(1, 32))
    for number in range(50):
        control.observe(number, 1)
    assert control.shape == Shape(2, 32)
