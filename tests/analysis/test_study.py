"""Which runs are seeds of one configuration, and which may share a table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.analysis.study import load_study
from tests.analysis._made_studies import made_study


def change(run: Path, **changes: object) -> None:
    """Change values of a record by dotted keys."""
    record = json.loads((run / "record.json").read_text())
    for dotted, value in changes.items():
        *groups, last = dotted.split("__")
        place = record
        for key in groups:
            place = place[key]
        place[last] = value
    (run / "record.json").write_text(json.dumps(record))


@pytest.fixture
def study(tmp_path) -> Path:
    return made_study(tmp_path / "made", {"mean": 0.0, "GNN": 0.02}, seeds=3, history=2)


def runs_of(study: Path, coupler: str) -> list[Path]:
    found = [path.parent for path in study.glob("*/record.json")
             if json.loads(path.read_text())["config"]["model"]["coupler_type"] == coupler]  # fmt: skip
    return sorted(found, key=lambda path: json.loads((path / "record.json").read_text())["seed"])


def test_seeds_of_a_configuration_stand_together(study):
    [group] = load_study(study).groups
    assert {found.label: [run.seed for run in found.runs] for found in group.configurations} == {
        "mean": [0, 1, 2], "GNN": [0, 1, 2]}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__sha256": "0" * 64}, "0" * 12),
        ({"environment__device_name": "Another CPU"}, "Another CPU"),
        ({"environment__threads": 7}, "7 threads"),
        ({"quality__validation__stride": 1}, "stride 1"),
        ({"quality__validation__tokens": 77}, "77 tokens"),
    ],
)
def test_other_corpora_devices_and_evaluations_never_share_a_table(study, changes, says):
    for run in runs_of(study, "GNN"):
        change(run, **changes)
    first, second = load_study(study).groups
    assert {found.label for found in (*first.configurations, *second.configurations)} == {"mean", "GNN"}
    assert says in first.setting.words() + second.setting.words()


def test_E3_another_used_batch_is_another_table_unless_allowed(study):
    """E3: rows whose used batch, length or evaluation differ are not compared unless told --allow-unequal."""
    for run in runs_of(study, "GNN"):
        change(run, used__ledger__epochs=[{"batch_size": 999}], quality__validation__stride=3)
    assert len(load_study(study).groups) == 2
    [group] = load_study(study, allow_unequal=True).groups
    assert len(group.configurations) == 2


def test_allow_unequal_never_joins_corpora_or_devices(study):
    change(runs_of(study, "GNN")[0], data__sha256="1" * 64)
    change(runs_of(study, "GNN")[1], environment__device_name="other")
    assert len(load_study(study, allow_unequal=True).groups) == 3


def test_a_run_that_failed_early_stands_with_its_configuration(tmp_path):
    path = made_study(tmp_path / "made", {"mean": 0.0, "GNN": 0.02}, seeds=3, history=2,
                      failed={("GNN", 1): "crashed", ("GNN", 2): "oom"})  # fmt: skip
    for run in runs_of(path, "GNN")[1:]:
        change(run, environment={"value": None, "reason": "did not get so far"})
    [group] = load_study(path).groups
    gnn = next(found for found in group.configurations if found.label == "GNN")
    assert [run.status for run in gnn.runs] == ["ok", "crashed", "oom"]
    assert list(gnn.counted) == [0]


def test_a_failed_run_with_another_batch_is_not_put_with_those_that_differ(study):
    """E3, for a run that ended before it used anything: what it asked for counts."""
    run = runs_of(study, "GNN")[0]
    nothing = {"value": None, "reason": "out of memory"}
    change(run, status="oom", used=nothing, quality=nothing, config__training__batch_size=4096)
    assert [len(group.runs) for group in load_study(study).groups] == [5, 1]


def test_gate_failed_runs_are_rows_that_do_not_count(study):
    change(runs_of(study, "GNN")[0], status="gate_failed")
    [group] = load_study(study).groups
    gnn = next(found for found in group.configurations if found.label == "GNN")
    assert list(gnn.counted) == [1, 2]
    assert len(gnn.runs) == 3


def test_runs_set_aside_are_passed_over_and_damaged_ones_are_told(study):
    first, second, _ = runs_of(study, "mean")
    first.rename(first.with_name(first.name + ".1"))
    (second / "record.json").write_text("{")
    found = load_study(study)
    assert len(found.runs) == 4
    [(folder, why)] = found.unreadable
    assert folder.name == second.name
    assert "cut short" in why


def test_losses_by_article_add_up_to_the_record(study):
    run = load_study(study).runs[0]
    found = run.articles
    assert found is not None
    scored = run.record["quality"]["validation"]
    assert np.isclose(found[0].sum(), scored["nll_sum"], rtol=1e-6)
    assert found[1].sum() == scored["tokens"]


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no study"):
        load_study(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no record"):
        load_study(tmp_path / "empty")


def test_runs_that_were_tuned_share_a_table_with_those_that_ran_out_of_memory(tmp_path):
    path = made_study(tmp_path / "made", {"mean": 0.0, "GNN": 0.02, "gate": 0.0}, seeds=3, history=2,
                      failed={("GNN", 1): "oom", "gate": "oom"})  # fmt: skip
    nothing = {"value": None, "reason": "out of memory"}
    for coupler in ("mean", "GNN", "gate"):
        for run in runs_of(path, coupler):
            failed = json.loads((run / "record.json").read_text())["status"] == "oom"
            change(run, **({"used": nothing} if failed else {"used__ledger__epochs": [{"batch_size": 8}]}))
    [group] = load_study(path).groups
    assert len(group.runs) == 9
    assert "batch 8 × " in group.setting.words()


def test_a_failed_run_goes_to_the_table_of_its_own_configuration(study):
    nothing = {"value": None, "reason": "out of memory"}
    for run in runs_of(study, "GNN"):
        change(run, used__ledger__epochs=[{"batch_size": 999}])
    change(runs_of(study, "GNN")[0], status="oom", used=nothing, quality=nothing)
    found = [
        {(one.label, len(one.runs)) for one in group.configurations} for group in load_study(study).groups
    ]
    assert sorted(found, key=str) == [{("GNN", 3)}, {("mean", 3)}]


def test_failed_runs_that_asked_for_other_batches_are_told_apart_in_words(study):
    nothing = {"value": None, "reason": "out of memory"}
    for run, size in zip(runs_of(study, "GNN"), (4096, 4096, 8192), strict=True):
        change(run, status="oom", used=nothing, quality=nothing, config__training__batch_size=size)
    words = [group.setting.words() for group in load_study(study).groups]
    assert [text.rpartition(" · ")[2].partition(" × ")[0] for text in words] == [
        "batch 16", "batch 4096", "batch 8192"]  # fmt: skip
    assert len(load_study(study, allow_unequal=True).groups) == 1


def test_a_study_is_named_by_its_folder_wherever_one_stands(study, monkeypatch):
    monkeypatch.chdir(study)
    assert load_study(Path()).name == "made"
