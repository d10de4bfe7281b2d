"""``python -m bench.report``: what it prints and writes, and that --verify can fail."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from bench.record import STATUSES
from bench.report.__main__ import main
from bench.report.contents import load_report, marks
from bench.report.files import write_report
from bench.report.terminal import print_report
from bench.study.hypotheses import Hypothesis, state, stated
from bench.study.runs import load_study
from tests.report._made_runs import without_history
from tests.report._made_studies import made_study
from tests.study.test_study import change

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A study, made once and copied for each test."""
    folder = tmp_path_factory.mktemp("original")
    return made_study(folder / "small", {"mean": 0.0, "GNN": 0.03, "HGNN all_pairs": -0.03}, seeds=8,
                      noise=0.003, history=3, failed={("GNN", 7): "oom"})  # fmt: skip


@pytest.fixture(scope="module")
def drawn(original, tmp_path_factory) -> tuple[Path, int, str]:
    """A folder of results with a study whose report has plots; exit status and output of the command."""
    results, out = tmp_path_factory.mktemp("drawn"), io.StringIO()
    shutil.copytree(original, results / "small")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setenv("COLUMNS", "80")
        status = main(["small", "--results-dir", str(results)])
    return results, status, out.getvalue().replace("\u00a0", " ")


@pytest.fixture
def results(original, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(original, tmp_path / "small")
    return tmp_path


@pytest.fixture
def report(results, capsys):
    """Run the command on the study; returns exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main([*arguments, "--results-dir", str(results)])
        except SystemExit as error:
            status = int(error.code or 0)
        out, err = capsys.readouterr()
        return status, out.replace("\u00a0", " "), err

    return run


def test_a_report_prints_verdicts_and_writes_page_tables_and_plots(drawn):
    results, status, out = drawn
    assert status == 0
    assert "24 runs (23 ok, 1 oom), 3 configurations, 8 seeds" in out
    assert "HGNN is better than every other configuration, and than mean: perplexity" in out
    assert max(map(len, out.splitlines()[:-2])) <= 80
    folder = results / "small" / "report"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for table in ("comparison", "pairs", "runs", "failures"):
        assert {f"tables/{table}.{end}" for end in ("md", "csv", "tex")} <= names
    for plot in ("perplexity", "loss_curves", "verdicts", "pareto", "coupler_cost"):
        assert {f"plots/{plot}.{end}" for end in ("svg", "png", "csv")} <= names
    assert {"report.html", "summary.md", "options.json"} <= names
    assert not [path for path in (results / "small").iterdir() if path.name.startswith(".")]
    runs = pd.read_csv(folder / "tables" / "runs.csv")
    assert len(runs) == 24
    assert "GNN: worse than mean" in (folder / "summary.md").read_text()


def test_verify_passes_on_what_was_written_and_fails_on_any_change(report, results):
    assert report("small", "--no-plots")[0] == 0
    status, out, _ = report("small", "--verify")
    assert status == 0
    assert "verified: 14 files of" in out
    assert "of 24 records, 23 by the losses of their tokens, 1 without a measured quality" in out
    folder = results / "small" / "report"
    table = folder / "tables" / "comparison.csv"
    before, value = table.read_text(), str(pd.read_csv(table)["loss_nats"][1])
    table.write_text(before.replace(value, "5.0", 1))
    status, out, _ = report("small", "--verify")
    assert status == 1
    assert f"row 2, loss_nats: '5.0', by the records '{value}'" in out
    table.write_text(before)
    page = folder / "report.html"
    kept = page.read_text()
    page.write_text(kept.replace("worse than mean", "better than mean"))
    status, out, _ = report("small", "--verify")
    assert (status, "differs: report.html: line " in out) == (1, True)
    page.write_text(kept)
    (folder / "tables" / "runs.md").unlink()
    status, out, _ = report("small", "--verify")
    assert (status, "tables/runs.md is missing" in out) == (1, True)


def test_verify_sees_a_record_that_its_own_losses_deny(report, results):
    assert report("small", "--no-plots")[0] == 0
    run = next(path.parent for path in (results / "small").glob("*/record.json")
               if json.loads(path.read_text())["status"] == "ok")  # fmt: skip
    change(run, quality__validation__nll_sum=1234.5)
    status, out, _ = report("small", "--verify")
    assert status == 1
    assert f"run {run.name}: " in out
    assert "its record says 1234.500000" in out


TOKENS = 600  # of a made study
NLL, ARTICLE = "validation_nll", "validation_document"
SOUND = {NLL: np.full(TOKENS, 6.0, dtype=np.float32), ARTICLE: np.zeros(TOKENS, dtype=np.int32)}
ALIEN = {
    "nothing of them": ({"x": np.arange(3)}, "holds none of validation"),
    "no articles": ({NLL: SOUND[NLL]}, "the articles of the tokens are missing"),
    "no losses": ({ARTICLE: SOUND[ARTICLE]}, "holds none of validation"),
    "another shape": (SOUND | {NLL: np.full((TOKENS, 1), 6.0)}, "not one row"),
    "whole numbers": (SOUND | {NLL: np.full(TOKENS, 6)}, "not one row of floating-point numbers"),
    "texts": (SOUND | {NLL: np.full(TOKENS, "6")}, "not one row of floating-point numbers"),
    "not a number": (SOUND | {NLL: np.full(TOKENS, np.nan)}, "not all finite"),
    "infinite": (SOUND | {NLL: np.full(TOKENS, np.inf)}, "not all finite"),
    "articles of fewer": (SOUND | {ARTICLE: np.zeros(5, int)}, "a whole number for each of 600 tokens"),
    "articles of floats": (SOUND | {ARTICLE: np.zeros(TOKENS)}, "a whole number for each of 600 tokens"),
    "negative articles": (SOUND | {ARTICLE: np.full(TOKENS, -1)}, "numbered -1 to -1"),
    "huge articles": (SOUND | {ARTICLE: np.full(TOKENS, 2**31 - 1)}, "numbered 2,147,483,647 to"),
    "huger articles": (SOUND | {ARTICLE: np.full(TOKENS, 2**64 - 1, np.uint64)}, "numbered 18,446,744,"),
    "another count": ({name: some[:-1] for name, some in SOUND.items()}, "599 losses of validation add up"),
    "another sum": (SOUND, "600 losses of validation add up to 3600.000000, its record says"),
    "no file of arrays": (b"junk", "cut short or no npz file"),
    "no file": (None, "it has a measured quality and no nll.npz"),
}  # fmt: skip


@pytest.mark.parametrize("alien", ALIEN)
def test_verify_names_a_run_whose_losses_are_not_those_of_its_record(tmp_path, capsys, alien):
    arrays, says = ALIEN[alien]
    path = made_study(tmp_path / "made", {"mean": 0.0}, seeds=3, history=0, failed={("mean", 2): "oom"})
    run = next(file.parent for file in path.glob("*/nll.npz"))
    if isinstance(arrays, dict):
        np.savez(run / "nll.npz", **arrays)
    elif arrays is None:
        (run / "nll.npz").unlink()
    else:
        (run / "nll.npz").write_bytes(arrays)
    assert main([str(path), "--no-plots"]) == 0
    capsys.readouterr()
    assert main([str(path), "--verify"]) == 1
    line, result = capsys.readouterr().out.splitlines()
    assert line.startswith(f"differs: run {run.name}: ")
    assert says in line
    assert result.startswith("NOT verified: 11 files of ")
    assert result.endswith(
        "; of 3 records, 1 by the losses of their tokens, 1 NOT verified, 1 without a measured quality"
    )


def test_verify_wants_the_losses_of_every_split_that_was_measured(tmp_path, capsys):
    path = made_study(tmp_path / "made", {"mean": 0.0}, seeds=2, history=2, test=True)
    assert main([str(path), "--no-plots"]) == 0
    assert main([str(path), "--verify"]) == 0
    run = next(file.parent for file in path.glob("*/nll.npz"))
    with np.load(run / "nll.npz") as arrays:
        np.savez(run / "nll.npz", **{name: arrays[name] for name in arrays if name.startswith("val")})
    capsys.readouterr()
    assert main([str(path), "--verify"]) == 1
    said = capsys.readouterr().out
    assert f"differs: run {run.name}: its file of losses holds none of test" in said
    assert "of 2 records, 1 by the losses of their tokens, 1 NOT verified" in said


def test_verify_names_a_record_that_cannot_be_read(report, results):
    run = next((results / "small").glob("*/record.json"))
    run.write_text("{")
    assert report("small", "--no-plots")[0] == 0
    status, out, _ = report("small", "--verify")
    assert status == 1
    assert f"differs: {run.parent.name}: " in out


def test_what_was_published_is_verified_by_its_hashes(tmp_path, capsys):
    """It has no losses of tokens, nor need it have sums by article; a run that was added has no hash."""
    made_study(tmp_path / "there" / "made", {"mean": 0.0, "GNN": 0.1}, seeds=2, history=2)
    out = tmp_path / "made"
    assert main([str(tmp_path / "there" / "made"), "--publish", str(out)]) == 0
    one, other = sorted(out.glob("*/articles.npz"))[:2]
    published = json.loads((out / "published.json").read_text())
    one.unlink()
    del published["files"][one.relative_to(out).as_posix()]
    (out / "published.json").write_text(json.dumps(published))
    capsys.readouterr()
    assert main([str(out), "--verify"]) == 0
    words = "4 by file hash, not by token losses (3 of them also by their sums by article)"
    assert f"of 4 records, {words}" in capsys.readouterr().out
    np.savez(other, x=np.arange(3))
    assert main([str(out), "--verify"]) == 1
    said = capsys.readouterr().out
    assert f"differs: run {other.parent.name}: its file of losses holds none of validation" in said
    assert "3 by file hash, not by token losses (2 of them" in said
    added = out / ("0" * 12)
    shutil.copytree(one.parent, added)
    change(added, run_id=added.name)
    assert main([str(out), "--verify"]) == 1
    assert f"differs: run {added.name}: it has a measured quality and no nll.npz" in capsys.readouterr().out


def test_several_runs_of_one_seed_end_with_1_and_the_rest_is_written(report, results):
    runs = [run.folder for run in load_study(results / "small").runs
            if run.counts and run.record.config.coupler == "GNN"][:2]  # fmt: skip
    for run in runs:
        change(run, seed=0)
    page = results / "page.md"
    page.write_text("\n".join(marks("small")))
    for arguments in (("--no-plots",), ("--page", str(page))):
        status, out, err = report("small", *arguments)
        assert status == 1
        said = " ".join((out + err).split())
        assert "GNN: several runs are of seed 0, " in said
        assert all(run.name in said for run in runs)
    assert "HGNN: better than mean" in (results / "small" / "report" / "summary.md").read_text()
    assert "| HGNN" in page.read_text()


def test_verify_repeats_the_options_that_the_report_was_made_with(report):
    assert report("small", "--no-plots", "--baseline", "GNN")[0] == 0
    assert report("small", "--verify")[0] == 0


def test_verify_without_a_report_is_wrong_input(report):
    status, _, err = report("small", "--verify")
    assert status == 2
    assert "holds no report; make one first" in err


def test_a_folder_of_somebody_elses_is_never_overwritten(report, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("dear")
    status, _, err = report("small", "--no-plots", "--out", str(mine))
    assert status == 2
    assert "holds files that no report wrote" in err
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_what_others_put_beside_a_report_stays(report, results):
    assert report("small", "--no-plots")[0] == 0
    folder = results / "small" / "report"
    mine = [folder / "notes.txt", folder / "tables" / "mine.csv"]
    for path in mine:
        path.write_text("mine")
    (folder / "tables" / "runs.md").write_text("changed")
    assert report("small", "--no-plots")[0] == 0
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert (folder / "tables" / "runs.md").read_text() != "changed"


@pytest.mark.slow
def test_what_an_earlier_report_left_over_goes_and_a_changed_drawing_is_seen(drawn, tmp_path, capsys):
    """In the place where it was made, which the page names; it is put back for the tests that come after."""
    study, folder = drawn[0] / "small", drawn[0] / "small" / "report"
    shutil.copytree(folder, tmp_path / "kept")
    try:
        assert main([str(study), "--verify"]) == 0
        (folder / "plots" / "perplexity.png").write_bytes(b"another picture")
        assert main([str(study), "--verify"]) == 1
        assert "plots/perplexity.png is not what the report wrote" in capsys.readouterr().out
        assert main([str(study), "--no-plots"]) == 0
        assert "--no-plots deleted the plots of the earlier report" in capsys.readouterr().out
        assert not list((folder / "plots").iterdir())
        assert main([str(study), "--verify"]) == 0
    finally:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)


def test_a_table_without_a_row_is_not_written(tmp_path, capsys):
    """LaTeX cannot read an empty table."""
    study = made_study(tmp_path / "bare", {"mean": 0.0}, seeds=1, arrays=False)
    assert main([str(study), "--no-plots"]) == 0
    assert "deleted the plots" not in capsys.readouterr().out
    assert {path.stem for path in (study / "report" / "tables").iterdir()} == {"comparison", "runs"}


def test_a_report_that_cannot_be_written_leaves_the_earlier_one_and_what_lies_beside_it(
    report, results, monkeypatch
):
    from bench.report import files

    assert report("small", "--no-plots")[0] == 0
    folder = results / "small" / "report"
    (folder / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(path: Path, data: bytes) -> None:
        if path.name == "report.html":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(files, "write_whole", full)
    status, _, err = report("small", "--no-plots")
    assert (status, "No space left on device" in err) == (2, True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_link_to_a_folder_stays_a_link(report, results, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    assert report("small", "--no-plots", "--out", str(link))[0] == 0
    assert link.is_symlink()
    assert (target / "report.html").is_file()


@pytest.mark.slow
def test_the_same_records_give_the_same_report_byte_for_byte(drawn):
    folder = drawn[0] / "small" / "report"
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["small", "--results-dir", str(drawn[0])]) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["smal"], "unknown study 'smal'; allowed: small. Did you mean 'small'?"),
        (["small", "--baseline", "GN"], "unknown configuration 'GN'"),
        (["small", "--hypotheses", "nowhere.toml"], "hypotheses nowhere.toml cannot be read"),
        (["small", "--out", __file__], "is no folder; choose another with --out"),
        (["x" * 300], "cannot be used (File name too long)"),
        (["show", "ffffffffffff"], "no study and no run"),
        (["ls", "other"], "unknown study 'other'"),
        (["compare", "small:mean", "small:GNN", "--fail-if", "ppl"], "--fail-if is 'ppl'"),
        (["compare", "small:mean", "small:x"], "unknown configuration of small 'x'"),
    ],
)
def test_wrong_input_is_one_message_and_status_2(report, results, arguments, says):
    status, out, err = report(*arguments)
    assert status == 2
    assert says in err
    assert err.startswith("error: ")
    assert "Traceback" not in err + out
    assert not (results / "small" / "report").exists()


def test_compare_fails_a_check(report):
    status, out, _ = report("compare", "small:mean", "small:GNN", "--fail-if", "perplexity > 1%")
    assert status == 1
    assert "GNN: --fail-if perplexity > 1%: FAILS, the mean change is +2.87%" in out
    assert report("compare", "small:mean", "small:GNN", "--fail-if", "perplexity > 9%")[0] == 0
    assert report("compare", "small:mean", "small:GNN")[0] == 0


def test_a_check_fails_where_a_configuration_is_gone(report, results):
    """All runs of one configuration failed in B: --fail-if must not pass over it."""
    failed = {("GNN", seed): "oom" for seed in range(8)}
    made_study(results / "later", {"mean": 0.0, "GNN": 0.03}, seeds=8, noise=0.003, failed=failed, history=3)
    status, out, _ = report("compare", "small", "later", "--fail-if", "perplexity > 50%")
    assert status == 1
    assert "not compared: GNN: no seed counts on both sides" in out
    assert "not compared: HGNN: only in A" in out
    assert report("compare", "small", "later")[0] == 0


def test_ls_and_show(report, results):
    status, out, _ = report("ls")
    assert status == 0
    assert "23 ok, 1 oom" in out.replace("\n", " ")
    status, out, _ = report("ls", "small")
    assert (status, out.count(" ok ")) == (0, 23)
    name = next((results / "small").glob("*/record.json")).parent.name
    status, out, _ = report("show", name[:8])
    assert status == 0
    assert name in out
    assert "command: python -m bench.run" in out
    assert "can be found" not in out
    change(results / "small" / name, config__model__coupler_type="mine.py:Mine")
    _, out, _ = report("show", name[:8])
    assert "start the command where mine.py can be found." in out


def test_an_empty_results_folder_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["ls", "--results-dir", str(tmp_path / "none")])
    assert "holds no study" in capsys.readouterr().err


@pytest.mark.slow
def test_neither_torch_nor_pyplot_is_imported_and_no_order_of_a_set_shows(results, tmp_path):
    """Analysis reads records: neither the report and its page nor any plot needs torch.

    Another process, with another seed of its hashes, writes the same page.
    """
    made_study(results / "bare", {"mean": 0.0, "HGNN all_pairs": 0.1}, seeds=1, arrays=False)
    run = without_history(tmp_path / "run", "HGNN")
    pages = [tmp_path / name for name in ("one", "other")]
    script = (
        "import sys; from pathlib import Path; from bench.report.__main__ import main;"
        "from bench.report.comparison import compare; from bench.report.plots.run import plot_run;"
        "from bench.report.plots.study import study_plots; from bench.study.runs import load_study;"
        "main(sys.argv[1:]);"
        f"assert study_plots('bare', compare(load_study(Path({str(results / 'bare')!r})).groups[0]));"
        f"assert plot_run(Path({str(run)!r}));"
        "sys.exit(len({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    places = ["small", "--no-plots", "--results-dir", str(results), "--out"]
    done = subprocess.run(
        [sys.executable, "-c", script, *places, str(pages[0])], cwd=REPOSITORY, capture_output=True,
        timeout=120, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main([*places, str(pages[1])]) == 0
    for name in ("report.html", "summary.md"):
        assert (pages[0] / name).read_bytes() == (pages[1] / name).read_bytes()
    assert (run / "plots" / "hyperedge_weights.svg").is_file()


def test_hypotheses_that_a_sweep_stated_are_answered_with_the_time(report, results):
    sure = Hypothesis("HGNN helps", {"coupler_type": "HGNN"}, {"coupler_type": "mean"})
    state([sure], results / "small")
    _, out, _ = report("small", "--no-plots")
    text = " ".join(out.split())
    assert "HGNN helps: supported: perplexity" in text
    assert "of 24 runs had, or may have, started" in text, "the made runs began before today"


def test_hypotheses_keep_the_time_at_which_they_were_first_stated(results):
    sure = Hypothesis("HGNN helps", {"coupler_type": "HGNN"}, {"coupler_type": "mean"})
    study = results / "small"
    state([sure], study)
    first = (study / "hypotheses.json").read_text()
    state([sure], study)
    assert (study / "hypotheses.json").read_text() == first
    state([], study)
    assert stated(study)[0] == [sure]
    other = Hypothesis("GNN helps", {"coupler_type": "GNN"}, {"coupler_type": "mean"}, 0.01)
    state([other], study)
    assert stated(study)[0] == [other]
    assert (study / "hypotheses.1.json").read_text() == first


def test_the_docs_show_what_the_command_prints_of_the_committed_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("COLUMNS", "80")
    text = (REPOSITORY / "docs/reports.md").read_text()
    arguments, *shown = text.split("$ python -m bench.report ")[1].split("```")[0].splitlines()
    assert main([*arguments.split(), "--no-plots", "--out", str(tmp_path / "report")]) == 0
    printed = [line.rstrip().replace("\u00a0", " ") for line in capsys.readouterr().out.splitlines()]
    assert len(shown) > 15
    parts = "\n".join(shown).strip().split("\n…\n")
    place, text = 0, "\n".join(printed)
    for part in parts:  # each whole, and in this order
        assert part in text[place:], part
        place = text.index(part, place) + len(part)


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=pytest.mark.slow) if number % 4 == 0 else number for number in range(8)],
)
def test_whatever_is_missing_or_failed_a_report_is_made(number, tmp_path):
    """Any runs, seeds and quantities are missing: the report is written, and failed runs are in its rows."""
    random = Random(number)
    couplers = random.sample(["mean", "gate", "GNN", "HGNN all_pairs", "topk"], random.randint(1, 4))
    seeds = random.randint(1, 4)
    failed = {(name, seed): random.choice(STATUSES) for name in couplers for seed in range(seeds)
              if random.random() < 0.5}  # fmt: skip
    parts = ("speed", "memory", "communication", "flops", "parameters", "quality", "check", "used")
    unmeasured = [key for key in parts if random.random() < 0.1]
    path = made_study(tmp_path / "made", dict.fromkeys(couplers, 0.0), seeds=seeds, failed=failed,
                      experts=random.choice([(4,), (2, 4)]), history=random.choice([0, 3]),
                      arrays=random.random() < 0.5, unmeasured=unmeasured)  # fmt: skip
    for run in sorted(file.parent for file in path.glob("*/record.json"))[1:]:
        if random.random() < 0.3:
            shutil.rmtree(run)
        elif random.random() < 0.2:
            null = {"value": None, "reason": "not here"}
            change(run, **{random.choice(["quality", "speed", "memory", "used"]): null})
    report = load_report(path)
    options = {"columns": [], "baseline": None, "allow_unequal": False, "stated": None, "hypotheses": []}
    files = write_report(report, options, tmp_path / "report", plots=number % 4 == 0)
    assert {"report.html", "summary.md"} <= {file.name for file in files}
    rows = [row for section in report.sections for row in section.comparison.rows]
    assert sum(len(row.configuration.runs) for row in rows) == len(list(path.glob("*/record.json")))
    print_report(report, Console(file=io.StringIO(), width=80))
