"""What a sweep asks of Slurm, and what is said where there is none; without Slurm."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from bench.sweep.executors.base import Resources, Wanted
from bench.sweep.executors.slurm import Options, SlurmQueue, outside_of_jobs, parameters_for
from tests.sweep.test_ray import refused


def test_without_the_package_or_slurm(tmp_path, small_data_dir, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        said = refused(tmp_path, small_data_dir, ["--executor", "slurm"], capsys)
        assert "pip install 'gnnmoe[slurm]'" in said
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="sbatch, squeue, scancel, which is not on this machine"):
        SlurmQueue().check()


def test_a_job_asks_for_what_its_run_needs(tmp_path):
    wanted = Wanted(device="cuda", logs=tmp_path / "study" / ".logs",
                    resources=Resources(cpus=8, gpus=2, processes=2))  # fmt: skip
    options = Options(slurm_partition="gpu", slurm_time="90m", slurm_option=("account=a=b", "exclusive"))
    assert parameters_for(options, wanted) == {
        "job_name": "study", "partition": "gpu", "time": 90, "cpus_per_task": 8, "gpus_per_node": 2,
        "srun_args": ["--cpus-per-task=8"], "signal_delay_s": 90,
        "additional_parameters": {"requeue": True, "account": "a=b", "exclusive": True},
    }  # fmt: skip
    options = replace(options, slurm_option=("gres=gpu:a100:2",))
    assert "gpus_per_node" not in parameters_for(options, wanted)
    with pytest.raises(ValueError, match="slurm_time is '2m'; it must be 5m or more"):
        parameters_for(Options(slurm_time="2m"), wanted)


def test_a_sweep_inside_a_job_does_not_hand_its_own_job_on(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "here")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    with outside_of_jobs():
        assert os.environ["SLURM_MEM_PER_NODE"] == "1"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with outside_of_jobs():
        assert {name for name in os.environ if name.startswith("SLURM")} == {"SLURM_CONF"}
    assert os.environ["SLURM_JOB_ID"] == "7"
