"""A coupler in a file of one's own, on the command line: checked, run, refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.check import __main__ as check
from bench.run import __main__ as run

EXAMPLE = Path(__file__).parents[2] / "examples" / "twenty_line_coupler.py"
SMALL = ["--embed-dim", "16", "--max-seq-length", "12"]
RUN = ["--data-source", "embedded", "--max-steps", "3", "--eval-every", "3", "--num-eval-samples", "8",
       "--batch-size", "2", *SMALL, "--no-plots", "--quiet"]  # fmt: skip


@pytest.fixture
def copied(tmp_path) -> Path:
    """The example, in a folder outside the repository."""
    return Path(shutil.copy(EXAMPLE, tmp_path / "mine.py"))


def test_the_example_has_forward_alone_and_passes_wherever_it_lies(copied, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert check.main([*SMALL, "--coupler", f"{copied}:NormCoupler"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "passed: NormCoupler at 4 experts, width 16 has no leak; no reference given" in shown
    assert "5 of 5 parameter tensors learn" in shown
    assert "(counted by PyTorch; the coupler has no flops())" in shown
    assert len(copied.read_text().splitlines()) < 25


@pytest.mark.slow
def test_a_module_of_the_current_folder_is_found(copied):
    coupler = "mine:NormCoupler"
    done = subprocess.run(
        [sys.executable, "-m", "bench.check", *SMALL, "--coupler", coupler], cwd=copied.parent,
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: NormCoupler at 4 experts" in done.stdout


CACHING = """
from functools import cache

import torch

from gnnmoe import Coupler

ONES = torch.ones(1)


@cache
def mean_matrix(n):
    return torch.full((n, n), 1.0 / n)


class Averaging(Coupler):
    def __init__(self, config):
        super().__init__(config)
        self.matrix = mean_matrix(config.num_experts) * ONES

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(torch.einsum("fe,bled->bld", self.matrix.to(expert_outputs), expert_outputs))
"""


def test_a_file_that_keeps_a_tensor_of_its_constructor_passes(tmp_path, capsys):
    """Its cost is found by building it without numbers, and no such tensor may come back from its cache."""
    (tmp_path / "mine.py").write_text(CACHING)
    assert check.main([*SMALL, "--coupler", f"{tmp_path / 'mine.py'}:Averaging"]) == 0
    assert "passed: Averaging" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("honest", "broken", "clause"), [("def forward(", "def mix(", "it does not implement forward;")]
)
@pytest.mark.parametrize("command", ["check", "run"])
def test_a_broken_contract_is_wrong_input_and_nothing_is_written(
    command, honest, broken, clause, copied, tmp_path, capsys
):
    source = copied.read_text(encoding="utf-8")
    assert honest in source
    copied.write_text(source.replace(honest, broken), encoding="utf-8")
    arguments = [*SMALL, "--coupler", f"{copied}:NormCoupler"]
    if command == "run":
        arguments = [*RUN, *arguments, "--results-dir", str(tmp_path / "results")]
    with pytest.raises(SystemExit) as stopped:
        (check if command == "check" else run).main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: coupler '{copied}:NormCoupler' breaks the contract: {clause}")
    assert not shown.out
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_run_is_known_by_its_class_and_not_by_the_place_of_its_file(copied, tmp_path, capsys):
    arguments = [*RUN, "--results-dir", str(tmp_path / "results")]
    assert run.main([*arguments, "--coupler", f"{copied}:NormCoupler"]) == 0
    (path,) = tmp_path.glob("results/*/*/record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["status"], record["run_id"]) == ("ok", path.parent.name)
    assert record["config"]["model"]["coupler_type"] == f"{copied.name}:NormCoupler"
    moved = tmp_path / "elsewhere" / "renamed.py"
    moved.parent.mkdir()
    shutil.move(copied, moved)
    capsys.readouterr()
    assert run.main([*arguments, "--coupler", f"{moved}:NormCoupler"]) == 0
    assert f"run {record['run_id']} is finished" in capsys.readouterr().out
    assert list(tmp_path.glob("results/*/*/record.json")) == [path]


LAYER = '''
from gnnmoe import HypergraphLayer


class Scaled(HypergraphLayer):
    """Means of means, scaled."""

    def forward(self, x_NED, from_weights, start_NED):
        return 1.0 * (from_weights @ self.mean_of_members(x_NED))


def star(num_experts, *, hub=0):
    """A hub and its spokes."""
    return [(hub, expert) for expert in range(num_experts) if expert != hub]
'''


def test_a_layer_and_a_strategy_of_ones_own_are_trained_and_an_edit_runs_again(tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(LAYER)
    arguments = [*RUN[:-1], "--results-dir", str(tmp_path / "results"), "--no-reuse-check"]
    arguments += ["--static-hyperedge-strategy", f"{mine}:star:hub=1", "--coupler-option", "residual=false"]
    assert run.main([*arguments, "--hgnn-conv-type", f"{mine}:Scaled"]) == 0
    assert "HGNN · Scaled · star:hub=1 · residual=false · E 4 · seed 0" in capsys.readouterr().out
    (path,) = tmp_path.glob("results/*/*/record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    model = record["config"]["model"]
    assert model["hgnn_conv_type"] == "mine.py:Scaled"
    assert model["static_hyperedge_strategy"] == "mine.py:star:hub=1"
    assert str(tmp_path) not in path.read_text(encoding="utf-8")

    mine.write_text(LAYER.replace("1.0", "2.0"))
    assert run.main([*arguments, "--hgnn-conv-type", f"{mine}:Scaled"]) == 0
    assert f"run {record['run_id']} is stale" in " ".join(capsys.readouterr().out.split())
    assert (path.parent.parent / f"{record['run_id']}.1" / "record.json").is_file()

    other = tmp_path / "other.py"
    other.write_text(LAYER.replace("1.0", "3.0"))
    with pytest.raises(SystemExit) as stopped:
        run.main([*arguments, "--hgnn-conv-type", f"{other}:Scaled"])
    assert stopped.value.code == 2
    assert "the study has runs of a class Scaled from mine.py already" in capsys.readouterr().err
