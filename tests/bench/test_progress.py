"""The progress of a run: the bar moves in an evaluation, and the time left counts what comes later."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.run.progress import Reporter, Workload

WORK = Workload(steps=120, eval_every=40, eval_batches=10, final_batches=20, speed_steps=30)


@pytest.mark.parametrize(
    ("work", "step", "expected"),
    [(WORK, 0, 3), (WORK, 39, 3), (WORK, 40, 2), (WORK, 119, 1), (WORK, 120, 0),
     (Workload(20, 7), 13, 2), (Workload(20, 7), 14, 1), (Workload(20, 7), 20, 0), (Workload(4, 9), 0, 1)],
)  # fmt: skip
def test_the_evaluations_that_come(work, step, expected):
    points = [at for at in range(1, work.steps + 1) if at % work.eval_every == 0 or at == work.steps]
    assert work.evaluations_after(step) == expected == sum(at > step for at in points)


def test_the_time_left_counts_evaluations_and_the_speed_pass():
    assert WORK.seconds_left(120, 2.0, 0.5) == pytest.approx(30 * 2.0 + 1.15 * 20 * 0.5)
    assert WORK.seconds_left(40, 2.0, 0.5) == pytest.approx((80 + 30) * 2.0 + (2 * 10 + 1.15 * 20) * 0.5)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def reporter(monkeypatch) -> tuple[Reporter, Clock, io.StringIO]:
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr("bench.run.progress.time.perf_counter", clock)
    return Reporter(Console(file=file, width=80, force_terminal=True)), clock, file


def test_an_evaluation_moves_the_bar_and_is_no_training_time(reporter):
    found, clock, _ = reporter
    with found.phase("training"):
        found.training_begins(WORK)
        for step in range(1, 41):
            clock.now += 2.0
            found.step({"step": step, "tokens": 100, "loss": 5.0})
        assert "50 tokens/s" in found._bar.tasks[0].description
        seen = []
        found.evaluating(0, 10)
        for batch in range(1, 11):
            clock.now += 0.5
            found.evaluating(batch, 10)
            task = found._bar.tasks[0]
            seen.append((task.completed, task.total, task.description, task.fields["left"]))
        left = [f"{round((10 - batch) * 0.5)} s left" for batch in range(1, 11)]
        assert seen == [(batch, 10, "evaluating", left[batch - 1]) for batch in range(1, 11)], (
            "the time left is that of the evaluation, as the bar is"
        )
        found.evaluated({"step": 40, "nll_sum": 10.0, "tokens": 10})
        clock.now += 2.0
        found.step({"step": 41, "tokens": 100, "loss": 5.0})
        assert "50 tokens/s" in found._bar.tasks[0].description
        assert found._bar.tasks[0].fields["left"] == "4 min 0 s left", "of the run: 109 steps, 43 batches"
        found.evaluated({"step": 120, "nll_sum": 10.0, "tokens": 10})
        found.evaluating(20, 20)
        assert found._bar.tasks[0].fields["left"] == "0 s left"
    assert found._bar is None


def test_a_line_for_each_evaluation_where_there_is_no_terminal(monkeypatch):
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr("bench.run.progress.time.perf_counter", clock)
    found = Reporter(Console(file=file, width=80))
    found.training_begins(Workload(steps=2, eval_every=1, eval_batches=1, final_batches=0, speed_steps=10))
    clock.now = 4.0
    found.step({"step": 1, "tokens": 100, "loss": 5.0})
    found.evaluating(0, 1)
    clock.now = 5.0
    found.evaluating(1, 1)
    found.evaluated({"step": 1, "nll_sum": 0.0, "tokens": 10})
    assert file.getvalue() == "  step 1/2: validation perplexity 1.0, 5 s, about 45 s left\n"
