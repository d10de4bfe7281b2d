"""Experts matched over seeds: a permutation is found and undone, and what cannot be matched is told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from bench.report.__main__ import main
from bench.report.comparison import compare
from bench.report.contents import load_report
from bench.report.experts import read_experts
from bench.report.files import text_files
from bench.report.matching import match_experts, partner_hyperedges
from bench.report.page import render_page
from bench.report.publish import publish_study
from bench.report.weights import WeightsReading, read_weights
from bench.study.run_files import EXPERTS
from bench.study.runs import Configuration, load_study
from tests.report._made_experts import add_experts, write_features
from tests.report._made_studies import made_study
from tests.report.test_weights import change_weights, folders
from tests.study.test_study import runs_of

LEARNED = {"mean": 0.0, "HGNN all_pairs": -0.05}
PAIRS = list(itertools.combinations(range(4), 2))


def hgnn(study: Path) -> Configuration:
    (group,) = load_study(study).groups
    return next(one for one in group.configurations if one.coupler == "HGNN")


def readings(study: Path) -> list[WeightsReading]:
    return read_weights(compare(load_study(study).groups[0]))


def sentences(study: Path) -> list[str]:
    found = read_experts(compare(load_study(study).groups[0]))
    assert found is not None
    return found.sentences()


@pytest.fixture
def study(tmp_path) -> Path:
    return add_experts(made_study(tmp_path / "study", LEARNED, seeds=3, history=2))


def features_of(folder: Path) -> list[np.ndarray]:
    with np.load(folder / EXPERTS) as arrays:
        return [arrays[f"layer_{layer}.features"] for layer in range(2)]


def permute(folder: Path, features: list[np.ndarray], weights: dict[str, float], order: list[int]) -> None:
    """Give a run these features and hyperedge weights, its expert e being the expert ``order[e]``."""
    write_features(folder, [found[order] for found in features])
    renamed = {
        f"{{{one},{other}}}": weights[f"{{{min(pair)},{max(pair)}}}"]
        for one, other in PAIRS
        if (pair := (order[one], order[other]))
    }
    change_weights(folder, lambda _: renamed)


def test_a_permutation_of_the_experts_is_found_and_undone(study):
    """Seeds with one model's experts in other orders agree on matched experts, and not by name."""
    first, *others = folders(study)
    learned = dict(zip((f"{{{a},{b}}}" for a, b in PAIRS), (0.91, 1.06, 0.97, 1.02, 1.09, 0.94), strict=True))
    features = features_of(first)
    permute(first, features, learned, [0, 1, 2, 3])
    orders = [[2, 0, 3, 1], [3, 2, 0, 1]]
    for folder, order in zip(others, orders, strict=True):
        permute(folder, features, learned, order)
    matching = match_experts(hgnn(study))
    assert matching is not None
    for match in matching.layers.values():
        for seed, order in enumerate(orders, 1):
            assert match.partners[0, seed] == tuple(np.argsort(order))
        assert match.matched_cka == pytest.approx(1)
        assert match.all_cka < 0.8
    for reading in readings(study):
        by_name, on_matched = reading.agreement, reading.matched_agreement
        assert by_name is not None
        assert on_matched is not None
        assert on_matched.tau == pytest.approx(1)
        assert on_matched.reproducible
        assert by_name.tau < 0.4
        assert not by_name.reproducible
        assert reading.sentence() == (
            f"HGNN, layer {reading.layer}: weights between 0.91 and 1.09 (all 1 at the start); by name "
            f"{by_name.words()}. On matched experts {on_matched.words()}. "
            f"{matching.layers[reading.layer].sentence()}"
        )


def test_hyperedges_of_partners():
    names = ["{0,1}", "{0,2}", "{1,2}"]
    assert partner_hyperedges(names, [2, 0, 1]) == [1, 2, 0]
    assert partner_hyperedges(names[:2], [0, 2, 1]) == [1, 0]
    assert partner_hyperedges(names[:2], [2, 0, 1]) is None, "{1,2} does not exist"
    assert partner_hyperedges(["{0,1,2}"], [2, 0, 1]) == [0]
    for odd in ("{0,5}", "all", "{}", "0,1"):
        assert partner_hyperedges([odd], [2, 0, 1]) is None


def test_hyperedges_that_a_matching_leaves_are_not_compared(study):
    for place, folder in enumerate(folders(study)):
        change_weights(folder, lambda found: {name: found[name] for name in ("{0,1}", "{1,2}")})
        features = features_of(folder)
        write_features(folder, [np.roll(found, place, axis=0) for found in features])
    for reading in readings(study):
        assert reading.agreement is not None
        assert reading.matched_agreement is None
        assert reading.sentence().endswith(
            ". On matched experts nothing is compared: the hypergraph has no hyperedge for the partners of "
            "some hyperedge."
        )


def test_studies_without_features_say_nothing_of_them(tmp_path):
    study = made_study(tmp_path / "study", LEARNED, seeds=3, history=2)
    assert match_experts(hgnn(study)) is None
    assert all("matched" not in reading.sentence() for reading in readings(study))
    assert not any("matching" in name for name in text_files(load_report(study)))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"layer_0.features": np.zeros((4, 40, 8))}, "layer_0.features, float64 of shape (4, 40, 8)"),
        ({"layer_0.features": np.zeros((4, 40), np.float16)}, "of shape (4, 40)"),
        ({"weights": np.zeros((4, 40, 8), np.float16)}, "weights, float16"),
        ({"layer_0.features": np.full((4, 40, 8), np.nan, np.float16)}, "not all finite"),
        ({"layer_0.features": np.zeros((4, 3, 8), np.float16)}, "of shape (4, 3, 8)"),
        ({"layer_0.features": np.zeros((4, 40_000, 1), np.float16)}, "more than 280,000 bytes"),
        (b"PK\x03\x04 cut short", "cut short or no npz file"),
        (None, "it has no experts.npz"),
    ],
)
def test_a_damaged_file_is_left_out_and_named(study, damage, says):
    for folder in (folders(study)[1], runs_of(study, "mean")[1]):
        (folder / EXPERTS).unlink()
        if isinstance(damage, bytes):
            (folder / EXPERTS).write_bytes(damage)
        elif damage is not None:
            np.savez(folder / EXPERTS, **damage)
    matching = match_experts(hgnn(study))
    assert matching is not None
    assert set(matching.layers[0].partners) == {(0, 2)}
    (note,) = matching.notes
    assert note.startswith("Seed 1 is left out: ")
    assert says in note
    for label in ("mean", "HGNN"):
        head = f"Experts of {label} over seeds: Seed 1 is left out: "
        (found,) = (one for one in sentences(study) if one.startswith(head))
        assert says in found
    sentence = readings(study)[0].sentence()
    assert "; by name 3 seeds " in sentence
    assert " On matched experts 2 seeds " in sentence
    if damage is not None:
        with pytest.raises(ValueError, match=EXPERTS):
            publish_study(study, study.parent / "published")


def test_other_tokens_are_not_matched(study):
    path = folders(study)[2] / "record.json"
    record = json.loads(path.read_text())
    record["diagnostics"]["tokens"] = 2000
    path.write_text(json.dumps(record))
    matching = match_experts(hgnn(study))
    assert matching is not None
    assert matching.layers == {}
    said = "Experts of HGNN over seeds: The experts are not matched: text, length, tokens or shapes of"
    assert any(one.startswith(said) for one in sentences(study))


def test_the_published_study_has_the_same_matching_and_verify_recomputes_it(study, tmp_path, capsys):
    published = tmp_path / "published"
    publish_study(study, published)
    before, after = (text_files(load_report(path)) for path in (study, published))
    assert before["tables/matching.csv"] == after["tables/matching.csv"]
    table = before["tables/matching.csv"].splitlines()
    assert table[0] == (
        "configuration,layer,seeds,cka_of_matched_experts,cka_of_all_pairs,tau_by_name,p_by_name,"
        "tau_matched,p_matched"
    )
    assert len(table) == 1 + 2 * 2
    assert "Experts matched over seeds" in render_page(load_report(study), {})
    assert main([str(study), "--no-plots"]) == 0
    assert main([str(study), "--verify"]) == 0
    folder = folders(study)[1]
    write_features(folder, [found[::-1] + 1.0 * (found > 1) for found in features_of(folder)])
    assert main([str(study), "--verify"]) == 1
    assert "differs: tables/matching.csv: row " in capsys.readouterr().out
