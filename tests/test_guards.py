"""What the commands print of the committed studies and of the ready sweep files, letter by letter.

A refactor may not change these texts. ``python -m tests.test_guards`` writes the files of tests/golden that
are missing and leaves the others. Where a text is meant to change, delete its file first, and say in the
commit why it changes.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest

REPOSITORY = Path(__file__).parents[1]
GOLDEN = REPOSITORY / "tests/golden"
STUDIES = sorted(path.parent.name for path in REPOSITORY.glob("results/reference/*/published.json"))
SWEEPS = sorted(path.stem for path in REPOSITORY.glob("sweeps/*.toml") if "hypotheses" not in path.stem)


def printed(*arguments: str) -> str:
    """Return what ``python -m`` prints with these arguments in the repository's root, 80 columns wide."""
    out = io.StringIO()
    with (
        contextlib.chdir(REPOSITORY),
        contextlib.redirect_stdout(out),
        mock.patch.dict(os.environ, COLUMNS="80"),
        mock.patch.object(sys, "argv", [*arguments]),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # the module may be imported
        pytest.raises(SystemExit) as ended,
    ):
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    assert not ended.value.code, out.getvalue()
    return out.getvalue()


def texts_of_study(name: str, folder: Path) -> dict[str, str]:
    """Return what --verify says of a study, and the summary of its report, by the names of their files."""
    about = ["bench.report", f"results/reference/{name}", "--out", str(folder / "report")]
    verified = printed(*about, "--verify")
    printed(*about, "--no-plots")
    summary = (folder / "report/summary.md").read_bytes().decode()
    return {f"{name}.verify.txt": verified, f"{name}.summary.md": summary}


def texts_of_sweep(name: str, folder: Path) -> dict[str, str]:
    """Return the plan of a sweep file on the embedded text, by the name of its file."""
    places = ["--data-source", "embedded", "--device", "cpu", "--results-dir", str(folder)]
    return {f"{name}.dry-run.txt": printed("bench.sweep", f"sweeps/{name}.toml", "--dry-run", *places)}


def check(found: dict[str, str]) -> None:
    for name, text in found.items():
        assert text == (GOLDEN / name).read_bytes().decode(), f"{name} is no longer what it was"


LARGE = ("baseline", "reference-cpu")


@pytest.mark.parametrize(
    "study", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in STUDIES]
)
def test_the_report_of_a_committed_study(study, tmp_path):
    check(texts_of_study(study, tmp_path))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_plan_of_a_ready_sweep_file(sweep, tmp_path):
    check(texts_of_sweep(sweep, tmp_path))


def test_every_golden_text_has_its_study_or_sweep_file():
    names = {f"{name}.{kind}" for name in STUDIES for kind in ("verify.txt", "summary.md")}
    names |= {f"{name}.dry-run.txt" for name in SWEEPS}
    assert {path.name for path in GOLDEN.iterdir()} == names


def write_missing() -> None:
    """Write the golden texts that are missing."""
    GOLDEN.mkdir(exist_ok=True)
    for names, texts in ((STUDIES, texts_of_study), (SWEEPS, texts_of_sweep)):
        for name in names:
            with TemporaryDirectory() as folder:
                for file, text in texts(name, Path(folder)).items():
                    if not (GOLDEN / file).exists():
                        (GOLDEN / file).write_bytes(text.encode())


if __name__ == "__main__":
    write_missing()
