"""One leak check per configuration: which verdicts a run reuses from another seed, and what it says then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.check.leak_check import CHECKS
from bench.cli import parse
from bench.config import RunConfig
from bench.record import not_measured
from bench.run import resume as leak_check
from bench.run.__main__ import main
from bench.run.prepare import prepare
from bench.sweep.__main__ import main as sweep
from bench.training.environment import describe_environment
from tests.bench._runs import only_run
from tests.bench.conftest import TINY

REUSE = "--reuse-check"


@pytest.fixture(scope="module")
def _run_of_seed_0(small_data_dir, tmp_path_factory) -> list[str]:
    results = tmp_path_factory.mktemp("checked") / "results"
    flags = [
        *TINY,
        "--no-speed",
        "--device",
        "cpu",
        "--data-dir",
        str(small_data_dir),
        "--results-dir",
        str(results),
    ]
    assert main([*flags, "--seed", "0", REUSE]) == 0
    return flags


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def flags(_run_of_seed_0, results) -> list[str]:
    """Flags of a run whose results folder holds a run of seed 0, which made its leak check."""
    shutil.copytree(_run_of_seed_0[-1], results)
    return [*_run_of_seed_0[:-1], str(results)]


@pytest.fixture
def checks(flags, monkeypatch) -> Callable[..., bool]:
    """Say whether a run with these flags makes the leak check itself; nothing is trained."""

    def checks(*more: str, here: dict[str, Any] | None = None) -> bool:
        made: list[bool] = []
        monkeypatch.setattr(leak_check, "run_leak_check", lambda *_, **__: made.append(True))
        prepared = prepare(parse(RunConfig, [*flags, *more], presets=True))
        prepared.folder.path.mkdir(parents=True, exist_ok=True)  # of its log
        environment = describe_environment(prepared.device, prepared.code, 1, prepared.ranks.backend)
        leak_check.leak_check_of(prepared, environment.model_copy(update=here or {}))
        return bool(made)

    return checks


def test_another_seed_takes_the_verdict_and_says_whose_it_is(flags, checks, results, capsys):
    folder, first = only_run(results)
    assert not any(check["reused_from"] for check in first["check"]["checks"].values())
    assert main([*flags, "--seed", "1", REUSE]) == 0
    assert f"checks before training are from run {first['run_id']}" in " ".join(
        capsys.readouterr().out.split()
    )
    (other,) = set(results.glob("*/*/record.json")) - {folder / "record.json"}
    second = json.loads(other.read_text())
    assert second["check"]["passed"]
    for name in CHECKS:
        ours, theirs = (record["check"]["checks"][name] for record in (second, first))
        assert ours == {**theirs, "seconds": 0.0, "reused_from": first["run_id"]}
    own = second["check"]["checks"]["trained_isolation"]
    assert own["reused_from"] is None
    assert own["seconds"] > 0
    # what is left for these two is a verdict that was itself reused
    assert checks("--seed", "0", REUSE, "--force")
    shutil.rmtree(folder)
    assert checks("--seed", "2", REUSE)


def test_a_run_by_itself_and_a_run_of_more_than_another_seed_are_checked(checks):
    assert not checks("--seed", "1", REUSE)
    assert checks("--seed", "1")
    assert checks("--seed", "1", REUSE, "--num-experts", "3")
    assert checks("--seed", "1", REUSE, "--study", "other")


@pytest.mark.parametrize(
    ("here", "checked"),
    [
        ({"project_sha256": "0" * 64}, True), ({"device_name": "another"}, True), ({"threads": 99}, True),
        ({"git_commit": "0" * 40}, False),
    ],
)  # fmt: skip
def test_another_code_or_device_is_checked_and_another_commit_is_not(checks, here, checked):
    assert checks("--seed", "1", REUSE, here=here) is checked


def test_a_coupler_from_elsewhere_is_always_checked(flags, checks, tmp_path):
    """Its file may import others."""
    file = tmp_path / "own_coupler.py"
    file.write_text((Path(__file__).parents[2] / "examples" / "twenty_line_coupler.py").read_text())
    coupler = ("--coupler", f"{file}:NormCoupler")
    assert main([*flags, *coupler, "--seed", "0", REUSE]) == 0
    assert checks(*coupler, "--seed", "1", REUSE)


def one_failed(record: dict[str, Any]) -> dict[str, Any]:
    record["check"]["checks"]["token_isolation"]["passed"] = False
    return record


@pytest.mark.parametrize(
    "change",
    [
        one_failed,
        lambda record: record | {"check": {"passed": True, "checks": dict.fromkeys(CHECKS)}},
        lambda _: [],
    ],
    ids=["failed", "empty checks", "no record"],
)
def test_a_verdict_that_is_damaged_or_did_not_pass_is_never_taken(checks, results, change):
    folder, record = only_run(results)
    (folder / "record.json").write_text(json.dumps(change(record)))
    assert checks("--seed", "1", REUSE)


def test_a_sweep_asks_for_it(monkeypatch, tmp_path, small_data_dir):
    asked, done = [], SimpleNamespace(exit_status=0)
    monkeypatch.setattr("bench.sweep.work.execute", lambda *a, **k: asked.append(k["places"]) or done)
    flags = [
        "--sweep",
        "coupler=mean",
        "min_steps_per_epoch=1",
        "--results-dir",
        str(tmp_path),
        "--data-dir",
        str(small_data_dir),
    ]
    assert sweep([*flags]) == sweep([*flags, "--force"]) == 0
    assert [REUSE in places for places in asked] == [True, False], "--force: all runs again, and all of each"


@pytest.mark.parametrize(("fit_shape", "alone"), [(True, True), (False, False)])
def test_a_fitted_length_and_a_run_of_several_ranks_are_checked(monkeypatch, fit_shape, alone):
    """The length is not in the identity that seeds share, and all ranks must do the same."""
    monkeypatch.setattr(leak_check, "_other_seeds", lambda _: pytest.fail("looked for another's verdict"))
    monkeypatch.setattr(leak_check, "run_leak_check", lambda *_, **__: "its own")
    config = SimpleNamespace(
        memory=SimpleNamespace(fit_shape=fit_shape), model=SimpleNamespace(coupler_type="mean"),
        places=SimpleNamespace(reuse_check=True), training=SimpleNamespace(seed=0),
    )  # fmt: skip
    prepared: Any = SimpleNamespace(config=config, ranks=SimpleNamespace(alone=alone), model_config=None,
                                    device=torch.device("cpu"))  # fmt: skip
    assert leak_check.leak_check_of(prepared, not_measured("made")) == "its own"
