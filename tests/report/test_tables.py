"""Tables: the figures of the records, in full as csv, readable as Markdown, and LaTeX that compiles."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess

import pandas as pd
import pytest
from rich.console import Console

from bench.record import is_measured
from bench.report.comparison import compare
from bench.report.contents import make_report
from bench.report.provenance import code_note
from bench.report.quantities import PARAMETERS
from bench.report.tables import (
    code_warnings,
    comparison_table,
    failures_table,
    other_models,
    pairs_table,
    runs_table,
)
from bench.report.terminal import print_report
from bench.study.runs import load_study
from gnnmoe.config import Refused
from tests._records import SHA
from tests.report._made_studies import made_study

LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ"
HOSTILE = f"{LETTERS} 1–2 … → Ω " + "x & y_1 % $z$ #{} ~^\\ |é😀| <script>alert('1')</script> `*a*`"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    couplers = {"mean": 0.0, "GNN": 0.03, "HGNN all_pairs": -0.03, "HGNN all_triplets": -0.029}
    folder = tmp_path_factory.mktemp("studies") / "made"
    return load_study(made_study(folder, couplers, seeds=8, noise=0.003, history=2, run_name=HOSTILE,
                                 failed={("GNN", 7): "oom"}))  # fmt: skip


@pytest.fixture(scope="module")
def comparison(study):
    return compare(study.groups[0])


@pytest.fixture(scope="module")
def tables(study, comparison):
    return [comparison_table(comparison), pairs_table(comparison), runs_table(study.groups),
            failures_table(study)]  # fmt: skip


def test_csv_holds_every_figure_in_full(tables, comparison):
    read = pd.read_csv(io.StringIO(tables[0].files()["comparison.csv"])).set_index("configuration")
    for row in comparison.rows:
        found = read.loc[row.configuration.label]
        assert found["loss_nats"] == row.loss.mean
        assert found["parameters"] == row.model[PARAMETERS]
        if row.against:
            assert found["difference_low_nats"] == row.against.paired.interval[0]
            assert found["p_holm"] == row.against.p_adjusted
    assert ",8," in tables[0].files()["comparison.csv"], "counts are whole numbers"


def test_failed_runs_are_rows(tables, study):
    runs, failures = tables[2].figures, tables[3].figures
    assert len(runs) == len(study.runs) == 32
    assert list(failures["status"]) == ["oom"]
    assert "7 ok, 1 oom" in tables[0].markdown()


def test_other_models_are_marked_as_such(tables, comparison):
    names = [name for name, _, _ in other_models(comparison.group)]
    assert names == ["unigram", "Kneser-Ney trigram"]
    shown = tables[0].shown
    assert list(shown[shown["verdict"] == "n-gram baseline"]["configuration"]) == names


def test_published_line_only_on_the_whole_test_split(study, comparison):
    run = next(run for run in comparison.group.runs if run.counts)
    quality, data, scored = run.record.quality, run.record.data, run.record.split()
    assert is_measured(quality)
    assert is_measured(data)
    assert scored is not None
    before = quality.test
    try:
        quality.test = scored.model_copy(update={"tokens": 245_569})
        assert ("AWD-LSTM (Merity et al. 2017), test split", "published", 65.8) in other_models(
            comparison.group
        )
        data.tokenizer = "bpe:8000"
        assert len(other_models(comparison.group)) == 2
    finally:
        quality.test, data.tokenizer = before, "word"


def test_bold_only_for_what_is_best_beyond_noise(tables, tmp_path):
    assert not tables[0].bold, "pairs and triplets are equally good"
    clear = load_study(
        made_study(tmp_path / "clear", {"mean": 0.0, "GNN": 0.05}, seeds=8, noise=0.003, history=2)
    )
    found = comparison_table(compare(clear.groups[0]))
    assert "**mean**" in found.markdown()
    assert found.latex().count("\\textbf{mean}") == 1
    assert found.markdown().count("**") == 4  # and the caption


def test_embedded_text_is_said_in_every_table_of_it(tmp_path):
    path = made_study(tmp_path / "embedded", {"mean": 0.0, "GNN": 0.05}, seeds=2, history=2, embedded=True)
    study = load_study(path)
    comparison, groups = compare(study.groups[0]), study.groups
    for table in (comparison_table(comparison), pairs_table(comparison), runs_table(groups),
                  failures_table(study)):  # fmt: skip
        assert "NOT WIKITEXT-2" in table.markdown()
        assert "NOT WIKITEXT-2" in table.latex()


@pytest.mark.parametrize("known", [True, False])
def test_another_code_is_marked(tmp_path, known):
    """By the project's own code; records of before it had a hash by the one they have."""
    path = made_study(tmp_path / "mixed", {"mean": 0.0, "GNN": 0.05}, seeds=3, history=2)
    study = load_study(path)
    assert code_warnings(compare(study.groups[0])) == []
    for run in study.runs:
        environment = run.record.environment
        assert is_measured(environment)
        if not known:
            environment.code_sha256, environment.project_sha256 = environment.project_sha256, None
            environment.coupler_sha256 = None
    gnn = next(one for one in study.groups[0].configurations if one.label == "GNN")
    setattr(gnn.runs[0].record.environment, "project_sha256" if known else "code_sha256", "f" * 64)
    found = comparison_table(compare(study.groups[0])).markdown()
    assert "GNN †" in found
    assert "ffffffffffff (1 run)" in found
    assert "mean †" not in found
    shown = io.StringIO()
    print_report(make_report(study), Console(file=shown, width=80))
    lines = shown.getvalue().splitlines()
    assert any(line.startswith("GNN †") for line in lines)
    assert any(line.startswith("† another version of the code made some runs of this row") for line in lines)


def test_runs_that_do_not_say_their_code_are_counted_only_beside_others(tmp_path):
    path = made_study(tmp_path / "mixed", {"mean": 0.0, "GNN": 0.05}, seeds=3, history=2)
    study = load_study(path)
    silent = "2 runs do not say which code made them."
    for run in study.runs[:2]:
        environment = run.record.environment
        assert is_measured(environment)
        environment.code_sha256, environment.project_sha256 = environment.project_sha256, None
    comparison = compare(study.groups[0])
    assert code_warnings(comparison) == [silent]
    assert silent in comparison_table(comparison).markdown()
    assert "†" not in comparison_table(comparison).markdown()
    for run in study.runs:
        run.record.environment.project_sha256 = None  # pyright: ignore
    assert code_warnings(compare(study.groups[0])) == []


def test_the_code_of_a_coupler_in_a_file_is_no_other_code_of_the_project(tmp_path):
    """The mark would stand at every coupler from a file: its code is not that of the others."""
    path = made_study(tmp_path / "own", {"mean": 0.0, "own": 0.05}, seeds=3, history=2,
                      names={"own": "c.py:C"})  # fmt: skip
    study = load_study(path)
    assert "†" not in comparison_table(compare(study.groups[0])).markdown()
    [code] = {run.key[1] or "" for run in study.runs
              if run.record.config.coupler == "c.py:C"}  # fmt: skip
    assert code_note(study.runs) == (f"code {SHA[:12]} of commit {SHA[:8]} (6 runs); C {code[:12]} (3 runs)")


def test_markdown_cannot_be_broken_by_names(tables):
    lines = [line for line in tables[2].markdown().splitlines() if line.startswith("|")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(bars) == 1, "every row has as many cells"
    assert "<script>" not in tables[2].markdown()


def test_latex_has_the_structure_of_booktabs_and_six_columns_at_most(tables):
    for table in tables:
        text = table.latex()
        for rule in ("\\toprule", "\\midrule", "\\bottomrule"):
            assert text.count(rule) == 1
        body = text.split("\\midrule")[1].split("\\bottomrule")[0].strip().splitlines()
        assert len(body) == len(table.shown)
        heads = text.split("\\toprule\n")[1].split(" \\\\")[0].split(" & ")
        assert len(heads) <= 6
        assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(heads) - 1}
        assert "% Packages: \\usepackage{array,booktabs}" in text
        assert set(text) <= {*map(chr, range(128)), *LETTERS}


def test_the_columns_of_latex_can_be_chosen(tables, study):
    heads = [tables[0].latex(columns).split("\\toprule\n")[1].split(" \\\\")[0]
             for columns in ((), ("verdict", "tokens/s"), ("of another table",))]  # fmt: skip
    assert heads == [
        "configuration & n & perplexity & difference & p & verdict", "configuration & verdict & tokens/s",
        "configuration & n & perplexity & difference & p & verdict",
    ]  # fmt: skip
    with pytest.raises(Refused, match=r"unknown column 'verdit'; allowed: .*Did you mean 'verdict'"):
        make_report(study, columns=["verdit"])


def test_latex_compiles(tables, tmp_path):
    engine = shutil.which("pdflatex") or shutil.which("tectonic")
    if engine is None:
        assert "latex" not in os.environ.get("REQUIRE_OPTIONAL", ""), (
            "pdflatex is required, and not installed"
        )
        pytest.skip("neither pdflatex nor tectonic is installed")
    packages = "\\usepackage{array,booktabs}\\usepackage[a1paper,landscape]{geometry}"
    head = f"\\documentclass{{article}}{packages}\\begin{{document}}\n"
    body = "\n\n".join(table.latex(columns) for table in tables for columns in ((), tuple(table.shown)))
    (tmp_path / "t.tex").write_text(head + body + "\n\\end{document}\n")
    command = [engine, "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    command = command if "pdflatex" in engine else [engine, "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 1000


def test_letters_of_latin_1_stay_in_latex_and_others_do_not(tables):
    text = tables[2].latex(["name"])
    assert f"{LETTERS} 1--2 \\ldots{{}} $\\rightarrow$ ?" in text


def test_runs_say_which_table_they_are_in_and_what_may_not_be_mixed(tmp_path, study):
    path = made_study(tmp_path / "two", {"mean": 0.0, "GNN": 0.05}, seeds=2, history=2)
    for file in path.glob("*/record.json"):
        record = json.loads(file.read_text())
        if record["config"]["model"]["coupler_type"] == "GNN":
            record["environment"]["device_name"] = "another processor"
            record["quality"]["validation"]["stride"] = 7
            file.write_text(json.dumps(record))
    table = runs_table(load_study(path).groups)
    assert list(table.shown["table"]) == ["1", "1", "2", "2"]
    assert list(table.figures["table"]) == [1, 1, 2, 2]
    said = table.figures.set_index("configuration")
    for label, device, stride in (("mean", "a made processor", 32), ("GNN", "another processor", 7)):
        found = said.loc[label].iloc[0]
        assert found["hardware"].startswith(device)
        assert found["scored"].endswith(f"stride {stride}")
        assert found["corpus"].startswith("wikitext wikitext-2-v1 (word, ")
    assert "table" not in runs_table(study.groups).shown


def test_other_models_that_not_all_runs_agree_in_are_left_out(tmp_path):
    study = load_study(made_study(tmp_path / "made", {"mean": 0.0}, seeds=3, history=2))
    [group] = study.groups
    assert len(other_models(group)) == 2
    first, second, _ = (run.record.split() for run in group.runs)
    assert first is not None
    assert second is not None
    first.unigram_nll_sum = 1.01 * (first.unigram_nll_sum or 0)
    assert [name for name, *_ in other_models(group)] == ["Kneser-Ney trigram"]
    second.kneser_ney_trigram_nll_sum = None
    assert other_models(group) == []


def test_what_the_interval_over_articles_is_stands_in_the_notes(tables, tmp_path):
    assert any("articles_low_nats" in note for note in tables[0].notes)
    path = made_study(tmp_path / "bare", {"mean": 0.0, "GNN": 0.05}, seeds=2, history=2, arrays=False)
    notes = comparison_table(compare(load_study(path).groups[0])).notes
    assert not any("articles" in note for note in notes)
