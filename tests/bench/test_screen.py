"""What is printed never ends the work."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from bench.screen import GuardedStream, guard_screen

PRINTS = """
import sys
from bench.screen import guard_screen
guard_screen()
from rich.console import Console
Console().print("checking … café")
print("é" * 20000, file=sys.stderr)
with open("made", "x") as file:
    file.write(str(file.fileno() > 2))
print("the end")
raise SystemExit(3)
"""
OUTPUTS = {
    "a full disk": "> /dev/full 2>&1",
    "a full disk behind stderr": "2> /dev/full",
    "no stdout": ">&-",
    "no output and no input": "<&- >&- 2>&-",
    "a pipe without a reader": "| true; exit ${PIPESTATUS[0]}",
    "both into such a pipe": "2>&1 | true; exit ${PIPESTATUS[0]}",
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_the_exit_status_follows_the_work_and_not_the_output(output, tmp_path):
    said = _shell(f"'{sys.executable}' -c '{PRINTS}' {output}", tmp_path)
    assert said.returncode == 3, said.stderr
    assert (tmp_path / "made").read_text() == "True"  # no file of the work got the number of a stream


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "checking ? caf?"), ("latin-1", "checking ? caf\xe9")]
)
def test_a_letter_that_cannot_be_shown_becomes_a_question_mark(encoding, shown, tmp_path):
    said = _shell(f"PYTHONIOENCODING={encoding} '{sys.executable}' -c '{PRINTS}'", tmp_path)
    assert said.stdout.decode("latin-1").splitlines() == [shown, "the end"]
    assert said.returncode == 3


@pytest.mark.parametrize("columns", ["0", "00", "", "wide"])
def test_a_terminal_without_a_width_shows_all(columns, tmp_path):
    said = _shell(f"COLUMNS={columns} '{sys.executable}' -c '{PRINTS}'", tmp_path)
    assert said.stdout.decode().splitlines() == ["checking … café", "the end"]


def test_a_traceback_to_a_full_disk_still_ends_with_status_1(tmp_path):
    program = PRINTS.replace("raise SystemExit(3)", "raise KeyError(3)")
    assert _shell(f"'{sys.executable}' -c '{program}' 2> /dev/full", tmp_path).returncode == 1


def test_a_terminal_that_was_closed_takes_no_line_and_raises_nothing():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        guarded = GuardedStream(terminal)
        os.close(ours)
        assert guarded.write("lost") == 4
        guarded.flush()
        guarded.finish()  # else the end of the block would raise
    GuardedStream(terminal).write("to a closed stream")


def test_the_screen_is_guarded_once(capsys):
    guard_screen()
    stream = sys.stdout
    guard_screen()
    assert sys.stdout is stream
    print("seen")
    assert capsys.readouterr().out == "seen\n"


def test_every_command_guards_the_screen_first():
    bench = Path(__file__).parents[2] / "bench"
    for path in [bench / "__main__.py", *bench.glob("*/__main__.py")]:
        _, _, body = path.read_text().partition("def main(")
        assert body.split('"""\n')[1].strip().startswith("guard_screen()"), path


def _shell(command: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "LC_ALL": "C.UTF-8"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True)
