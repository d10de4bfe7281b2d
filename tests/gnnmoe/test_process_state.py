"""A coupler that changes a setting of the whole process is refused, each time; the setting is put back."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from bench.config import ExecutionConfig
from bench.run.__main__ import main
from bench.training.step import Execution
from gnnmoe import GNNMoEModel, discovery
from gnnmoe.couplers.registry import COUPLERS, build_coupler, coupler_class, coupler_names
from gnnmoe.process_state import ProcessStateChanged, changed_state, torch_state, unchanged_state
from tests.gnnmoe.test_coupler_files import MINE, config

CPU = torch.device("cpu")
CHANGES = {
    "default dtype: torch.float32 → torch.float64": lambda: torch.set_default_dtype(torch.float64),
    "default device: cpu → meta": lambda: torch.set_default_device("meta"),
    "float32 matmul precision: highest → medium": lambda: torch.set_float32_matmul_precision("medium"),
    "torch.backends.mkldnn.matmul.fp32_precision: ieee → bf16": lambda: setattr(
        attrgetter("mkldnn.matmul")(torch.backends), "fp32_precision", "bf16"
    ),
    "torch.backends.fp32_precision: ieee → tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "torch.backends.cudnn.allow_tf32: True → False": lambda: setattr(
        torch.backends.cudnn, "allow_tf32", False
    ),
    "torch.backends.cudnn.benchmark: False → True": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "torch.backends.mkldnn.enabled: True → False": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "grad mode: True → False": lambda: torch.set_grad_enabled(False),
    "autocast on the CPU: False, torch.bfloat16 → True, torch.bfloat16": lambda: torch.set_autocast_enabled(
        "cpu", True
    ),
    "deterministic algorithms: off → warn": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "flushing of denormal numbers: False → True": lambda: torch.set_flush_denormal(True),
    "plain attention: True → False": lambda: torch.backends.cuda.enable_math_sdp(False),
    "hooks on every module: 0 → 1": lambda: register_module_forward_hook(print),
    "current folder": lambda: os.chdir("/"),
}


@pytest.fixture(autouse=True)
def as_before():
    before, random_state = torch_state(), torch.get_rng_state()
    yield
    assert changed_state(before) == []
    assert torch.equal(torch.get_rng_state(), random_state)


def written(folder: Path, first: str, name: str = "mine.py", coupler: str = MINE) -> Path:
    path = folder / name
    path.write_text(f"import torch\n{first}\n{coupler}", encoding="utf-8")
    return path


@pytest.mark.parametrize("said", CHANGES)
def test_each_setting_is_seen_and_put_back(said):
    with pytest.raises(ProcessStateChanged) as refused, unchanged_state("a test"):
        CHANGES[said]()
    assert str(refused.value).startswith("a test changes settings of the whole process (")
    assert said in str(refused.value)


def test_what_an_error_leaves_behind_is_put_back_and_the_error_comes_out():
    def fail():
        torch.set_num_threads(torch.get_num_threads() + 1)
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"), unchanged_state("a test"):
        fail()


def test_the_harness_sets_what_it_states_without_being_told_of():
    before = torch_state()
    Execution(ExecutionConfig(), CPU).build(config("mean"), 0)
    assert changed_state(before) == []


def test_a_file_is_refused_each_time_and_runs_once_it_is_mended(tmp_path):
    (tmp_path / "library_of_state.py").write_text("import torch\ntorch.set_default_dtype(torch.float64)\n")
    imports = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport library_of_state"
    path = written(tmp_path, imports)  # a second execution imports nothing anew
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"the file .*mine.py changes .*default dtype"):
                coupler_class(f"{path}:Scaled")
        written(tmp_path, "")
        assert coupler_class(f"{path}:Scaled").name == "mine.py:Scaled"
    finally:
        sys.path.remove(str(tmp_path))
        del sys.modules["library_of_state"]


def test_a_module_is_refused_each_time_and_registers_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    register = "from gnnmoe import register_coupler\n@register_coupler('scaled by state')\nclass Scaled"
    written(tmp_path, "torch.set_num_threads(7)", "state_module.py", MINE.replace("class Scaled", register))
    for name in ("Scaled", "Scaled", "Another"):
        with pytest.raises(ValueError, match=r"the module state_module changes .*threads: \d+ → 7"):
            coupler_class(f"state_module:{name}")
    assert "scaled by state" not in coupler_names()
    assert "mean" in coupler_names()
    with pytest.raises(ValueError, match="unknown coupler"):
        coupler_class("scaled by state")


def test_an_entry_point_that_changes_a_setting_is_left_out_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    written(tmp_path, "torch.set_default_device('meta')", "state_package.py")
    point = EntryPoint("scaled", "state_package:Scaled", "gnnmoe.couplers")
    monkeypatch.setattr(discovery, "entry_points", lambda group: [point])
    COUPLERS.forget_discovery()
    try:
        with pytest.warns(UserWarning, match=r"'scaled' .* is left out: .*default device: cpu → meta"):
            assert "scaled" not in coupler_names()
    finally:
        COUPLERS.forget_discovery()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch.set_float32_matmul_precision('high')", "the constructor of coupler .*matmul precision"),
        ("torch.manual_seed(0)", "seeds torch's random numbers, so that runs with different seeds"),
        ("self.w = torch.nn.Parameter(torch.ones(3).double())", r"has w in torch\.float64"),
        ("self.register_buffer('b', torch.ones(3).bfloat16())", r"has b in torch\.bfloat16"),
    ],
)  # fmt: skip
def test_a_constructor_that_does_it_is_refused(tmp_path, line, said):
    own = MINE.replace("        self.settings", f"        {line}\n        self.settings")
    path = written(tmp_path, "", coupler=own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=said):
            build_coupler(config(f"{path}:Scaled"))


def test_a_model_is_float32_in_every_precision():
    for precision in ("fp32", "bf16"):
        model = Execution(ExecutionConfig(precision=precision), CPU).build(config("HGNN"), 0)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ValueError, match=r"the model has token_embedding.weight in torch.float64"):
            Execution(ExecutionConfig(), CPU).build(config("mean"), 0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_seeds_in_a_file_change_no_number(tmp_path):
    """Neither those of a run, nor what torch's generator gives to others."""
    models = []
    for name, first in (("plain.py", ""), ("seeding.py", "torch.manual_seed(0); torch.rand(5)")):
        path = written(tmp_path, first, name)
        torch_before = torch.get_rng_state()
        models.append(GNNMoEModel(config(f"{path}:Scaled", num_layers=2), seed=3))
        assert torch.equal(torch.get_rng_state(), torch_before)
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_run_is_refused_in_one_line_before_anything_is_written(tmp_path, capsys):
    path = written(tmp_path, "torch.set_default_dtype(torch.bfloat16)")
    flags = ["--coupler", f"{path}:Scaled", "--data-source", "embedded", "--results-dir", str(tmp_path / "r")]
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main(flags)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: loading the file")
    assert not (tmp_path / "r").exists()
