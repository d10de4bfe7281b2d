"""A study to publish: without bulk, without a place or a name of the machine, and with the same report."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.report.__main__ import main
from bench.report.contents import load_report
from bench.report.files import text_files
from bench.report.publish import publish_study
from bench.study.hypotheses import Hypothesis, state
from bench.study.run_files import ARTICLES, PACKED_HISTORY, read_arrays, read_run
from tests.report._made_studies import made_study
from tests.study.test_study import runs_of

HOST = "elsewhere"


@pytest.fixture
def study(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "there" / "made")
    return tmp_path / "there" / "made"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A study with what a published one must not have, made once and copied for each test."""
    tmp_path = tmp_path_factory.mktemp("original")
    couplers = {"mean": 0.0, "GNN": 0.03, "HGNN all_pairs": -0.03}
    path = made_study(tmp_path / "there" / "made", couplers, seeds=8, noise=0.003, history=3,
                      failed={("GNN", 7): "crashed"})  # fmt: skip
    pairs = {"coupler_type": "HGNN", "static_hyperedge_strategy": "all_pairs"}
    state([Hypothesis("pairs are better", pairs, {"coupler_type": "mean"})], path)
    for run in sorted(path.glob("*/record.json")):
        with (run.parent / "history.jsonl").open("a") as file:
            file.write('{"kind": "train", "st')
        (run.parent / "checkpoint.pt").write_bytes(b"\0" * 1000)
        for folder in ("tensorboard", "plots"):
            (run.parent / folder).mkdir()
            (run.parent / folder / "events").write_text(HOST)
    (path / ".logs").mkdir()
    (path / ".logs" / "x.log").write_text(HOST)
    (path / ".sweep.lock").write_text("12")
    (path / "report").mkdir()
    (path / "report" / "summary.md").write_text(HOST)
    aside = next(path.glob("*/record.json")).parent
    (path / f"{aside.name}.1").mkdir()
    (path / f"{aside.name}.1" / "record.json").write_bytes((aside / "record.json").read_bytes())
    return path


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_what_is_bulk_or_of_the_machine_stays_behind(study, tmp_path):
    publish_study(study, tmp_path / "out" / "made")
    files = bytes_of(tmp_path / "out" / "made")
    assert {name.rpartition("/")[2] for name in files} == {
        "record.json", "history.jsonl.gz", "communication.npz", "articles.npz", "log.txt", "hypotheses.json",
        "published.json",
    }  # fmt: skip
    assert len({name.partition("/")[0] for name in files if "/" in name}) == 24
    assert all(
        (study / name).read_bytes() == data for name, data in files.items() if name.endswith("record.json")
    )
    for name, packed in files.items():
        data = gzip.decompress(packed) if name.endswith(".gz") else packed
        assert HOST.encode() not in data, name
        assert b'"st' not in data[-20:], "a line cut short"
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != "made"]


def test_the_report_of_it_is_the_same(study, tmp_path):
    """Also the interval over articles, which the losses of tokens were for."""
    publish_study(study, tmp_path / "made")
    before, after = (text_files(load_report(path)) for path in (study, tmp_path / "made"))
    assert before == after
    assert "articles_low_nats" in after["tables/comparison.csv"]
    text = after["summary.md"]
    assert "when 25 of 25 runs had, or may have, started" in text, "the run that was set aside still counts"


def test_verify_adds_the_sums_of_articles_up(study, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(study), "--publish", str(out)]) == 0
    assert main([str(out), "--no-plots"]) == 0
    assert main([str(out), "--verify"]) == 0
    assert (
        "23 by file hash, not by token losses (23 of them also by their sums by article), 1 without"
        in capsys.readouterr().out
    )
    run = runs_of(out, "mean")[0]
    arrays = read_arrays(run / ARTICLES)
    arrays["validation_nll_sum"][0] += 1
    np.savez_compressed(run / ARTICLES, **arrays)  # pyright: ignore[reportArgumentType]
    assert main([str(out), "--verify"]) == 1
    assert f"differs: run {run.name}: " in capsys.readouterr().out


def test_what_is_published_is_verified_without_a_report_by_the_hash_of_every_file(study, tmp_path, capsys):
    out = tmp_path / "out"
    publish_study(study, out)
    assert main([str(out), "--verify"]) == 0
    said = capsys.readouterr().out
    assert f"verified: {len(bytes_of(out)) - 1} published files of {out}; of 24 records, 23 by file" in said
    log, history = (next(out.glob(f"*/{name}")) for name in ("log.txt", PACKED_HISTORY))
    log.write_text("another\n")
    history.unlink()
    assert main([str(out), "--verify"]) == 1
    said = capsys.readouterr().out
    assert f"differs: {log.relative_to(out)} is not what was published" in said
    assert f"differs: {history.relative_to(out)} is missing" in said
    assert said.count("differs: ") == 2


def left_out(published: Path) -> dict[str, Any]:
    return json.loads((published / "published.json").read_text())["left_out"]


def test_the_hash_of_the_losses_left_out_is_kept(study, tmp_path):
    publish_study(study, tmp_path / "out")
    run = runs_of(study, "mean")[0]
    kept = left_out(tmp_path / "out")[run.name]["nll.npz"]
    arrays = read_arrays(run / "nll.npz")
    assert kept.keys() == arrays.keys()
    arrays["validation_nll"][3] += 1
    np.savez(run / "nll.npz", **arrays)  # pyright: ignore[reportArgumentType]
    publish_study(study, tmp_path / "again")
    other = left_out(tmp_path / "again")[run.name]["nll.npz"]
    assert {name for name in kept if kept[name] != other[name]} == {"validation_nll"}


def test_twice_is_once(study, tmp_path):
    publish_study(study, tmp_path / "a")
    before = bytes_of(tmp_path / "a")
    written = (tmp_path / "a" / "published.json").stat().st_mtime_ns
    assert publish_study(study, tmp_path / "a").endswith("as it was")
    assert (tmp_path / "a" / "published.json").stat().st_mtime_ns == written
    publish_study(tmp_path / "a", tmp_path / "b")
    assert bytes_of(tmp_path / "b") == before


def test_its_own_folder_is_replaced_and_no_other(study, tmp_path, capsys):
    out = tmp_path / "out"
    publish_study(study, out)
    (runs_of(study, "GNN")[0] / "log.txt").write_text("another\n")
    (out / "report").mkdir()
    assert not publish_study(study, out).endswith("as it was")
    assert "another\n" in {path.read_text() for path in out.glob("*/log.txt")}
    (out / "thesis.txt").write_text("dear")
    for target, message in (
        (out, "holds files that --publish did not write (thesis.txt)"),
        (study / "x", "lie in each other"), (study.parent, "lie in each other"),
        (study / ".sweep.lock" / "x", "lie in each other"), (tmp_path / "out" / "thesis.txt", "is no folder"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main([str(study), "--publish", str(target)])
        err = capsys.readouterr().err
        assert (stopped.value.code, message in err, err.count("\n")) == (2, True, 1), err
    assert (out / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["record.json", "nll.npz", "communication.npz"])
def test_a_damaged_file_is_named_and_nothing_is_written(study, tmp_path, capsys, name):
    run = runs_of(study, "mean")[2]
    (run / name).write_bytes((run / name).read_bytes()[:-60])
    with pytest.raises(SystemExit) as stopped:
        main([str(study), "--publish", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert f"{run.name}/{name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_losses_without_their_articles_are_named(study, tmp_path, capsys):
    run = runs_of(study, "mean")[2]
    np.savez(run / "nll.npz", validation_nll=read_arrays(run / "nll.npz")["validation_nll"])
    with pytest.raises(SystemExit) as stopped:
        main([str(study), "--publish", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert f"{run.name}/nll.npz holds no usable losses of validation: the articles" in capsys.readouterr().err


def test_a_folder_that_is_no_run_of_the_report_stays_behind(study, tmp_path):
    """A copy that a user made: its name would be published, and no report reads it."""
    for copy in (study / f"mine at {HOST}", study / f"mine.at {HOST}"):
        copy.mkdir()
        (copy / "record.json").write_bytes((runs_of(study, "mean")[0] / "record.json").read_bytes())
    publish_study(study, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if HOST in path.name]
    assert HOST not in (tmp_path / "out" / "published.json").read_text()


def test_a_history_that_was_damaged_since_is_named(study, tmp_path):
    """By the report, which is made without it, and by another publication, which is not."""
    publish_study(study, tmp_path / "made")
    run = runs_of(tmp_path / "made", "mean")[0]
    sound = (run / PACKED_HISTORY).read_bytes()
    assert read_run(run).train
    (run / PACKED_HISTORY).write_bytes(sound[:-20])
    assert read_run(run).train == []
    failures = text_files(load_report(tmp_path / "made"))["tables/failures.csv"]
    assert f"{run.name}/{PACKED_HISTORY} cannot be read" in failures
    with pytest.raises(ValueError, match=f"{run.name}/{PACKED_HISTORY} cannot be read"):
        publish_study(tmp_path / "made", tmp_path / "again")


@pytest.mark.parametrize("method", ["write_bytes", "rename"])
def test_a_full_disk_leaves_what_was_there(study, tmp_path, monkeypatch, method):
    """While the files are written, and when the old folder is already out of the way."""
    out = tmp_path / "out"
    publish_study(study, out)
    before = bytes_of(out)
    (runs_of(study, "GNN")[0] / "log.txt").write_text("another\n")
    plain, names = getattr(Path, method), []

    def full(self, *arguments):
        names.append(self.name)
        if len(names) == 40 or self.name == "new":
            raise OSError(28, "No space left on device")
        return plain(self, *arguments)

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
        publish_study(study, out)
    assert bytes_of(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]
