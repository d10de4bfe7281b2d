"""One more executor is one more file."""

from __future__ import annotations

from pathlib import Path

import pytest

import bench.sweep.executors
from bench.cli import parse
from bench.sweep.__main__ import main
from bench.sweep.executors.base import Wanted, executors, make_executor, with_options
from bench.sweep.specification import SweepConfig
from tests.sweep._fake import Study

ONE_FILE = '''
"""A toy: runs one task after another, while it starts them."""

import subprocess
from bench.config import flags
from bench.sweep.executors.base import Executor
from gnnmoe.config import Refused


@flags
class Options:
    toy_greeting: str = "hello"
    """What it says."""


def make(options, wanted):
    if options.toy_greeting == "go away":
        raise Refused("the toy is offended.")
    return ToyExecutor(options.toy_greeting)


class ToyExecutor(Executor):
    slots = 1

    def __init__(self, greeting):
        self.greeting, self.done = greeting, {}

    def start(self, task):
        with task.log.open("a") as log:
            print(self.greeting, file=log, flush=True)
            self.done[task.run_id] = subprocess.call(task.command, stdout=log, stderr=log)

    def ended(self):
        done, self.done = self.done, {}
        return done

    def stop(self, run_id, *, at_once=False): ...
'''


@pytest.fixture
def one_more(tmp_path, monkeypatch):
    """Lay the file beside the others, as far as Python can tell."""
    folder = tmp_path / "executors"
    folder.mkdir()
    (folder / "toy.py").write_text(ONE_FILE)
    package = bench.sweep.executors
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    executors.cache_clear()
    yield
    executors.cache_clear()


@pytest.mark.usefixtures("one_more")
def test_one_more_executor_is_one_more_file(tmp_path, capsys):
    """Its name, its flags, their help and its errors are there, and it runs a sweep."""
    assert list(executors()) == ["local", "ray", "slurm", "toy"]
    study = Study(tmp_path)
    config = parse(with_options(SweepConfig), ["--executor", "toy", "--toy-greeting", "good morning"])
    toy = make_executor(config.executor, config, Wanted(device="cpu", logs=study.folder / ".logs"))
    assert study.sweep(study.runs("ok", "dies", "refused"), executor=toy).counts == {
        "ok": 1, "crashed": 1, "refused": 1
    }  # fmt: skip
    assert "good morning\n" in (study.folder / ".logs" / "run0.log").read_text()
    places = ["--data-source", "embedded", "--results-dir", str(tmp_path / "none")]
    for flags, said in (
        (["--toy-greeting", "go away"], "error: the toy is offended.\n"),
        (["--toy-greting", "hello"], "--toy-greeting"),
        (["--help"], "What it says."),
    ):
        with pytest.raises(SystemExit):
            main(["--sweep", "coupler=mean", *places, "--executor", "toy", *flags])
        assert said in "".join(capsys.readouterr())


def test_an_unknown_one_is_refused_with_the_nearest(tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--sweep", "coupler=mean", "--executor", "slum", "--results-dir", str(tmp_path / "none")])
    assert stopped.value.code == 2
    error = "error: unknown executor 'slum'; allowed: local, ray, slurm. Did you mean 'slurm'?\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--address", "auto"], "ray_address is for --executor ray, and this is local; drop it."),
        (["--slurm-time", "1h"], "slurm_time is for --executor slurm, and this is local; drop it."),
    ],
)
def test_flags_of_another_one_are_refused(tmp_path, capsys, flags, said):
    """Whoever forgets --executor slurm would train on the login node."""
    places = ["--data-source", "embedded", "--results-dir", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as stopped:
        main(["--sweep", "coupler=mean", "max_steps=1", *places, *flags])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
