"""A study to publish: without bulk, without a place or a name of the machine, and with the same report."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from bench.analysis.redact import redact_study
from bench.analysis.report import load_report
from bench.analysis.report_files import text_files
from bench.analysis.run_data import ARTICLES, PACKED_HISTORY, read_arrays, read_run
from bench.records import neutral
from bench.records.neutral import Neutral
from bench.records.schema import time_of
from bench.report import main
from bench.sweeps.hypotheses import Hypothesis, state
from tests.analysis._made_studies import made_study
from tests.analysis.test_study import runs_of

HOST, DOMAIN, LOGIN = "gpu-node17", "gpu-node17.cs.example.org", "amelia"
SECRETS = (HOST, LOGIN, "secretlab", "wiki-copy", "/home", "/scratch", "/tmp", "Volumes", "C:\\Users")
PLACES = (
    "/scratch/secretlab/wiki-copy", "/home/amelia/results", "~amelia/secretlab/x.py", "/tmp/pytest-of-x/run",
    "../../secretlab/data", "C:\\Users\\amelia\\secretlab", "/Volumes/secretlab",
    "file:///home/amelia/x.toml",
)  # fmt: skip
TRACEBACK = """Traceback (most recent call last):
  File "/home/amelia/secretlab/bench/session.py", line 93, in run
    self._phases()
  File "/home/amelia/my secretlab/own coupler.py", line 7, in forward
  File "/scratch/secretlab/.venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1
OSError: [Errno 28] No space left on device: '/scratch/secretlab/wiki-copy/a b/nll.npz' on gpu-node17."""


@pytest.fixture(autouse=True)
def another_machine(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: DOMAIN)
    monkeypatch.setattr("getpass.getuser", lambda: LOGIN)
    monkeypatch.setattr(Path, "home", classmethod(lambda _: Path("/home/amelia")))


@pytest.fixture
def study(tmp_path) -> Path:
    """A study whose every text names places, with what a published one must not have."""
    couplers = {"mean": 0.0, "GNN": 0.03, "HGNN all_pairs": -0.03}
    path = made_study(tmp_path / "there" / "made", couplers, seeds=8, noise=0.003, history=3,
                      failed={("GNN", 7): "crashed"})  # fmt: skip
    pairs = {"coupler_type": "HGNN", "static_hyperedge_strategy": "all_pairs"}
    state([Hypothesis(f"at {HOST}, better", pairs, {"coupler_type": "mean"})], path)
    for run in sorted(path.glob("*/record.json")):
        plant(run.parent)
    (path / ".logs").mkdir()
    (path / ".logs" / "x.log").write_text(HOST)
    (path / ".sweep.lock").write_text("12")
    (path / "report").mkdir()
    (path / "report" / "summary.md").write_text("/home/amelia")
    aside = next(path.glob("*/record.json")).parent
    (path / f"{aside.name}.1").mkdir()
    (path / f"{aside.name}.1" / "record.json").write_bytes((aside / "record.json").read_bytes())
    return path


def plant(run: Path) -> None:
    """Name places, host and user in every text that a run has, but for the names that say what it is."""
    record = json.loads((run / "record.json").read_text())
    every = f"{' and '.join(PLACES)} at {DOMAIN}, {HOST}:8265 by {LOGIN}, in mine/secretlab results/made/x"
    record["command"] = (
        "/home/amelia/.venv/bin/python -m bench.run --coupler-type=GNN '--data_dir=/home/amelia/wiki copy' "
        "--results-dir secretlab --config ../amelia/x.toml --checkpoint-dir=/scratch/secretlab "
        f"--run-name '{every}' --seed=1"
    )
    part = {"start": "2025-01-01T12:00:00Z", "end": None, "seconds": {"total": 9.0}, "resumed_at_step": None}
    record["time"] = time_of([part | {"command": record["command"] + more} for more in ("", " --resume")])
    record["error"] = record["error"] and f"{record['error']}\n{TRACEBACK}\n{every}"
    record["run_name"] = record["config"]["places"]["run_name"] = f"of {every}"
    record["config"]["places"] |= {
        "data_dir": "/scratch/secretlab/wiki-copy",
        "results_dir": "mine/secretlab results",
        "checkpoint_dir": "/tmp/a b",
    }
    record["environment"] |= {"cuda_home": "/scratch/secretlab/cuda", "where": HOST}
    record["tuned"] = {"value": None, "reason": f"{TRACEBACK} {every}"}
    for check in record["gate"].get("checks", {}).values():
        check["detail"] += f" {TRACEBACK} {every}"
    record["data"]["files"] = {"/scratch/secretlab/wiki.train.tokens": "0" * 64}
    (run / "record.json").write_text(json.dumps(record))
    (run / "log.txt").write_text(f"2025-01-01T00:00:00Z crashed\n{TRACEBACK}\n{every}\n")
    rows = [
        *(run / "history.jsonl").read_text().splitlines(),
        json.dumps({"kind": "note", "step": 1, "text": every}),
    ]
    (run / "history.jsonl").write_text("\n".join(rows) + '\n{"kind": "train", "st')
    (run / "checkpoint.pt").write_bytes(b"\0" * 1000 + HOST.encode())
    (run / "trace.json").write_text(HOST)
    for folder in ("tensorboard", "plots"):
        (run / folder).mkdir()
        (run / folder / "events").write_text(HOST)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_no_place_and_no_name_of_the_machine_is_in_any_byte(study, tmp_path):
    redact_study(study, tmp_path / "out" / "made")
    files = bytes_of(tmp_path / "out" / "made")
    assert {name.rpartition("/")[2] for name in files} == {
        "record.json", "history.jsonl.gz", "communication.npz", "articles.npz", "log.txt", "hypotheses.json",
        "redacted.json",
    }  # fmt: skip
    assert len({name.partition("/")[0] for name in files if "/" in name}) == 24
    for name, packed in files.items():
        data = gzip.decompress(packed) if name.endswith(".gz") else packed
        found = [
            secret
            for secret in (*SECRETS, str(tmp_path), str(study))
            if secret.lower().encode() in data.lower()
        ]
        assert not found, (name, found)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name != "made"]


def test_what_stays_can_still_be_read(study, tmp_path):
    redact_study(study, tmp_path / "out")
    [crashed] = [record for path in (tmp_path / "out").glob("*/record.json")
                 if (record := json.loads(path.read_text()))["status"] == "crashed"]  # fmt: skip
    error = crashed["error"]
    for line in ('File "bench/session.py", line 93', 'File "torch/nn/modules/module.py", line 1',
                 'File "PATH", line 7', "No space left on device: 'PATH/nll.npz' on HOST."):  # fmt: skip
        assert line in error, error
    assert crashed["command"].startswith(
        "python -m bench.run --coupler-type=GNN --data_dir=data --results-dir results --config PATH/x.toml "
        "--checkpoint-dir=checkpoints --run-name "
    )
    parts = crashed["time"]["parts"]
    assert [part["command"] for part in parts] == [crashed["command"], f"{crashed['command']} --resume"]
    assert crashed["config"]["places"]["data_dir"] == "data"


def test_the_report_of_it_has_the_same_tables_and_verdicts(study, tmp_path):
    """Also the interval over articles, which the losses of tokens were for; but for the texts of errors."""
    redact_study(study, tmp_path / "made")
    before, after = (text_files(load_report(path)) for path in (study, tmp_path / "made"))
    assert before.keys() == after.keys()
    assert "articles_low_nats" in after["tables/comparison.csv"]
    for name in before:
        if not name.startswith(("tables/failures", "summary", "tables/runs")):
            assert before[name] == after[name], name
    assert before["summary.md"].replace(HOST, "HOST") == after["summary.md"]
    assert "when 25 of 25 runs had started" in after["summary.md"], "the run that was set aside still counts"


def test_the_host_that_ran_it_is_hidden_on_another(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("platform.node", lambda: "x")
    for number, hide in enumerate(([], ["--hide", HOST, DOMAIN])):
        assert main([str(study), "--redact", str(tmp_path / f"{number}"), *hide]) == 0
    texts = [b"".join(gzip.decompress(data) if name.endswith(".gz") else data for name, data in files.items())
             for files in (bytes_of(tmp_path / "0"), bytes_of(tmp_path / "1"))]  # fmt: skip
    assert [HOST.encode() in text for text in texts] == [True, False]
    assert b"example.org" not in texts[1]
    with pytest.raises(SystemExit) as stopped:
        main([str(study), "--hide", HOST])
    assert stopped.value.code == 2
    assert "--hide is of --redact" in capsys.readouterr().err


def test_verify_adds_the_sums_of_articles_up(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("platform.node", lambda: "x")
    out = tmp_path / "out"
    assert main([str(study), "--redact", str(out), "--hide", HOST]) == 0
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
    redact_study(study, out)
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


def test_the_record_keeps_the_hash_of_the_losses_left_out(study, tmp_path):
    redact_study(study, tmp_path / "out")
    run = runs_of(study, "mean")[0]
    kept = json.loads((tmp_path / "out" / run.name / "record.json").read_text())["left_out"]["nll.npz"]
    arrays = read_arrays(run / "nll.npz")
    assert kept.keys() == arrays.keys()
    arrays["validation_nll"][3] += 1
    np.savez(run / "nll.npz", **arrays)  # pyright: ignore[reportArgumentType]
    redact_study(study, tmp_path / "again")
    other = json.loads((tmp_path / "again" / run.name / "record.json").read_text())["left_out"]["nll.npz"]
    assert {name for name in kept if kept[name] != other[name]} == {"validation_nll"}


def test_twice_is_once(study, tmp_path):
    redact_study(study, tmp_path / "a")
    before = bytes_of(tmp_path / "a")
    written = (tmp_path / "a" / "redacted.json").stat().st_mtime_ns
    assert redact_study(study, tmp_path / "a").endswith("as it was")
    assert (tmp_path / "a" / "redacted.json").stat().st_mtime_ns == written
    redact_study(tmp_path / "a", tmp_path / "b")
    assert bytes_of(tmp_path / "b") == before


def test_its_own_folder_is_replaced_and_no_other(study, tmp_path, capsys):
    out = tmp_path / "out"
    redact_study(study, out)
    (runs_of(study, "GNN")[0] / "log.txt").write_text("another\n")
    (out / "report").mkdir()
    assert not redact_study(study, out).endswith("as it was")
    assert "another\n" in {path.read_text() for path in out.glob("*/log.txt")}
    (out / "thesis.txt").write_text("dear")
    for target, message in (
        (out, "holds files that --redact did not write (thesis.txt)"),
        (study / "x", "lie in each other"), (study.parent, "lie in each other"),
        (study / ".sweep.lock" / "x", "lie in each other"), (tmp_path / "out" / "thesis.txt", "is no folder"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main([str(study), "--redact", str(target)])
        err = capsys.readouterr().err
        assert (stopped.value.code, message in err, err.count("\n")) == (2, True, 1), err
    assert (out / "thesis.txt").read_text() == "dear"


@pytest.mark.parametrize("name", ["record.json", "nll.npz", "communication.npz"])
def test_a_damaged_file_is_named_and_nothing_is_written(study, tmp_path, capsys, name):
    run = runs_of(study, "mean")[2]
    (run / name).write_bytes((run / name).read_bytes()[:-60])
    with pytest.raises(SystemExit) as stopped:
        main([str(study), "--redact", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert f"{run.name}/{name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_losses_without_their_articles_are_named(study, tmp_path, capsys):
    run = runs_of(study, "mean")[2]
    np.savez(run / "nll.npz", validation_nll=read_arrays(run / "nll.npz")["validation_nll"])
    with pytest.raises(SystemExit) as stopped:
        main([str(study), "--redact", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert f"{run.name}/nll.npz holds no usable losses of validation: the articles" in capsys.readouterr().err


def test_a_folder_that_is_no_run_of_the_report_stays_behind(study, tmp_path):
    """A copy that a user made: its name would be published, and no report reads it."""
    for copy in (study / f"mine at {HOST}", study / f"mine.at {HOST}"):
        copy.mkdir()
        (copy / "record.json").write_bytes((runs_of(study, "mean")[0] / "record.json").read_bytes())
    redact_study(study, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if HOST in path.name]
    assert HOST not in (tmp_path / "out" / "redacted.json").read_text()


def test_a_history_that_was_damaged_since_is_named(study, tmp_path):
    """By the report, which is made without it, and by another redaction, which is not."""
    redact_study(study, tmp_path / "made")
    run = runs_of(tmp_path / "made", "mean")[0]
    sound = (run / PACKED_HISTORY).read_bytes()
    assert read_run(run).train
    (run / PACKED_HISTORY).write_bytes(sound[:-20])
    assert read_run(run).train == []
    failures = text_files(load_report(tmp_path / "made"))["tables/failures.csv"]
    assert f"{run.name}/{PACKED_HISTORY} cannot be read" in failures
    with pytest.raises(ValueError, match=f"{run.name}/{PACKED_HISTORY} cannot be read"):
        redact_study(tmp_path / "made", tmp_path / "again")


@pytest.mark.parametrize("method", ["write_bytes", "rename"])
def test_a_full_disk_leaves_what_was_there(study, tmp_path, monkeypatch, method):
    """While the files are written, and when the old folder is already out of the way."""
    out = tmp_path / "out"
    redact_study(study, out)
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
        redact_study(study, out)
    assert bytes_of(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]


def test_a_coupler_of_a_file_keeps_its_file_name_and_stays_told_apart(tmp_path):
    """Two files of one name are two couplers: their runs must not become seeds of one configuration."""
    names = {"a": "/home/amelia/one/own.py:Own", "b": "/home/amelia/two/own.py:Own", "c": "lib/other.py:Own"}
    path = made_study(tmp_path / "made", {"mean": 0.0, "a": 0.01, "b": 0.02, "c": 0.03}, seeds=2, names=names,
                      history=2)  # fmt: skip
    redact_study(path, tmp_path / "out")
    [group] = load_report(tmp_path / "out").study.groups
    found = {one.coupler: one.counted.keys() for one in group.configurations}
    assert found == {name: {0, 1} for name in ("mean", "own.py:Own", "own-2.py:Own", "other.py:Own")}
    losses = [[run.loss() for run in one.runs] for one in group.configurations]
    [original] = load_report(path).study.groups
    assert losses == [[run.loss() for run in one.runs] for one in original.configurations]


def test_what_says_no_place_stays_as_it_is():
    keep = Neutral()
    for text in (
        "1,126 tokens/s", "λ = (E − k) / (k (E − 1))", "±0.01 nats/token", "results/default/a38be5e8f024",
        "https://arxiv.org/abs/2308.00951", "train/valid, 3/4 and and/or", "PATH/x.py at HOST by USER",
        "mean_linear", "examples.leaking_coupler:LeakingCoupler", "D⁻¹ H W B⁻¹ Hᵀ X Θ", "n / m",
        "<br/> </b>", "HGNN.residual=false", "step 3/120", "E/k", r"a \n b",
    ):  # fmt: skip
        assert keep.text(text) == text


def test_the_committed_records_stay_as_they_are():
    for path in sorted((neutral.REPOSITORY / "results" / "reference").glob("*/*/record.json"))[::7]:
        record = json.loads(path.read_text())
        assert Neutral().value(record) == record
        assert Neutral().command(record["command"]) == record["command"]
