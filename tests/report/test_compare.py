"""Studies, configurations and runs against each other, and limits for a check of one's own."""

from __future__ import annotations

import io
import math
import shutil

import pytest
from rich.console import Console

from bench.report.__main__ import main
from bench.report.compare import Limit, compare_sides, print_differences, ratio_of, read_side
from bench.report.comparison import compare
from bench.study.runs import find_run, load_study, studies_in, study_folder, the_study
from tests._records import epochs
from tests.report._made_studies import made_study
from tests.study.test_study import change


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    made_study(folder / "before", {"mean": 0.0, "GNN": 0.03}, seeds=8, noise=0.002, history=2)
    made_study(folder / "after", {"mean": 0.02, "GNN": 0.03}, seeds=8, noise=0.002, history=2)
    made_study(folder / "reference" / "kept", {"gate": 0.0}, seeds=2, history=2)
    return folder


def test_two_studies_are_compared_configuration_by_configuration(results):
    found = compare_sides(read_side("before", results), read_side("after", results)).differences
    by_label = {difference.candidate.label: difference for difference in found}
    assert set(by_label) == {"mean", "GNN"}
    assert by_label["mean"].verdict.kind == "worse"
    assert by_label["mean"].paired.mean == pytest.approx(0.02, abs=0.004)
    assert by_label["GNN"].verdict.kind == "equivalent"


def test_b_is_judged_beside_a(results):
    [found] = compare_sides(read_side("before:GNN", results), read_side("before:mean", results)).differences
    assert found.verdict.kind == "better"
    assert found.paired.mean == pytest.approx(-0.03, abs=0.004)


def test_single_runs_have_no_verdict(results):
    by_seed: dict[int, list[str]] = {}
    for run in load_study(results / "before").runs:
        by_seed.setdefault(run.seed, []).append(f"before/{run.folder.name}")
    first, second = by_seed[0]
    [found] = compare_sides(read_side(first, results), read_side(second, results)).differences
    assert found.verdict.kind == "not resolved"
    assert found.paired.interval is None
    with pytest.raises(ValueError, match="no seed counts on both sides"):
        compare_sides(read_side(first, results), read_side(by_seed[1][0], results))


def test_a_run_that_is_in_two_studies_is_named_with_its_study(results):
    name = load_study(results / "before").runs[0].folder.name
    with pytest.raises(
        ValueError, match=f"stands for 2 runs: after/{name}, before/{name}; name one of them so"
    ):
        find_run(name, results)
    assert find_run(f"after/{name[:8]}", results).folder == results / "after" / name


def test_names_that_mean_nothing_are_refused_with_what_there_is(results):
    with pytest.raises(ValueError, match=r"'befor'; allowed: after, before, reference/kept. Did you"):
        the_study("befor", results)
    with pytest.raises(ValueError, match=r"unknown configuration of before 'GN'.*Did you mean 'GNN'"):
        read_side("before:GN", results)
    with pytest.raises(ValueError, match="there is no study 'nothing'"):
        read_side("nothing:GNN", results)
    with pytest.raises(ValueError, match="no study and no run"):
        read_side("ffffffff0000", results)


def test_a_study_is_found_by_name_in_reference_and_by_path(results, tmp_path):
    assert the_study("kept", results) == results / "reference" / "kept"
    assert the_study("reference/kept", results) == results / "reference" / "kept"
    assert study_folder(str(results / "before"), tmp_path) == results / "before"
    assert [path.name for path in studies_in(results)] == ["after", "before", "kept"]


def test_the_beginning_of_an_id_is_enough_where_it_is_one(results):
    name = next(path.parent.name for path in (results / "reference" / "kept").glob("*/record.json"))
    assert find_run(name[:7], results).folder.name == name
    folders = [path.parent for path in results.rglob("record.json")]
    two = next(a.name[:2] for a in folders for b in folders if a != b and a.name[:2] == b.name[:2])
    with pytest.raises(ValueError, match=f"'{two}' stands for"):
        find_run(two, results)


@pytest.mark.parametrize(
    ("changes", "says", "passes"),
    [
        ({"used__ledger__epochs": epochs(999)}, "batch 999", True),
        ({"quality__validation__stride": 3}, "stride 3", True),
        ({"environment__device_name": "elsewhere"}, "elsewhere", False),
        ({"data__sha256": "0" * 64}, "0" * 12, False),
    ],
)
def test_E3_unequal_sides_are_refused(tmp_path, changes, says, passes):
    """E3: a comparison refuses other batches, lengths and evaluations, unless told --allow-unequal."""
    for name in ("a", "b"):
        made_study(tmp_path / name, {"mean": 0.0}, seeds=2, history=2)
    for path in (tmp_path / "b").glob("*/record.json"):
        change(path.parent, **changes)
    sides = read_side("a", tmp_path), read_side("b", tmp_path)
    with pytest.raises(ValueError, match=says):
        compare_sides(*sides)
    if passes:
        assert len(compare_sides(*sides, allow_unequal=True).differences) == 1
    else:
        with pytest.raises(ValueError, match=says):
            compare_sides(*sides, allow_unequal=True)


def test_nothing_in_common_is_refused(results):
    with pytest.raises(ValueError, match="gate: only in B"):
        compare_sides(read_side("before", results), read_side("reference/kept", results))


def test_limits_are_on_the_change_from_a_to_b(results):
    [mean] = compare_sides(read_side("before:mean", results), read_side("after:mean", results)).differences
    change_percent = 100 * (math.exp(mean.paired.mean) - 1)
    assert Limit.parse(f"perplexity > {change_percent - 0.01:.4f}%").verdict(mean)[0]
    assert not Limit.parse(f"perplexity > {change_percent + 0.01:.4f}%").verdict(mean)[0]
    assert Limit.parse("perplexity < 5 %").verdict(mean)[0]
    assert not Limit.parse("tokens/s < -5%").verdict(mean)[0]
    for quantity in ("memory", "step_time", "parameters"):
        assert not Limit.parse(f"{quantity} > 0.5%").verdict(mean)[0]


def test_what_was_not_measured_fails_a_limit(results):
    [mean] = compare_sides(read_side("before:mean", results), read_side("after:mean", results)).differences
    fails, why = Limit.parse("test_perplexity > 1%").verdict(mean)
    assert fails
    assert "was not measured" in why


@pytest.mark.parametrize(
    "text", ["perplexity", "perplexity > one %", "perplexity > 1", "perplexity >= 1%", ""]
)
def test_a_limit_of_another_form_is_refused(text):
    with pytest.raises(ValueError, match="fail-if is"):
        Limit.parse(text)


def test_an_unknown_quantity_is_refused():
    with pytest.raises(ValueError, match=r"unknown quantity 'memry'.*Did you mean 'memory'"):
        Limit.parse("memry > 1%")


def test_a_colon_in_the_name_of_a_study_is_no_obstacle(results, tmp_path):
    made_study(tmp_path / "a:b", {"mean": 0.0, "GNN": 0.0}, seeds=2, history=2)
    assert read_side("a:b", tmp_path).label is None
    assert read_side("a:b:GNN", tmp_path).label == "GNN"


def test_devices_are_compared_each_with_itself(tmp_path):
    path = made_study(tmp_path / "two", {"mean": 0.0, "GNN": 0.03}, seeds=2, history=2)
    for run in list(path.glob("*/record.json")):
        twin = path / run.parent.name[::-1]
        shutil.copytree(run.parent, twin)
        change(twin, environment__device_name="other", run_id=twin.name)
    found = compare_sides(read_side("two:mean", tmp_path), read_side("two:GNN", tmp_path))
    assert len(found.differences) == 2
    assert found.missing == []
    assert len(compare_sides(read_side("two", tmp_path), read_side("two", tmp_path)).differences) == 4


def test_costs_are_paired_by_seed_as_in_the_report(results):
    study = load_study(results / "before")
    cost = next(row.cost for row in compare(study.groups[0]).rows if row.configuration.label == "GNN")
    assert cost is not None
    [found] = compare_sides(read_side("before:mean", results), read_side("before:GNN", results)).differences
    assert ratio_of("step_time", found) == pytest.approx(cost.step_time_ratio())


def test_the_same_configuration_by_other_code_is_what_is_compared(tmp_path):
    """Before and after a change of a coupler's file; the title says which code is which."""
    for name, code in (("a", "a" * 64), ("b", "b" * 64)):
        path = made_study(tmp_path / name, {"mean": 0.0, "own": 0.1}, seeds=2, history=2,
                          names={"own": "c.py:C"})  # fmt: skip
        for run in load_study(path).runs:
            own = run.record.config.coupler == "c.py:C"
            change(run.folder, **({"environment__coupler_sha256": code} if own else {}))
    sides = read_side("a", tmp_path), read_side("b", tmp_path)
    found = compare_sides(*sides)
    assert [one.candidate.label for one in found.differences] == ["mean", "C"]
    text = io.StringIO()
    print_differences(*sides, found, Console(file=text, width=80))
    said = " ".join(text.getvalue().split())
    assert "C · code aaaaaaaa → C · code bbbbbbbb (seeds 0, 1)" in said
    assert "A: code" in said
    assert "C aaaaaaaaaaaa (2 runs)" in said


def test_equal_settings_of_another_configuration_are_not_compared(tmp_path):
    """A hyperedge file with other members under the same name."""
    for name in ("a", "b"):
        made_study(tmp_path / name, {"mean": 0.0, "HGNN file:e.json": 0.1}, seeds=2, history=2)
    for run in load_study(tmp_path / "b").runs:
        if run.record.config.coupler == "HGNN":
            change(run.folder, configuration="9" * 12)
    found = compare_sides(read_side("a", tmp_path), read_side("b", tmp_path))
    assert [one.candidate.label for one in found.differences] == ["mean"]
    [why] = found.missing
    assert why.startswith("HGNN: B has another configuration of these settings (configuration 99999999 ag")
    named = compare_sides(read_side("a:HGNN", tmp_path), read_side("b:HGNN", tmp_path))
    assert len(named.differences) == 1


def test_several_runs_of_a_seed_are_named_and_not_compared(tmp_path, capsys):
    for name in ("a", "b"):
        made_study(tmp_path / name, {"mean": 0.0, "GNN": 0.1}, seeds=3, history=2)
    first, second = [run.folder for run in load_study(tmp_path / "b").runs
                     if run.record.config.coupler == "GNN"][:2]  # fmt: skip
    change(second, seed=0)
    found = compare_sides(read_side("a", tmp_path), read_side("b", tmp_path))
    assert [one.candidate.label for one in found.differences] == ["mean"]
    assert found.missing == []
    assert main(["compare", "a", "b", "--results-dir", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"B, GNN: several runs are of seed 0, {first.name} and {second.name}." in said or (
        f"B, GNN: several runs are of seed 0, {second.name} and {first.name}." in said)  # fmt: skip
    assert "B is " in said
    with pytest.raises(ValueError, match="cannot be compared: B, GNN: several runs are of seed 0"):
        compare_sides(read_side("a:GNN", tmp_path), read_side("b:GNN", tmp_path))


def test_a_run_in_a_renamed_folder_is_no_side(tmp_path):
    run = load_study(made_study(tmp_path / "a", {"mean": 0.0}, seeds=1, history=2)).runs[0].folder
    aside = run.rename(run.with_name(f"{run.name}.1"))
    assert read_side(f"a/{aside.name}", tmp_path).runs
    renamed = aside.rename(aside.with_name("0" * 12))
    with pytest.raises(ValueError, match=f"is of run {run.name}: a copy, or a renamed folder"):
        read_side(f"a/{renamed.name}", tmp_path)
