"""A study of somebody else: what it names stays in its folder, and what it says is shown as text."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.files import inside, shown, visible
from bench.record import Record, RunFolder
from bench.report.__main__ import main
from bench.report.publish import publish_study
from bench.report.summary import print_summary
from bench.study.hypotheses import Hypothesis, state
from bench.sweep.outcome import outcome_of
from tests.report._made_studies import made_study
from tests.study.test_study import change, runs_of

RED = "\x1b[31mred\x9b0m\x07\u202eback"
SHOWN = r"\x1b[31mred\x9b0m\x07\u202eback"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TWO = {"mean": 0.0, "GNN": 0.03}


@pytest.fixture
def study(tmp_path) -> Path:
    return made_study(tmp_path / "results" / "made", TWO, seeds=2, history=2)


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    """Return exit status, output and errors of bench.report."""
    try:
        status = main(list(map(str, arguments)))
    except SystemExit as error:
        status = int(error.code or 0)
    return status, *capsys.readouterr()


def refused(capsys, *arguments: object) -> str:
    """Return the one message of a command that must be refused."""
    status, out, err = command(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_control_characters_are_escaped():
    assert visible(RED) == SHOWN
    assert visible(visible(RED)) == SHOWN
    assert visible("a\nb\tc\r", keep="\n") == "a\nb\\tc\\r"
    assert visible("\ud800\x85\u2066ü☃\u200d") == "\\ud800\\x85\\u2066ü☃\u200d"
    assert shown({"error": "a\nb", "x\x1b": ["a\nb", 1, None, {"error": ["\n\x1b"]}]}) == {
        "error": "a\nb", "x\\x1b": ["a\\nb", 1, None, {"error": ["\n\\x1b"]}]}  # fmt: skip
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    assert shown(deep) == deep
    with pytest.raises(ValueError, match="nested more than 100 levels"):
        shown([deep])


def test_no_text_of_a_record_reaches_the_terminal_or_a_file_raw(tmp_path, capsys):
    """Wherever a record may have a text, and in the name of a study and of a folder in it."""
    study = made_study(tmp_path / "results" / f"x{RED}", TWO, seeds=3, history=2, names={"GNN": f"G{RED}"},
                       failed={("GNN", 1): "crashed"})  # fmt: skip
    state([Hypothesis(f"GNN {RED} is better", {"num_experts": 4}, {"coupler_type": "mean"})], study)
    for run in sorted(study.glob("*/record.json")):
        record = json.loads(run.read_text())
        record |= {"run_name": RED, "command": f"python {RED}", "error": f"{RED}\nsecond line{RED}"}
        record["status"] = RED if record["status"] == "crashed" else "ok"
        record["environment"] |= {"device_name": RED, "git_commit": RED, "project_sha256": RED}
        record["data"] |= {"name": RED, "config_name": RED, "tokenizer": RED, "sha256": RED}
        record["check"]["checks"] = {RED: {"passed": True, "detail": RED, "seconds": 0.1}}
        record["communication"] = {"layer_0": {"mixing": {RED: 1.0}}}
        record["tuned"] = {"value": None, "reason": RED}
        run.write_text(json.dumps(record))
    change(runs_of(study, "mean")[0], environment__coupler_sha256=RED, schema_version="2.0")
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    first, _, third = runs_of(study, "mean")
    third.rename(study / f"copy{RED}")
    broken = study / f"broken{RED}"
    broken.mkdir()
    (broken / "record.json").write_text(RED)
    places = ("--results-dir", study.parent)
    out, said = tmp_path / "report", []
    for arguments in (
        (study.name, "--no-plots", "--out", out, *places), ("ls", *places), ("ls", study.name, *places),
        ("show", first.name, *places), ("compare", study.name, study.name, *places),
        (study.name, "--verify", "--out", out, *places), ("none", *places),
        (study.name, "--no-plots", "--baseline", "none", "--out", tmp_path / "x", *places),
    ):  # fmt: skip
        _, *texts = command(capsys, *arguments)
        said.append("".join(texts))
        assert not UNSAFE.search(said[-1]), arguments
    assert all(r"\x1b[31m" in re.sub(r"\s", "", text) for text in said)
    for path in out.rglob("*"):
        if path.is_file():
            assert not UNSAFE.search(path.read_text()), path
    after = {path: path.read_bytes() for path in before if path.is_file()}
    assert len(after) == len(before) - 5, "the copy has moved"
    assert all(before[path] == data for path, data in after.items())


def test_a_run_and_a_sweep_show_the_record_that_they_find_as_text(study):
    """Also what a run says that has just ended."""
    run = runs_of(study, "mean")[0]
    change(run, run_name=RED, error=f"{RED}\nmore", status=RED)
    record = RunFolder(study.parent, study.name, run.name).read_record()
    assert isinstance(record, Record)
    assert record.run_name == SHOWN
    record.run_name = record.error = RED
    shown_there = io.StringIO()
    print_summary(record, Path(f"a{RED}"), Console(file=shown_there, width=80))
    assert not UNSAFE.search(shown_there.getvalue())
    outcome = outcome_of(record)
    assert (outcome.status, outcome.error) == (SHOWN, RED)


NAMES = ("../victim.txt", "tables/../../victim.txt", "{absolute}", "../{run}/record.json", "away/victim.txt",
         "", ".", "tables//x", "..\\victim.txt", "C:/victim.txt", "\0", "x" * 5000)  # fmt: skip


def refusal(source: Path, name: str) -> str:
    """Return what is said of a name that leaves the folder of the file that names it."""
    if name.startswith("away"):
        link = f"{source.parent / name} is a symbolic link, or lies behind one"
        return f"{link}, that leads out of {source.parent}."
    said = repr(name if len(name) <= 200 else f"{name[:200]}…")
    return f"{source} names the file {said}, which is not in {source.parent}. Nothing was changed."


def test_a_report_deletes_and_reads_nothing_outside_its_folder(study, tmp_path, capsys):
    report, victim = study / "report", tmp_path / "victim.txt"
    assert command(capsys, study, "--no-plots")[0] == 0
    victim.write_text("dear")
    (study / "victim.txt").write_text("dear")
    (report / "away").symlink_to(tmp_path)
    written = (report / "options.json").read_text()
    for name in NAMES:
        name = name.format(absolute=victim, run=runs_of(study, "mean")[0].name)
        options = json.loads(written)
        options["files"] |= {name: "0" * 64}
        (report / "options.json").write_text(json.dumps(options))
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for arguments in (("--no-plots",), ("--verify",)):
            assert refusal(report / "options.json", name) in refused(capsys, study, *arguments)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_was_published_is_read_in_its_folder_only(study, tmp_path, capsys):
    out = tmp_path / "out"
    publish_study(study, out)
    (out / "away").symlink_to(tmp_path)
    path = out / "published.json"
    written = path.read_text()
    for name in NAMES:
        name = name.format(absolute=tmp_path / "x", run=runs_of(study, "mean")[0].name)
        said = json.loads(written)
        said["files"][name] = "0" * 64
        path.write_text(json.dumps(said))
        message = refusal(path, name)
        assert message in refused(capsys, out, "--verify")
        assert message in refused(capsys, study, "--publish", out)
        assert path.is_file()


def test_a_link_in_the_folder_of_a_report_leads_nowhere_else(study, tmp_path, capsys):
    """Neither where a file is written, nor the folder itself."""
    assert command(capsys, study, "--no-plots")[0] == 0
    report, away = study / "report", tmp_path / "away"
    away.mkdir()
    (away / "report.html").write_text("dear")
    for name, target in (
        ("report.html", away / "report.html"),
        ("tables", away),
        ("options.json", away / "x"),
    ):
        kept = (report / name).rename(tmp_path / name)
        (report / name).symlink_to(target)
        if name == "options.json":
            (away / "x").write_bytes(kept.read_bytes())
        said = refused(capsys, study, "--no-plots")
        assert f"{report / name}" in said
        assert f"is a symbolic link, or lies behind one, that leads out of {report}" in said
        (report / name).unlink()
        kept.rename(report / name)
    report.rename(tmp_path / "elsewhere")
    report.symlink_to(tmp_path / "elsewhere")
    assert f"{report} is a symbolic link" in refused(capsys, study, "--no-plots")
    assert f"{report} is a symbolic link" in refused(capsys, study, "--verify")
    assert command(capsys, study, "--no-plots", "--out", tmp_path / "elsewhere")[0] == 0
    assert {path.name for path in away.iterdir()} == {"report.html", "x"}
    assert (away / "report.html").read_text() == "dear"


def test_a_folder_and_a_link_in_the_place_of_an_old_file_stay(study, tmp_path, capsys):
    assert command(capsys, study, "--no-plots")[0] == 0
    report = study / "report"
    (report / "mine").mkdir()
    (report / "mine" / "thesis.txt").write_text("dear")
    (report / "link").symlink_to(report / "mine" / "thesis.txt")
    options = json.loads((report / "options.json").read_text())
    options["files"] |= {"mine": "x", "link": "x"}
    (report / "options.json").write_text(json.dumps(options))
    assert command(capsys, study, "--no-plots")[0] == 0
    assert (report / "link").read_text() == "dear"
    (report / "summary.md").unlink()
    (report / "summary.md").mkdir()
    assert "summary.md is a folder" in refused(capsys, study, "--no-plots")


OPTIONS = {"reference": None, "allow_unequal": False, "stated": None, "hypotheses": [], "files": {}}


BAD_OPTIONS = [
    "null", "[]", '"x"', "3", "{}", "{", "[" * 100_000, '{"files": []}', '{"files": {}}',
    *(json.dumps({**OPTIONS, key: 3}) for key in OPTIONS), json.dumps({**OPTIONS, "files": {"a": 1}}),
    *(json.dumps({**OPTIONS, "hypotheses": [found]}) for found in (
        3, {}, {"statement": "s", "better": 3, "than": {"coupler": "GNN"}},
        {"statement": "s", "better": {"nothing": 3}, "than": {"coupler": "GNN"}})),
]  # fmt: skip
BAD_HYPOTHESES = [
    "null", "[]", "{", "[" * 100_000, '{"stated": 3, "hypotheses": []}', '{"stated": "x", "hypotheses": 3}',
    '{"stated": "x", "hypotheses": [{"statement": "s", "better": [], "than": {}}]}',
]  # fmt: skip
BAD_LISTS = ["null", "[]", "{", '{"files": {}}', '{"files": [], "set_aside": []}',
             '{"files": {"a": 1}, "set_aside": []}',
             '{"files": {}, "set_aside": [{"start": 3}]}']  # fmt: skip


def test_options_of_a_wrong_type_are_one_message(study, capsys):
    report = study / "report"
    report.mkdir()
    for text in BAD_OPTIONS:
        (report / "options.json").write_text(text)
        for arguments in (("--no-plots",), ("--verify",)):
            assert str(report / "options.json") in refused(capsys, study, *arguments), text[:99]
        assert (report / "options.json").read_text() == text


def test_kept_hypotheses_of_a_wrong_type_are_one_note(study, capsys):
    for text in BAD_HYPOTHESES:
        (study / "hypotheses.json").write_text(text)
        status, _, err = command(capsys, study, "--no-plots")
        assert status == 0
        assert err.startswith(f"note: {study / 'hypotheses.json'} "), text[:99]
        assert err.endswith("The report is made without hypotheses.\n")


def test_a_wrong_list_of_published_files_is_one_message(study, capsys):
    for text in BAD_LISTS:
        (study / "published.json").write_text(text)
        assert str(study / "published.json") in refused(capsys, study, "--verify"), text


def test_a_pipe_in_a_study_is_not_waited_for(study, tmp_path, capsys):
    os.mkfifo(study / "hypotheses.json")
    assert command(capsys, study, "--no-plots")[0] == 0
    said = refused(capsys, study, "--publish", tmp_path / "out")
    assert f"{study / 'hypotheses.json'} cannot be read: it is a pipe" in said


@pytest.mark.parametrize("name", ["log.txt", "record.json", "hypotheses.json", ""])
def test_what_lies_elsewhere_is_not_published(study, tmp_path, capsys, name):
    """A link in a downloaded study would put a file of this machine into what is published."""
    run = runs_of(study, "mean")[0]
    path = study / name if name.startswith("hyp") else run / name
    if path.exists():
        path.rename(tmp_path / "secret")
    else:
        (tmp_path / "secret").write_text('{"password": 3}')
    path.symlink_to(tmp_path / "secret")
    said = refused(capsys, study, "--publish", tmp_path / "out")
    assert f"{path} is a symbolic link, or lies behind one, that leads out of {study}" in said.replace(
        f"{path}/", str(path)) or name == ""  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_inside_gives_the_path(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("a", "real/a", "link/a", "a b..c", "...", "\u202e"):
        assert inside(tmp_path, name, tmp_path / "x") == tmp_path / name
