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


@pytest.mark.parametrize("num_experts", ["1", "4"])
def test_the_example_passes_wherever_it_lies(copied, num_experts, capsys):
    assert check.main([*SMALL, "--coupler", f"{copied}:NormCoupler", "--num-experts", num_experts]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "has no leak, and every check agrees with its formula" in shown
    assert ("5 of 5 parameter tensors learn" if num_experts == "4" else "tau is inert") in shown


@pytest.mark.parametrize(
    "coupler", ["mine:NormCoupler", pytest.param("mine.py:NormCoupler", marks=pytest.mark.slow)]
)
def test_a_file_of_the_current_folder_is_found_as_module_and_as_file(copied, coupler):
    done = subprocess.run(
        [sys.executable, "-m", "bench.check", *SMALL, "--coupler", coupler], cwd=copied.parent,
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"passed: {coupler} at 4 experts" in done.stdout


@pytest.mark.parametrize(
    ("honest", "broken", "clause"), [("def reference(", "def naive(", "it does not implement reference;")]
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
