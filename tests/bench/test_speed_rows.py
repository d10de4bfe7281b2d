"""What bench.speed makes of measured rows: ratios, records, tables and plots."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from bench.speed.figures import cost_plot, steps_plot
from bench.speed.forms import FormInputs, experts_given
from bench.speed.machine import Machine, in_turn
from bench.speed.record import (
    FILE,
    HARNESS,
    STEPS,
    TABLE,
    SpeedRecord,
    SpeedRow,
    derived,
    ratio,
    read_speed_record,
)
from bench.speed.show import MARKS, harness_sentence, print_rows, tables, with_tables
from bench.speed.suites import EAGER, HGNN, STEP_32, Job, run_jobs, sizes, subject_name, subjects
from gnnmoe import GNNMoEConfig

CPU = torch.device("cpu")


def row(form: str, *seconds: float, **changes) -> SpeedRow:
    made = SpeedRow(case=HGNN, subject="HGNN", form=form, device="cpu", precision="fp32", batch=2, length=8,
               experts=4, width=16, layers=2, seconds=list(seconds), floor_bytes=1000,
               copy_bytes_per_second=1e6)  # fmt: skip
    return changed(made, **changes)


def changed(made: SpeedRow, **changes) -> SpeedRow:
    """The row with other values of some fields."""
    return made.model_copy(update=changes)


# --- ratios ----------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_over_rounds_in_turn():
    """A machine that slows down by half in one round slows both: the ratio does not see it."""
    ours, theirs = row("vectorized", 1.0, 1.0, 10.0), row("loop", 3.0, 3.1, 29.0)
    assert ratio(theirs, ours) == 3.0
    assert ratio(row("loop", 4.0), ours) == 4.0  # timed once: of the medians
    wrong = row("vectorized", 1.0, largest_difference=1e-4)  # its time makes no ratio
    assert wrong.wrong
    assert ratio(theirs, wrong) is None
    assert ratio(row("loop", 3.0), changed(wrong, precision="bf16")) == 3.0  # where 3e-2 is allowed
    assert row("vectorized", 1.0, largest_difference=float("nan")).wrong


def test_what_follows_from_a_row_and_those_beside_it():
    rows = [row("vectorized", 0.002, 0.004, 0.003, floor_seconds=0.001, roofline_seconds=0.002),
            row("pyg", 0.02, 0.04, 0.03), row("loop", 0.3), row("loop", 7.0, batch=4)]  # fmt: skip
    found = derived(rows[0], rows)
    assert found["median_ms"] == 3.0
    assert found["over_floor"] == 3.0
    assert found["over_roofline"] == 1.5
    assert found["loop_over_this"] == pytest.approx(100)
    assert found["pyg_over_this"] == pytest.approx(10)
    assert found["tokens_per_second"] == pytest.approx(3 * 16 / 0.009)
    assert derived(rows[3], rows)["pyg_over_this"] is None  # of another size
    assert row(EAGER, 0.5, flops=300, matrix_flops_per_second=400.0).mfu == 1.5, "over one too"


def test_the_harness_is_said_as_a_ratio_and_fetching_as_a_share():
    rows = [row(form, seconds, seconds, seconds, case=HARNESS) for form, seconds in
            (("harness", 1.01), ("bare loop", 1.0), ("fetching a batch", 0.00505))]  # fmt: skip
    assert harness_sentence(rows) == (
        "the harness takes 1.010 times a bare loop (1.01 to 1.01); fetching a batch is 0.50% of a step"
    )
    assert harness_sentence(rows[:2]) == ""


# --- jobs and records ------------------------------------------------------------------------------


def record_of(tmp_path: Path, name: str = "made") -> SpeedRecord:
    environment = {"python": "3.11", "system": "Linux", "device_type": "cpu", "device_name": "made",
                   "threads": 1, "packages": {"torch": "2"}}  # fmt: skip
    record = SpeedRecord(tmp_path, name, {"what": "cpu", "command": "x", "environment": environment})
    record.begin()
    return record


def run(jobs, record, budget=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.speed.suites._forget", lambda: None)  # it takes longer than these jobs
        run_jobs(jobs, Machine(CPU), record, budget=budget, on_job=lambda _: None, on_row=lambda _: None)


def test_a_job_that_raises_is_a_row_the_next_goes_on_and_a_kill_loses_no_row(tmp_path):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal instruction\nand a long tail")

    def killed(_):
        raise SystemExit

    record = record_of(tmp_path)
    with pytest.raises(SystemExit):
        run([Job("one", broken), Job("two", lambda _: [row("loop", 1.0)]), Job("three", killed)], record)
    data, (first, second) = read_speed_record(tmp_path / "speed" / "made")
    assert data["status"] == "running"
    with pytest.raises(ValueError, match=r"holds a record already; give another --name"):
        record_of(tmp_path)
    assert (first.case, first.error) == ("one", "RuntimeError: CUDA error: an illegal instruction")
    assert second.seconds == [1.0]


def test_what_a_budget_has_no_time_for_is_left_out_by_name(tmp_path, monkeypatch):
    now, record = [0.0], record_of(tmp_path)
    monkeypatch.setattr("bench.speed.suites.perf_counter", lambda: now[0])

    def taking(seconds: float):
        def rows(_):
            now[0] += seconds
            return [row("loop", seconds)]

        return rows

    jobs = [("a", taking(4.0)), ("large", taking(9.0), 9.0), ("b", taking(5.0), 2.0), ("c", taking(1))]
    run([Job(*job) for job in jobs], record, budget=8.0)
    assert [one.seconds for one in record.rows] == [[4.0], [5.0]]
    assert record.data["left_out"] == ["large (about 9 s)", "c"]


def test_a_record_comes_back_as_it_was_and_its_csv_has_the_ratios(tmp_path):
    record = record_of(tmp_path)
    rows = [row("vectorized", 0.5, forward_seconds=[0.1], saved_bytes=7), row("loop", 2.0, remark="slow")]
    record.add(rows, {"device": "made"})
    record.end("ok")
    data, found = read_speed_record(record.path)
    assert found == rows
    assert (data["status"], data["machine"]["device"]) == ("ok", "made")
    table = list(csv.DictReader(io.StringIO((record.path / TABLE).read_text())))
    assert [line["loop_over_this"] for line in table] == ["4.0", "1.0"]


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is cut short"), ("[]", "it is []; it must be an object"),
    ('{"rows": []}', "is damaged: it lacks schema_version"),
    ('{"schema_version": 9, "rows": []}', "schema_version is 9; it must be 1"),
])  # fmt: skip
def test_a_damaged_record_is_refused(tmp_path, text, message):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_speed_record(tmp_path)
    with pytest.raises(ValueError, match="holds no record"):
        read_speed_record(tmp_path / "nowhere")


# --- in turn ---------------------------------------------------------------------------------------


def test_one_that_fails_leaves_the_others_alone():
    calls: list[str] = []

    def make(name: str):
        if name == "x":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return lambda number: calls.append(f"{name}{number}")

    def check(name: str, _) -> None:
        if name == "y":
            raise ValueError("the largest difference from what is expected is nan")

    turns = in_turn("axby", make, check, Machine(CPU), rounds=2, warmup=1)
    assert [len(turns[name].seconds) for name in "axby"] == [2, 0, 2, 0]
    assert turns["x"].error == "out of memory: CUDA out of memory. Tried to allocate"
    assert turns["y"].error == "ValueError: the largest difference from what is expected is nan"
    # built and called, warmed up, then in turn there and back
    assert calls == ["a0", "b0", "y0", "a0", "b0", "a1", "b1", "b2", "a2"]


def test_a_slow_one_is_timed_in_one_round_beside_the_others(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("bench.speed.machine.time.perf_counter", lambda: now[0])
    counts = {"slow": 0, "quick": 0}

    def make(name: str):
        def step(_):
            counts[name] += 1
            now[0] += {"slow": 3.0, "quick": 0.1}[name]

        return step

    turns = in_turn(list(counts), make, None, Machine(CPU), rounds=4, warmup=1)
    assert counts == {"slow": 3, "quick": 1 + 1 + 4 + 1}  # called, called again, timed
    assert [len(turns[name].seconds) for name in ("slow", "quick")] == [1, 5]


# --- sizes and couplers ----------------------------------------------------------------------------


def test_sizes_name_what_differs():
    found = sizes("E=8,B=2; L=16", GNNMoEConfig(embed_dim=32), batch=4)
    assert [str(size) for size in found] == ["E 8, D 32, B 2, L 128", "E 4, D 32, B 4, L 16"]
    assert [str(size) for size in sizes(None, GNNMoEConfig(), 4)] == ["E 4, D 64, B 4, L 128"]


@pytest.mark.parametrize(("text", "message"), [
    ("E", "'E' is no size; write sizes as E=4"), ("E=4;", "is no size"),
    ("X=4", "unknown size 'X'; allowed: B, D, E, L"), ("E=0", "E is '0'; it must be a whole number"),
    ("E=2,E=4", "E stands twice"), ("D=3", "num_heads is 2 and does not divide"),
])  # fmt: skip
def test_a_wrong_size_is_refused_in_one_message(text, message):
    with pytest.raises(ValueError, match=message):
        sizes(text, GNNMoEConfig(), 4)


def test_couplers_by_name_layer_or_all():
    names = [name for name, _ in subjects("GNN, HNHN,GNN", GNNMoEConfig())]
    assert names == ["GNN", "HGNN HNHN all_pairs"]
    every = [name for name, _ in subjects("all", GNNMoEConfig())]
    assert len(set(every)) == len(every)
    assert {"static", "gate", "HGNN all_pairs", "HGNN EDHNN all_pairs"} <= set(every)
    with pytest.raises(ValueError, match=r"unknown coupler 'HNHM'; .* Did you mean 'HNHN'"):
        subjects("HNHM", GNNMoEConfig())
    options = GNNMoEConfig(coupler_options={"residual": "false"})
    assert subject_name(options) == "HGNN all_pairs residual=false"


# --- what is shown ---------------------------------------------------------------------------------


def made_rows() -> list[SpeedRow]:
    curve = [row("vectorized", 0.01 * experts, case="curve", experts=experts, subject=name)
             for experts in (2, 4) for name in ("static", "HGNN")]  # fmt: skip
    failed = row("compiled", error="RuntimeError: " + "long " * 40)
    return [
        row("vectorized", 4.2, forward_seconds=[0.004], saved_bytes=10**9, flops=10**12, peak_bytes=10**10,
            floor_seconds=0.001, roofline_seconds=0.002, largest_difference=2e-7),
        row("loop", 123.4), row("pyg", 0.4, largest_difference=1.0), failed, *curve,
        row(EAGER, 0.5, case=STEP_32, floor_bytes=None, subject="step, HGNN", flops=100, peak_bytes=10**9,
            matrix_flops_per_second=1e4),
        row("vectorized", case="parity", largest_difference=1e-7), row("batched", case="parity", error="no"),
    ]  # fmt: skip


def test_the_tables_fit_into_80_columns_and_name_what_is_wrong(capsys):
    console = Console(width=80, highlight=False)
    slow = row("", 123.4, forward_seconds=[99.1], floor_seconds=1e-6, roofline_seconds=1e-6)
    busy = [changed(slow, form=form, batch=9) for form in ("vectorized", "compiled", "reference()")]
    print_rows([*made_rows(), *busy], console)
    shown = capsys.readouterr().out
    assert "123,400k" in shown, "steps that take seconds, against floors of microseconds"
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for text in ("parity: 1 of 2 agree", "pyg: WRONG by 1e+00", "RuntimeError: long"):
        assert text in words, text


def test_a_narrow_terminal_gets_whole_numbers_in_sentences(capsys):
    print_rows(made_rows(), Console(width=40, highlight=False))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 40
    assert "vectorized: fwd ms 4.00, ms 4,200, floor 1.00, ×floor 4,200" in " ".join(shown.split())


def test_the_plot_has_a_line_for_each_coupler_and_the_floor():
    plot = cost_plot(made_rows(), "a processor")
    assert plot is not None
    [axes] = plot.figure.axes  # one number of tokens only
    assert [line.get_label() for line in axes.get_lines()] == ["static", "HGNN", "floor by bytes"]
    assert np.asarray(axes.get_lines()[0].get_ydata()) == pytest.approx([20.0, 40.0])
    floors = [1e3 * (one.bytes_floor_seconds or 0) for one in made_rows() if one.subject == "static"]
    assert np.asarray(axes.get_lines()[2].get_ydata()) == pytest.approx(floors[-2:])
    assert len(plot.rows) == 4
    assert cost_plot(made_rows()[:4], "a processor") is None


def test_a_page_takes_the_tables_between_its_marks(tmp_path):
    record = record_of(tmp_path)
    record.add(made_rows(), {"device": "CPU", "copy_bytes_per_second": 1e10,
                             "matrix_flops_per_second": {"fp32": 1e11}})  # fmt: skip
    records = [read_speed_record(record.path)]
    begin, end = MARKS
    page = with_tables(f"above\n{begin}\nold\n{end}\nbelow\n", records)
    assert page.startswith("above\n")
    assert page.endswith("\nbelow\n")
    assert "old" not in page
    assert tables(records) in page
    assert with_tables(page, records) == page
    with pytest.raises(ValueError, match="put these two lines in it"):
        with_tables("no marks", records)


def test_what_failed_or_is_wrong_stands_on_a_page_as_that(tmp_path):
    kept = record_of(tmp_path)
    assert "nothing was measured" in tables([(kept.data, [])])
    machine = {"device": "CPU", "copy_bytes_per_second": 1e10, "matrix_flops_per_second": {"fp32": 1e11}}
    kept.add([row("vectorized", 1.0, largest_difference=1e-2), row("loop", 2.0),
              row("pyg", error="out of memory"),
              row("harness", 1.0, case=HARNESS, floor_bytes=None, error="MFU 120 %")], machine)  # fmt: skip
    page = tables([(kept.data, kept.rows)])
    assert [line.partition(", cpu, ")[2] for line in page.splitlines() if line.startswith("- ")] == [
        "vectorized: WRONG by 1e-02: its time does not count", "pyg: out of memory", "harness: MFU 120 %",
    ]  # fmt: skip


def step(name: str, experts: int, seconds: float, peak: int | None, **changes) -> SpeedRow:
    return row(name, seconds, seconds, case=STEPS, subject="step", experts=experts, peak_bytes=peak,
               floor_bytes=None, **changes)  # fmt: skip


def test_the_plot_of_steps_shows_throughput_and_peak_by_experts():
    rows = [step(name, experts, experts / 100, peak and experts * peak) for experts in (2, 4, 8)
            for name, peak in (("mean", 2**20), ("GNN", None))]  # fmt: skip
    other = step("mean", 16, 1.0, 2**20, width=32)  # another model: no point of these lines
    wrong = step("gate", 2, 1.0, 2**20, largest_difference=1.0)
    plot = steps_plot([other, *rows, wrong, row("vectorized", 1.0)], "CPU")
    assert plot is not None
    throughput, memory = plot.figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in throughput.lines}  # pyright: ignore
    assert lines == {name: [[2, 800], [4, 400], [8, 200]] for name in ("mean", "GNN")}  # 16 tokens per step
    peaks = {line.get_label(): line.get_xydata().tolist() for line in memory.lines}  # pyright: ignore
    assert peaks == {"mean": [[2, 2], [4, 4], [8, 8]], "GNN": []}
    assert steps_plot(rows[:2], "CPU") is None
    assert steps_plot([], "CPU") is None


def test_the_tables_of_the_page_follow_from_the_committed_records():
    repository = Path(__file__).parents[2]
    places = sorted((repository / "results" / "reference" / "speed").glob(f"*/{FILE}"))
    if not places:
        pytest.skip("no record is committed")
    page = (repository / "docs" / "performance.md").read_text(encoding="utf-8")
    again = "python -m bench.speed --table results/reference/speed/* --page docs/performance.md"
    assert with_tables(page, [read_speed_record(path) for path in places]) == page, f"write it again: {again}"


@pytest.mark.parametrize(("coupler", "experts"), [("dense", 1), ("mean", 4)])
def test_a_coupler_is_timed_on_as_many_experts_as_a_layer_has(coupler, experts):
    config = GNNMoEConfig(coupler_type=coupler, num_experts=4, embed_dim=8, max_seq_length=8)
    inputs, before = FormInputs(config, 2, "fp32", CPU), torch.get_rng_state()
    for expert_outputs, layer_input in inputs.sets:
        assert expert_outputs.shape == (2, 8, experts, 8)
        assert layer_input.shape == (2, 8, 8)
    assert experts_given(config) == experts
    assert torch.equal(torch.get_rng_state(), before)


def test_no_place_of_this_machine_is_in_a_committed_record():
    repository = Path(__file__).parents[2]
    for path in (repository / "results" / "reference" / "speed").glob(f"*/{FILE}"):
        command = json.loads(path.read_text())["command"]
        assert not [word for word in command.split() if word.startswith("/")]
