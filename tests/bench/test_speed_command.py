"""python -m bench.speed: what it times, on tiny shapes; every path of both suites, on the CPU."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.config import ModelConfig, PlacesConfig
from bench.files import NOT_WRITTEN, NotWritten, write_whole
from bench.speed import __main__ as speed
from bench.speed import suites
from bench.speed.forms import Form, Timing, coupler_rows, forms_of
from bench.speed.machine import Machine, saved_bytes
from bench.speed.record import FILE, SpeedRecord, read_speed_record
from bench.speed.steps import Variant, executed, step_rows
from bench.speed.suites import CpuScale, GpuScale, cpu_jobs, gpu_jobs, run_jobs
from bench.training.step import Execution
from gnnmoe import GNNMoEConfig
from gnnmoe.couplers.gnn import GNNExpertCoupler
from gnnmoe.hypergraph.backends import BACKENDS, missing_backends
from gnnmoe.model import GNNMoEModel
from tests.bench._runs import refusal
from tools.speed_targets import CPU_TARGETS, GPU_TARGETS, verdicts

RECORD = Path(__file__).parents[2] / "results/reference/speed/h100-experts"
CPU = torch.device("cpu")
SMALL = GNNMoEConfig(embed_dim=8, num_experts=3, max_seq_length=4, vocab_size=64, num_layers=1)
QUICK = Timing(rounds=2, warmup=1)
TINY = "--embed-dim 8 --max-seq-length 4 --batch-size 2 --rounds 1".split()


@pytest.fixture(scope="module", autouse=True)
def _small_rates():
    """The rates of the machine are measured in small: a large product in bf16 takes a CPU long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.measure.timing.CPU_SIZES", (128,))
        patch.setattr("bench.measure.timing.CPU_COPY_BYTES", 2**20)
        yield


@pytest.fixture(scope="module")
def machine(_small_rates):
    return Machine(CPU)


@pytest.fixture
def no_compiler(monkeypatch):
    """Compilation takes a minute on a CPU: here it is asked for, and not done."""
    asked: list[object] = []

    def of_a_model(self: Execution, model: nn.Module) -> None:
        asked.extend([self.config.compile_mode] * self.config.compile)

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options["mode"]))
    monkeypatch.setattr(Execution, "compile", of_a_model)
    return asked


class TestCouplers:
    def test_every_form_is_timed_in_turn_and_held_against_the_reference(self, machine):
        rows = coupler_rows("case", forms_of("HGNN", SMALL), 2, machine, "fp32", QUICK)
        backends = [name for name in BACKENDS if name not in missing_backends()]
        assert [row.form for row in rows] == [*backends, "reference()"]
        for row in rows:
            assert len(row.seconds) == len(row.forward_seconds) == 2
            assert min(row.seconds) > 0
            assert (row.largest_difference or 0) < 1e-5
            assert (row.peak_bytes or 0) >= 4 * 3 * 2 * 4 * 8  # at least the gradient of the expert outputs
            assert None not in (row.largest_difference, row.saved_bytes, row.floor_seconds)
            assert (row.roofline_seconds is None, row.error) == (False, None)

    def test_a_coupler_without_backends_has_two_forms_and_a_compiled_one_where_asked(
        self, no_compiler, machine
    ):
        graph = replace(SMALL, coupler_type="GNN")
        forms = forms_of("GNN", graph, ("default",))
        assert [form.name for form in forms] == ["vectorized", "compiled", "reference()"]
        rows = coupler_rows("case", forms, 2, machine, "bf16", QUICK)
        assert [row.error for row in rows] == [None] * 3
        assert no_compiler == [None]
        assert rows[1].saved_bytes is rows[1].peak_bytes is None  # seen on CUDA only
        assert rows[0].floor_bytes == 2 * 11 * 2 * 4 * 8

    def test_a_form_that_computes_something_else_is_wrong_and_one_that_cannot_be_built_an_error(
        self, machine, monkeypatch
    ):
        graph, naive = replace(SMALL, coupler_type="GNN"), GNNExpertCoupler.reference
        monkeypatch.setattr(GNNExpertCoupler, "reference", lambda self, x, u=None: naive(self, x * 1.001, u))
        forms = [*forms_of("GNN", graph), Form("GNN", "broken", replace(graph, coupler_options={"k": "2"}))]
        rows = coupler_rows("case", forms, 2, machine, "fp32", QUICK)
        assert [row.wrong for row in rows] == [True, False, False]
        assert [row.error is None for row in rows] == [True, True, False]
        assert "Refused" in str(rows[2].error)
        assert rows[2].seconds == []


class TestMemory:
    def test_what_a_forward_saves_is_counted_without_what_is_there_anyway(self):
        first, second = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        x = torch.randn(8, 16, requires_grad=True)
        known = [x, *first.parameters(), *second.parameters()]
        # gelu saves its input, and the second map its own: 8 × 32 numbers each
        saved = saved_bytes(lambda: second(nn.functional.gelu(first(x))), known, CPU)
        assert saved == 2 * 8 * 32 * 4


class TestSteps:
    def test_the_head_in_chunks_computes_the_same_in_less_memory(self, machine):
        wide = replace(SMALL, vocab_size=20_000, max_seq_length=32)
        variants = [
            Variant("chunked", executed("loop", "fp32")),
            Variant("plain", executed("loop", "fp32"), True),
        ]
        chunked, plain = step_rows("head", variants, wide, 16, machine, rounds=2, warmup=1)
        assert 0 <= (plain.largest_difference or 0) < 1e-5
        assert 0 < (chunked.peak_bytes or 0) < 0.7 * (plain.peak_bytes or 0)

    def test_no_peak_is_known_of_a_step_replayed_as_cuda_graphs(self, machine, monkeypatch):
        """Graphs hold their memory in a pool: on an H100 the meter saw 272 MiB of a step of 1.5 GiB."""
        for name in ("__post_init__", "compile"):  # which refuse it on a CPU
            monkeypatch.setattr(f"bench.training.step.Execution.{name}", lambda *_: None)
        variants = [Variant(mode, executed("loop", "fp32", mode)) for mode in ("default", "reduce-overhead")]
        monkeypatch.setattr("gnnmoe.model.GNNMoEModel.flops", lambda *_: 10**18)
        compiled, replayed = step_rows("case", variants, SMALL, 2, machine, rounds=1)
        assert compiled.peak_bytes
        assert "not the fastest ones here" in compiled.remark, "an MFU over one"
        assert replayed.peak_bytes is None
        assert "pool of their own" in replayed.remark

    def test_a_step_is_held_against_the_first_of_its_own_model(self, machine, monkeypatch):
        """Compiled against eager, say: of one that computes something else the time does not count."""

        def something_else(model):
            plain = model.head.loss
            model.head.loss = lambda *tensors: 1.01 * plain(*tensors)

        monkeypatch.setattr("bench.speed.steps.hold_all_logits", something_else)
        eager, of_gnn = executed("loop", "fp32"), replace(SMALL, coupler_type="GNN")
        variants = [
            Variant("mean", eager, config=replace(SMALL, coupler_type="mean")),
            Variant("GNN", eager, config=of_gnn),
            Variant("GNN, otherwise", eager, plain_head=True, config=replace(of_gnn)),
        ]
        rows = step_rows("steps", variants, SMALL, 2, machine, rounds=1)
        assert [(row.form, row.wrong, row.error) for row in rows] == [
            ("mean", False, None), ("GNN", False, None), ("GNN, otherwise", True, None),
        ]  # fmt: skip


def measured(jobs, tmp_path) -> SpeedRecord:
    record = SpeedRecord(tmp_path, "made", {"what": "made", "command": "x", "environment": {}})
    record.begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.speed.suites._forget", lambda: None)  # it takes longer than these jobs
        run_jobs(jobs, Machine(CPU), record, budget=None, on_job=lambda _: None, on_row=lambda _: None)
    return record


def in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the curves, the comparison of all couplers and the meter, which other tests look at."""
    for name in ("curve_jobs", "_parity"):
        monkeypatch.setattr(f"bench.speed.suites.{name}", lambda *_: [])
    for module in ("forms", "steps"):
        monkeypatch.setattr(f"bench.speed.{module}.peak_bytes", lambda *_: 10**6)


class TestSuites:
    @pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_the_cpu_suite_measures_every_target_of_its_own(
        self, whole, small_data_dir, tmp_path, no_compiler, monkeypatch
    ):
        if not whole:
            in_short(monkeypatch)
        model = ModelConfig(embed_dim=8, num_layers=1, max_seq_length=16)
        scale = CpuScale(batch=2, length=4, width=8, saved_experts=4, saved_batch=1, model=model,
                         step_batch=4, vocabulary=64, steps=8, rounds=2, curve_experts=(2, 4),
                         curve_batches=(1, 2), curve_batch=2)  # fmt: skip
        record = measured(cpu_jobs(PlacesConfig(data_dir=small_data_dir), "default", scale), tmp_path)
        assert [row.error for row in record.rows] == [None] * len(record.rows)
        found = [one for one in verdicts(record.rows) if one.device == "cpu"]
        assert len(found) == len(CPU_TARGETS)
        assert all(one.value is not None and math.isfinite(one.value) for one in found)
        harness, bare, fetch = (row for row in record.rows if row.case == "harness")
        assert len(harness.seconds) == len(bare.seconds) == len(fetch.seconds) == 8 - 2 - 3
        assert all(part < whole for part, whole in zip(fetch.seconds, harness.seconds, strict=True))
        assert [row.form for row in record.rows if row.case == "compile"] == ["eager", "compiled"]

    @pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
    def test_the_gpu_suite_measures_every_target_of_its_own(self, whole, tmp_path, no_compiler, monkeypatch):
        """On the CPU and in small, without a compiler; what a GPU alone can do is refused as a row."""
        if not whole:
            in_short(monkeypatch)
        baseline = replace(SMALL, num_experts=4)
        scale = GpuScale(baseline=baseline, large=replace(baseline, num_experts=5), batch=2, large_batch=2,
                         many_batch=4, alone_batch=4, loop_batch=1, many_experts=6, rounds=2,
                         curve_experts=(2, 4), curve_batch=2, curve_batches=(1, 2))  # fmt: skip
        record = measured(gpu_jobs(scale), tmp_path)
        failed = [row for row in record.rows if row.error]
        assert [row.form for row in failed] == ["compiled, reduce-overhead"]
        assert not [row for row in record.rows if row.wrong]
        on_gpu = [row.model_copy(update={"device": "cuda"}) for row in record.rows]
        found = [one for one in verdicts(on_gpu) if one.device == "cuda"]
        assert len(found) == len(GPU_TARGETS)
        assert all(one.value is not None and math.isfinite(one.value) for one in found)
        assert set(no_compiler) == {None, "default"}

    def test_a_loop_that_is_too_slow_is_timed_on_a_few_tokens_and_says_so(self, machine, monkeypatch):
        monkeypatch.setattr("bench.speed.suites.MOST_LOOP_SECONDS", 0.0)
        scale = GpuScale(baseline=replace(SMALL, num_experts=4), batch=8, loop_batch=2, rounds=2)
        [job] = [job for job in gpu_jobs(scale) if job.name == "token by token"]
        default, loop = job.rows(machine)
        assert (default.form, default.batch) == ("vectorized", 8)
        assert (loop.form, loop.batch, len(loop.seconds)) == ("loop", 8, 1)
        assert loop.remark == "8 tokens timed, and the time multiplied by 4"


class TestCommand:
    def test_it_prints_tables_of_80_columns_and_keeps_a_record(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        assert speed.main([*TINY, "--results-dir", str(tmp_path), "--name", "one"]) == 0
        shown, _, path = capsys.readouterr().out.partition("record: ")
        assert path.strip() == str(tmp_path / "speed" / "one"), "a path is not broken"
        assert max(map(len, shown.splitlines())) <= 80
        for word in ("vectorized", "pyg", "loop", "reference()", "saved MiB", "×floor"):
            assert word in shown
        data, rows = read_speed_record(tmp_path / "speed" / "one")
        assert (data["status"], data["what"]) == ("ok", "HGNN")
        assert data["environment"]["packages"]["torch"] == torch.__version__
        assert {row.precision for row in rows} == {"fp32"}

    def test_couplers_times_sizes_and_a_plot(self, tmp_path, capsys):
        arguments = ["--couplers", "static,GNN", "--sizes", "E=2;E=3", "--plot"]
        arguments += ["--results-dir", str(tmp_path)]
        assert speed.main([*TINY, *arguments, "--name", "two", "--precision", "bf16"]) == 0
        folder = tmp_path / "speed" / "two"
        _, rows = read_speed_record(folder)
        found = {(row.subject, row.experts) for row in rows}
        assert found == {("static", 2), ("static", 3), ("GNN", 2), ("GNN", 3)}
        assert {path.name for path in folder.glob("cost.*")} == {"cost.svg", "cost.png", "cost.csv"}
        drawn = (folder / "cost.csv").read_text()
        for path in folder.glob("cost.*"):
            path.unlink()
        assert speed.main(["--table", str(folder), "--plot"]) == 0
        assert "two: " in capsys.readouterr().out
        assert (folder / "cost.csv").read_text() == drawn

    def test_whole_steps_of_several_couplers_by_the_number_of_experts(self, tmp_path, capsys, monkeypatch):
        """In turn at each size; each row's peak and FLOPs are those of its own model."""
        monkeypatch.setattr("bench.speed.suites.VOCABULARY", 50)
        arguments = ["--whole-steps", "--couplers", "mean,GNN", "--sizes", "E=2;E=5", "--plot"]
        assert speed.main([*TINY, *arguments, "--results-dir", str(tmp_path), "--name", "steps"]) == 0
        folder = tmp_path / "speed" / "steps"
        _, rows = read_speed_record(folder)
        assert [(row.form, row.experts) for row in rows] == [("mean", 2), ("GNN", 2), ("mean", 5), ("GNN", 5)]
        for row in rows:
            config = replace(SMALL, coupler_type=row.form, num_experts=row.experts, embed_dim=row.width,
                             max_seq_length=row.length, num_layers=row.layers, vocab_size=50)  # fmt: skip
            own = GNNMoEModel(config)
            assert row.flops == 3 * (own.flops(row.batch, row.length) or 0)
            assert (row.peak_bytes or 0) > 4 * sum(part.nbytes for part in own.parameters())
            assert row.largest_difference == 0, "held against itself, not against the other model"
        assert {path.name for path in folder.glob("steps.*")} == {"steps.svg", "steps.png", "steps.csv"}
        assert "step, E 5, D 8, B 2, L 4, fp32, cpu" in capsys.readouterr().out

    @pytest.mark.parametrize(("asked", "remark"), [
        ([], "faster than its floor: "),
        (["--whole-steps"], "the steps did more FLOP/s than the matrix products"),
    ])  # fmt: skip
    def test_a_machine_whose_rates_are_too_low_ends_no_measurement(
        self, asked, remark, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr("bench.speed.machine.matrix_rate", lambda *_: 2.0)
        monkeypatch.setattr("bench.speed.suites.VOCABULARY", 50)
        arguments = [*TINY, *asked, "--coupler", "static", "--results-dir", str(tmp_path), "--name", "low"]
        assert speed.main(arguments) == 0
        data, rows = read_speed_record(tmp_path / "speed" / "low")
        assert data["status"] == "ok"
        assert [row.error for row in rows] == [None] * len(rows)
        mfu = rows[0].mfu
        assert mfu is not None
        assert mfu > 1
        assert remark in rows[0].remark
        assert remark in " ".join(capsys.readouterr().out.split())

    def test_ctrl_c_keeps_the_rows_and_says_so(self, tmp_path, capsys, monkeypatch):
        real = suites._of_forms

        def of_forms(case, *rest):
            if case == "GNN":
                raise KeyboardInterrupt
            return real(case, *rest)

        monkeypatch.setattr(suites, "_of_forms", of_forms)
        arguments = ["--couplers", "static,GNN", "--results-dir", str(tmp_path), "--name", "half"]
        assert speed.main([*TINY, *arguments]) == 130
        data, rows = read_speed_record(tmp_path / "speed" / "half")
        assert (data["status"], {row.subject for row in rows}) == ("stopped", {"static"})
        found = capsys.readouterr()
        assert found.err.endswith("interrupted: a record that was begun keeps what was measured.\n")
        assert "record: " in found.out

    @pytest.mark.parametrize("when", ["a row", "the end", "a plot"])
    def test_a_full_disk_is_one_line_and_its_own_status(self, when, tmp_path, capsys, monkeypatch):
        def full(path: Path, data: Any) -> None:
            sign = {"a row": b'"rows": [\n', "the end": b'"status": "ok"', "a plot": b"no such text"}[when]
            if sign in data:
                raise NotWritten(errno.ENOSPC, "No space left on device", str(path))
            write_whole(path, data)

        def full_for_plots(*_: object) -> None:
            raise NotWritten(errno.ENOSPC, "No space left on device", "cost.png")

        monkeypatch.setattr("bench.speed.record.write_whole", full)
        monkeypatch.setattr("bench.speed.show.write_plots", full_for_plots)
        arguments = ["--coupler", "static", "--results-dir", str(tmp_path), "--name", "full"]
        plot = ["--plot"] if when == "a plot" else []
        assert speed.main([*TINY, *arguments, *plot]) == NOT_WRITTEN
        found = capsys.readouterr()
        name = "cost.png" if plot else "speed.json"
        assert found.err.endswith(
            f"error: {name} cannot be written: No space left on device. The record keeps what was written "
            "before; make room, and measure again under another --name.\n"
        )
        assert "Traceback" not in found.err
        assert f"record: {tmp_path}" in found.out
        status = "ok" if plot else "running"
        assert read_speed_record(tmp_path / "speed" / "full")[0]["status"] == status

    def test_a_full_disk_for_the_plots_of_a_table_is_one_line(self, tmp_path, capsys, monkeypatch):
        def full(*_: object) -> None:
            raise NotWritten(errno.ENOSPC, "No space left on device", "steps.png")

        monkeypatch.setattr("bench.speed.show.write_plots", full)
        assert speed.main(["--table", str(RECORD), "--plot"]) == NOT_WRITTEN
        assert capsys.readouterr().err == "error: steps.png cannot be written: No space left on device.\n"

    def test_a_budget_leaves_out_by_name(self, tmp_path, capsys):
        arguments = ["--couplers", "static,GNN", "--time-budget", "0.000001s", "--results-dir", str(tmp_path)]
        assert speed.main([*TINY, *arguments]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "not measured, because the time budget ended: " in out
        assert "GNN, E 4, D 8, B 2, L 4 record: " in out

    @pytest.mark.parametrize(("arguments", "message"), [
        ("--coupler mean --hgnn-conv-type nope", "'nope'; allowed: "),
        ("--sizes E=0", "--sizes: E is '0'"),
        ("--coupler mean --sizes D=1048576", "lower embed_dim, num_experts, max_seq_length or batch_size."),
        ("--whole-steps --coupler mean --sizes D=1048576", "max_seq_length, vocab_size or batch_size."),
        ("--suite gpu", "--suite gpu needs a CUDA device, and this machine has none; take --suite cpu."),
        ("--whole-steps --couplers GNN,nope", "--couplers: unknown coupler 'nope'"),
        ("--whole-steps --sizes E=2,D=7", "embed_dim"),
        ("--suite cpu --whole-steps", "--suite cpu has its own whole_steps; drop"),
        ("--suite gpu --coupler GNN --compile", "--suite gpu has its own compile, coupler and its options"),
        ("--coupler GNN --data-dir .", "--data-dir is the text of --suite cpu"),
        ("--precision tf32 --device cpu", "tf32"),
        ("--compile-mode reduce-overhead", "--compile-mode reduce-overhead does nothing without --compile"),
        ("--name ../elsewhere", "plain folder name"),
        ("--page x.md", "--page writes the tables of --table RECORD"),
        ("--table nowhere", "nowhere holds no record of bench.speed"),
    ])  # fmt: skip
    def test_wrong_input_is_one_message_and_nothing_is_written(self, arguments, message, tmp_path, capsys,
                                                               monkeypatch):  # fmt: skip
        monkeypatch.chdir(tmp_path)
        assert message in refusal(capsys, arguments.split(), speed.main)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("text", "message"), [
        ("[" * 99_999, "it is nested too deeply"),
        ("[]", "speed.json is damaged: it is []; it must be an object"),
        ('{"schema_version": 1, "rows": []}', "speed.json is damaged: it lacks name"),
        ('{"schema_version": 9}', "schema_version is 9; it must be 1"),
    ])  # fmt: skip
    def test_a_damaged_record_is_named(self, text, message, tmp_path, capsys):
        (tmp_path / "speed.json").write_text(text)
        assert message in refusal(capsys, ["--table", str(tmp_path)], speed.main)

    @pytest.mark.parametrize(("place", "value", "message"), [
        (["machine"], [], "machine is []; it must be an object"),
        (["status"], "done", "status is 'done'; it must be 'running', 'ok' or 'stopped'"),
        (["environment", "packages"], None, "environment.packages is None; it must be an object"),
        (["rows", 0, "case"], 5, "rows.0.case is 5; it must be a text"),
        (["rows", 0], {"case": "a"}, "it lacks rows.0.subject"),
        (["rows", 0, "seconds"], [0.0], "rows.0.seconds.0 is 0.0; it must be a number above 0"),
        (["rows", 0, "precision"], "fp8", "rows.0.precision is 'fp8'; it must be 'fp32', 'tf32' or 'bf16'"),
        (["rows", 0, "flops"], 10**400, "it must be a smaller number"),
    ])  # fmt: skip
    def test_a_damaged_key_of_a_record_is_named(self, place, value, message, tmp_path, capsys):
        data = json.loads((RECORD / FILE).read_text())
        *parents, key = place
        reduce(lambda inner, name: inner[name], parents, data)[key] = value
        (tmp_path / FILE).write_text(json.dumps(data))
        found = refusal(capsys, ["--table", str(tmp_path)], speed.main)
        assert "speed.json is damaged: " in found
        assert message in found
        assert len(found) <= 240 + len(str(tmp_path))

    def test_without_flags_it_shows_its_help_and_measures_nothing(self, monkeypatch, tmp_path, capsys):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            speed.main([])
        assert not stopped.value.code
        assert "python -m bench.speed --suite all" in capsys.readouterr().out
        assert list(tmp_path.iterdir()) == []

    def test_all_suites_are_those_of_the_machine(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("bench.speed.suites.cpu_jobs", lambda *_: [])
        monkeypatch.chdir(tmp_path)
        assert speed.main(["--suite", "all"]) == 0
        [record] = Path("results/speed").glob(f"*/{FILE}")
        assert json.loads(record.read_text())["what"] == "cpu"
        said = " ".join(capsys.readouterr().out.split())
        assert (
            "not measured, because this machine has no CUDA device: parity; step B 32; step E 64; experts;"
            in said
        )
        assert said.endswith("curve; experts, compiled (--suite gpu)")
