"""Texts that are to be published: what else than a plain path says where, and what a name must not break."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.analysis.redact import redact_study
from bench.analysis.report import load_report
from bench.analysis.report_files import text_files
from bench.records.neutral import Neutral
from tests.analysis._made_studies import made_study


@pytest.fixture
def named(monkeypatch):
    """A machine and a user of these names."""

    def be(host: str, user: str) -> None:
        monkeypatch.setattr("platform.node", lambda: host)
        monkeypatch.setattr("getpass.getuser", lambda: user)
        monkeypatch.setattr(Path, "home", classmethod(lambda _: Path("/home") / user))

    return be


@pytest.mark.parametrize(("text", "neutral"), [
    ("(f pid=12, ip=10.1.2.3)", "(f pid=12, ip=HOST)"),
    ("ray://10.0.0.5:10001 and http://192.168.0.7:8265/x", "ray:PATH:10001 and http://HOST:8265/x"),
    ("https://joe:token@example.org/x", "https://USER@example.org/x"),
    ("//fileserver/secretlab/x", "PATH"),
    ("file://fileserver/secretlab/x.py", "PATH/x.py"),
    ("at ./../../secretlab/x", "at PATH"),
    ("\x1b[31m/scratch/secretlab/x.py\x1b[0m, line 1", "PATH/x.py, line 1"),
    ('File "\x1b[35m/scratch/my secretlab/x.py\x1b[0m"', 'File "PATH/x.py"'),
])  # fmt: skip
def test_what_else_says_where(text, neutral):
    keep = Neutral()
    assert keep.text(text) == neutral
    assert keep.text(neutral) == neutral


@pytest.mark.parametrize("text", ["127.0.0.1:8000", "0.0.0.0", "torch 2.11.0", "driver 580.159.04",
                                  "1.2.3.4.5", "5.2.0.post1", "300.1.2.3"])  # fmt: skip
def test_what_is_no_address_stays(text):
    assert Neutral().text(text) == text


def test_a_name_that_is_part_of_a_field_or_of_a_flag_changes_neither(named):
    """Max redacts what he ran on a machine called train: the records stay what they are."""
    named("train", "max")
    keep = Neutral()
    row = {"kind": "train", "max_steps": 3, "/home/max/x.toml": "by Max"}
    assert keep.value(row) == {"kind": "train", "max_steps": 3, "PATH/x.toml": "by USER"}
    command = keep.command("python -m bench.run --max-steps=3 --max-seq-length 8 --run-name max")
    assert command == "python -m bench.run --max-steps=3 --max-seq-length 8 --run-name USER"


def test_the_report_of_what_max_redacts_is_the_same(named, tmp_path):
    named("train", "max")
    study = made_study(tmp_path / "there" / "made", {"mean": 0.0, "GNN": 0.03}, seeds=3, history=3)
    redact_study(study, tmp_path / "made")
    before, after = (text_files(load_report(path)) for path in (study, tmp_path / "made"))
    tables = [name for name in before if not name.startswith("tables/runs")]
    assert {name: after[name] for name in tables} == {name: before[name] for name in tables}
