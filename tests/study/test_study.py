"""Which runs are seeds of one configuration, and which may share a table."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bench.report.comparison import compare
from bench.report.contents import make_plots, make_report
from bench.report.quantities import TOKENS_PER_SECOND
from bench.study.hypotheses import Hypothesis
from bench.study.runs import load_study
from tests._records import epochs
from tests.report._made_studies import made_study


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
    assert says in first.basis.words() + second.basis.words()


def test_E3_another_used_batch_is_another_table_unless_allowed(study):
    """E3: rows whose used batch, length or evaluation differ are not compared unless told --allow-unequal."""
    for run in runs_of(study, "GNN"):
        change(run, used__ledger__epochs=epochs(999), quality__validation__stride=3)
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
    change(run, status="oom", used=nothing, quality=nothing, config__training__batch_size=4096,
           configuration="4096" * 3)  # fmt: skip
    assert [len(group.runs) for group in load_study(study).groups] == [5, 1]


def test_check_failed_runs_are_rows_that_do_not_count(study):
    change(runs_of(study, "GNN")[0], status="check_failed")
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
    scored = run.record.split()
    assert scored is not None
    assert np.isclose(found[0].sum(), scored.nll_sum, rtol=1e-6)
    assert found[1].sum() == scored.tokens


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
            change(run, **({"used": nothing} if failed else {"used__ledger__epochs": epochs(8)}))
    [group] = load_study(path).groups
    assert len(group.runs) == 9
    assert "batch 8 × " in group.basis.words()


def test_a_failed_run_goes_to_the_table_of_its_own_configuration(study):
    nothing = {"value": None, "reason": "out of memory"}
    for run in runs_of(study, "GNN"):
        change(run, used__ledger__epochs=epochs(999))
    change(runs_of(study, "GNN")[0], status="oom", used=nothing, quality=nothing)
    found = [
        {(one.label, len(one.runs)) for one in group.configurations} for group in load_study(study).groups
    ]
    assert sorted(found, key=str) == [{("GNN", 3)}, {("mean", 3)}]


def test_failed_runs_that_asked_for_other_batches_are_told_apart_in_words(study):
    nothing = {"value": None, "reason": "out of memory"}
    for run, size in zip(runs_of(study, "GNN"), (4096, 4096, 8192), strict=True):
        change(run, status="oom", used=nothing, quality=nothing, config__training__batch_size=size,
               configuration=f"{size:012}")  # fmt: skip
    words = [group.basis.words() for group in load_study(study).groups]
    assert [text.rpartition(" · ")[2].partition(" × ")[0] for text in words] == [
        "batch 16", "batch 4096", "batch 8192"]  # fmt: skip
    assert len(load_study(study, allow_unequal=True).groups) == 1


def test_a_study_is_named_by_its_folder_wherever_one_stands(study, monkeypatch):
    monkeypatch.chdir(study)
    assert load_study(Path()).name == "made"


CODES = ("a" * 64, "b" * 64)


@pytest.fixture
def two_models(tmp_path) -> Path:
    """A coupler's file of which there are two versions: seeds 0 and 2 are of the one, 1 of the other."""
    couplers = {"mean": 0.0, "own": 0.02, "HGNN all_pairs": 0.1}
    path = made_study(tmp_path / "made", couplers, seeds=3, history=2, names={"own": "c.py:C"})
    for run in runs_of(path, "c.py:C"):
        seed = json.loads((run / "record.json").read_text())["seed"]
        change(run, environment__coupler_sha256=CODES[seed % 2])
    return path


def test_two_versions_of_a_coupler_are_two_rows(two_models):
    """And none of their runs is taken for a seed of the other, by no table, plot, cost or hypothesis."""
    report = make_report(load_study(two_models), None, [
        Hypothesis("own is better", {"coupler_type": "c.py:C"}, {"coupler_type": "mean"}),
        Hypothesis("pairs are worse", {"coupler_type": "mean"}, {"coupler_type": "HGNN"})])  # fmt: skip
    [section] = report.sections
    rows = {row.configuration.label: row for row in section.comparison.rows}
    one, other = "C · code aaaaaaaa", "C · code bbbbbbbb"
    assert set(rows) == {"mean", one, other, "HGNN"}
    assert [list(rows[label].loss.values) for label in (one, other)] == [[0, 2], [1]]
    costs = [rows[label].cost for label in (one, other)]
    assert [cost and cost.over for cost in costs] == ["mean", "mean"]
    assert report.doubled() == []
    first, second = report.answers
    assert first.words() == f"inconclusive: no flag tells {one} from {other}."
    assert second.answer is not None
    assert second.family == 1
    shown = {found.name: found for found in make_plots(report)}
    assert {one, other} <= {row[0] for row in shown["perplexity"].rows}


def test_runs_whose_coupler_has_no_known_code_are_a_version_of_their_own(two_models):
    run = runs_of(two_models, "c.py:C")[0]
    record = json.loads((run / "record.json").read_text())
    del record["environment"]["coupler_sha256"]
    (run / "record.json").write_text(json.dumps(record))
    [group] = load_study(two_models).groups
    assert [one.label for one in group.configurations if one.coupler == "c.py:C"] == [
        "C · code not known", "C · code bbbbbbbb", "C · code aaaaaaaa"]  # fmt: skip
    change(run, status="crashed", environment={"value": None, "reason": "too early"})
    [group] = load_study(two_models).groups
    assert len(group.configurations) == 4, "what failed before it knew its code makes no row of its own"


def test_what_the_config_names_by_a_path_counts_by_its_content(tmp_path):
    """A hyperedge file with other members: the same config, another configuration."""
    path = made_study(tmp_path / "made", {"mean": 0.0, "HGNN file:e.json": 0.02}, seeds=4, history=2)
    for run in runs_of(path, "HGNN")[2:]:
        change(run, configuration="9" * 12)
    [group] = load_study(path).groups
    own = [one for one in group.configurations if one.coupler == "HGNN"]
    assert [list(one.counted) for one in own] == [[0, 1], [2, 3]]
    assert own[1].label == "HGNN · configuration 99999999"


def test_one_configuration_in_two_spellings_is_one_row(tmp_path):
    """The config of a run also has what changes no number, and paths as they were given."""
    path = made_study(tmp_path / "made", {"mean": 0.0, "own": 0.02}, seeds=2, history=2,
                      names={"own": "c.py:C"})  # fmt: skip
    first, second = runs_of(path, "c.py:C")
    change(first, config__training__min_steps_per_epoch=3, config__measure__allow_failed_check=True)
    change(second, config__model__coupler_type="./c.py:C")
    [group] = load_study(path).groups
    assert {one.label: list(one.counted) for one in group.configurations} == {
        "mean": [0, 1], "C": [0, 1]}  # fmt: skip
    assert compare(group).rows[1].cost is not None, "what changes no number parts no model from its mean"


@pytest.fixture
def doubled(study) -> Path:
    """A study in which seed 0 of GNN has two runs that count: two orders of one curriculum, say."""
    _, second, _ = runs_of(study, "GNN")
    change(second, seed=0, config__training__seed=0)
    return study


def test_two_runs_of_one_seed_are_named_and_left_out_of_every_comparison(doubled):
    first, second, third = runs_of(doubled, "GNN")
    report = make_report(load_study(doubled), None, [
        Hypothesis("GNN is better", {"coupler_type": "GNN"}, {"coupler_type": "mean"})])  # fmt: skip
    [said] = report.doubled()
    assert said in report.warnings()
    assert said.startswith("GNN: several runs are of seed 0, ")
    assert {first.name, second.name} <= {*re.findall("[0-9a-f]{12}", said)}
    [section] = report.sections
    [mean, gnn] = section.comparison.rows
    assert (gnn.configuration.label, gnn.loss.n, gnn.against) == ("GNN", 0, None)
    assert gnn.means[TOKENS_PER_SECOND].n == 0
    assert mean.loss.n == 3
    assert gnn.configuration.statuses() == "3 ok; 2 runs of seed 0, not averaged"
    assert section.sentences() == ["Not compared with mean, because a seed of it has several runs: GNN."]
    assert report.answers[0].answer is None
    assert set(report.failures_table.figures["run_id"]) == {first.name, second.name, third.name}
    assert make_plots(report)


def test_costs_are_beside_a_mean_coupler_that_counts(study):
    first, second, third = runs_of(study, "mean")
    change(first, environment__coupler_sha256=CODES[0], status="oom")
    for run in (second, third):
        change(run, environment__coupler_sha256=CODES[1])
    [cost] = [row.cost for row in compare(load_study(study).groups[0]).rows
              if row.configuration.label == "GNN"]  # fmt: skip
    assert cost is not None
    assert cost.over == "mean · code bbbbbbbb"


def test_what_failed_is_no_second_run_of_a_seed(doubled):
    change(runs_of(doubled, "GNN")[0], status="crashed")
    report = make_report(load_study(doubled))
    assert report.doubled() == []
    assert report.sections[0].comparison.rows[1].loss.n == 2


def test_a_folder_that_is_not_called_as_its_run_is_named(study):
    """A copy, or a renamed folder; what was set aside is none, and says nothing."""
    first, second, third = runs_of(study, "mean")
    shutil.copytree(first, study / "copy of it")
    first.rename(first.with_name("0" * 12))
    second.rename(second.with_name(f"{second.name}.2"))
    third.rename(third.with_name(f"{third.name}.old"))
    found = load_study(study)
    assert len(found.runs) == 3
    assert {folder.name for folder, _ in found.misplaced} == {"copy of it", "0" * 12, f"{third.name}.old"}
    report = make_report(found)
    named = [text for text in report.warnings() if "is not counted" in text]
    assert named[0] == (f"Folder {'0' * 12} is not counted: its record is of run {first.name}: a copy, or a "
                        "renamed folder.")  # fmt: skip
    assert len(named) == 3
    assert list(report.failures_table.figures["status"]) == ["not counted"] * 3


@pytest.mark.parametrize("version", ["9.0", "abc", 1, "0.1", None, "1.00"])
def test_records_of_another_schema_do_not_count(study, version):
    run = runs_of(study, "mean")[0]
    change(run, schema_version=version)
    found = load_study(study)
    [(folder, why)] = found.unreadable
    assert folder == run
    assert f"schema_version is {version!r}; it must be '2.0'" in why
    assert len(found.runs) == 5
