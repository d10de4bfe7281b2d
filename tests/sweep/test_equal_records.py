"""One sweep of four runs has equal records on this machine, on Ray and on Slurm, all of them real."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sweep._clusters import needs_ray, needs_slurm, needs_submitit, one_node_slurm, sweep_of_four
from tests.sweep.test_killed_sweep import assert_equal_but_for_times


@pytest.fixture(scope="module")
def local_four(tmp_path_factory, small_data_dir) -> Path:
    """The study on this machine."""
    return sweep_of_four(tmp_path_factory.mktemp("local"), small_data_dir)


def assert_equal_studies(study: Path, expected: Path) -> None:
    names = {path.parent.name for path in expected.glob("*/record.json")}
    assert len(names) == 4
    assert {path.parent.name for path in study.glob("*/record.json")} == names
    for name in names:
        assert_equal_but_for_times(study / name, expected / name)


@needs_ray
@pytest.mark.slow
def test_on_ray_that_is_started_for_the_sweep(tmp_path, small_data_dir, local_four, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    study = sweep_of_four(tmp_path, small_data_dir, "--executor", "ray")
    assert_equal_studies(study, local_four)
    assert not list((study / ".logs").glob("*.begun"))


@needs_slurm
@needs_submitit
@pytest.mark.slow
def test_on_slurm_as_an_array(tmp_path, small_data_dir, local_four):
    """Four jobs, two at a time on the node's two cores."""
    with one_node_slurm():
        flags = ("--executor", "slurm", "--slurm-option", "comment=tests")
        study = sweep_of_four(tmp_path, small_data_dir, *flags)
    assert_equal_studies(study, local_four)
    (script,) = (study / ".logs" / "slurm").glob("*_submission.sh")
    assert "#SBATCH --array=0-3%4" in script.read_text()
    assert "#SBATCH --comment=tests" in script.read_text()
