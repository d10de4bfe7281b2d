"""One leak check per configuration: which verdicts a run reuses from another seed, and what it says then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.check.leak_check import CHECKS
from bench.record import not_measured
from bench.run import resume as leak_check
from bench.run.__main__ import main

REUSE = "--reuse-check"


@pytest.fixture
def run(tiny, monkeypatch, capsys):
    """Run once with these flags; returns its record and how often the leak check ran."""
    calls = []
    plain = leak_check.run_leak_check
    monkeypatch.setattr(leak_check, "run_leak_check", lambda *a, **k: calls.append(1) or plain(*a, **k))
    results = Path(tiny[tiny.index("--results-dir") + 1])

    def go(*flags: str, status: int = 0):
        calls.clear()
        before = set(results.glob("*/*/record.json"))
        assert main([*tiny, *flags]) == status
        [path] = set(results.glob("*/*/record.json")) - before
        return json.loads(path.read_text()), len(calls)

    return go


def test_another_seed_takes_the_verdict_and_says_whose_it_is(run, tmp_path, capsys):
    first, checked = run("--seed", "0", REUSE)
    assert checked == 1
    assert not any(check["reused_from"] for check in first["check"]["checks"].values())
    capsys.readouterr()
    second, checked = run("--seed", "1", REUSE)
    assert checked == 0
    assert f"the checks before training are those of run {first['run_id']}" in " ".join(
        capsys.readouterr().out.split()
    )
    assert second["check"]["passed"]
    for name in CHECKS:
        ours, theirs = (record["check"]["checks"][name] for record in (second, first))
        assert ours == {**theirs, "seconds": 0.0, "reused_from": first["run_id"]}
    own = second["check"]["checks"]["trained_isolation"]
    assert own["reused_from"] is None
    assert own["seconds"] > 0
    (folder,) = tmp_path.glob(f"results/*/{first['run_id']}")
    shutil.rmtree(folder)  # what is left is a verdict that was taken itself
    assert run("--seed", "2", REUSE)[1] == 1


def test_a_run_by_itself_always_checks(run):
    run("--seed", "0")
    assert run("--seed", "1")[1] == 1


def test_what_differs_in_more_than_its_seed_is_checked(run):
    run("--seed", "0", REUSE)
    assert run("--seed", "1", REUSE, "--num-experts", "3")[1] == 1
    assert run("--seed", "1", REUSE, "--study", "other")[1] == 1


def test_another_code_or_device_is_checked_and_another_commit_is_not(run, monkeypatch):
    run("--seed", "0", REUSE)
    plain = leak_check._same
    cases = (({"project_sha256": "0" * 64}, 1), ({"device_name": "another"}, 1),
                            ({"threads": 99}, 1), ({"git_commit": "0" * 40}, 0))  # fmt: skip
    for seed, (changes, checks) in enumerate(cases, 1):
        monkeypatch.setattr(
            leak_check,
            "_same",
            lambda there, here, new=changes: plain(there, here.model_copy(update=new)),
        )
        assert run("--seed", str(seed), REUSE)[1] == checks, changes


def test_a_coupler_from_elsewhere_is_always_checked(run, tmp_path):
    """Its file may import others. One that adds nothing up over tokens is refused once it does."""
    file = tmp_path / "own_coupler.py"
    source = (Path(__file__).parents[2] / "examples" / "twenty_line_coupler.py").read_text()
    file.write_text(source)
    coupler = ("--coupler", f"{file}:NormCoupler")
    run(*coupler, "--seed", "0", REUSE)
    assert run(*coupler, "--seed", "1", REUSE)[1] == 1
    honest = "return self.combiner((weights * expert_outputs).sum(2))"
    assert honest in source
    file.write_text(source.replace(honest, honest[:-1] + " + expert_outputs.mean(1, keepdim=True).sum(2))"))
    record, checked = run(*coupler, "--seed", "2", REUSE, status=1)
    assert (checked, record["status"]) == (1, "check_failed")


def test_a_verdict_that_did_not_pass_is_never_taken(run):
    leak = ("--coupler", "examples.leaking_coupler:LeakingCoupler", "--num-experts", "4")
    run(*leak, "--seed", "0", REUSE, status=1)
    assert run(*leak, "--seed", "1", REUSE, status=1)[1] == 1


def test_a_verdict_is_taken_from_a_run_that_checked_for_itself(run, tmp_path):
    """Else a run that is forced would take its own, by way of another seed's."""
    first, _ = run("--seed", "0", REUSE)
    second, checked = run("--seed", "1", REUSE)
    assert checked == 0
    assert {c.get("reused_from") for n, c in second["check"]["checks"].items() if n in CHECKS} == {
        first["run_id"]
    }
    assert run("--seed", "0", REUSE, "--force")[1] == 1
    (path,) = tmp_path.glob(f"results/*/{first['run_id']}/record.json")
    checks = json.loads(path.read_text())["check"]["checks"].values()
    assert not any(check["reused_from"] for check in checks)


def test_a_damaged_record_is_passed_over(run, tmp_path):
    first, _ = run("--seed", "0", REUSE)
    (path,) = (tmp_path / "results").glob(f"*/{first['run_id']}/record.json")
    path.write_text("{")
    assert run("--seed", "1", REUSE)[1] == 1


def test_a_sweep_asks_for_it(monkeypatch, tmp_path, small_data_dir):
    from bench.sweep import __main__ as sweep
    from bench.sweep import work

    asked = []
    monkeypatch.setattr(work, "execute", lambda *a, **k: asked.append(k["places"]) or _Done())
    assert sweep.main(["--sweep", "coupler=mean", "--results-dir", str(tmp_path),
                       "--data-dir", str(small_data_dir)]) == 0  # fmt: skip
    assert REUSE in asked[0]
    sweep.main(["--sweep", "coupler=mean", "--results-dir", str(tmp_path), "--data-dir", str(small_data_dir),
                "--force"])  # fmt: skip
    assert REUSE not in asked[1], "all runs again, and all of each"


class _Done:
    exit_status = 0


@pytest.mark.parametrize(("fit_shape", "alone"), [(True, True), (False, False)])
def test_a_fitted_length_and_a_run_of_several_ranks_are_checked(monkeypatch, fit_shape, alone):
    """The length is not in the identity that seeds share, and all ranks must do the same."""
    monkeypatch.setattr(
        leak_check, "_other_seeds", lambda _: pytest.fail("looked for another seed's verdict")
    )
    monkeypatch.setattr(leak_check, "run_leak_check", lambda *_, **__: "its own")
    config = SimpleNamespace(
        memory=SimpleNamespace(fit_shape=fit_shape), model=SimpleNamespace(coupler_type="mean"),
        places=SimpleNamespace(reuse_check=True), training=SimpleNamespace(seed=0),
    )  # fmt: skip
    prepared: Any = SimpleNamespace(config=config, ranks=SimpleNamespace(alone=alone), model_config=None,
                                    device=torch.device("cpu"))  # fmt: skip
    assert leak_check.leak_check_of(prepared, not_measured("made")) == "its own"


@pytest.mark.parametrize("check", [{"passed": True}, {"passed": True, "checks": dict.fromkeys(CHECKS)}])
def test_a_record_whose_verdict_is_damaged_is_passed_over(run, tmp_path, check):
    first, _ = run("--seed", "0", REUSE)
    (path,) = (tmp_path / "results").glob(f"*/{first['run_id']}/record.json")
    path.write_text(json.dumps(first | {"check": check}))
    assert run("--seed", "1", REUSE)[1] == 1
