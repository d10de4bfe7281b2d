"""Paths that cannot be used, files that cannot be written, and files that keep what they were."""

from __future__ import annotations

import errno
import importlib
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data.cache import cached
from bench.files import NotWritten, between, kind_of, read_toml, write_between, write_together, write_whole
from bench.record import RunFolder
from bench.training.checkpoint import load_checkpoint, save_checkpoint
from gnnmoe.config import Refused
from tests.bench.conftest import TINY

SWEEP = "sweep --sweep coupler=mean max_steps=4 min_steps_per_epoch=1"
FLAGS = [
    ("run", "--data-dir"),
    ("run", "--results-dir"),
    ("run", "--checkpoint-dir"),
    ("run", "--resume-checkpoint"),
    ("run", "--config"),
    ("run --epochs 2", "--curriculum"),
    (SWEEP, "--data-dir"),
    (SWEEP, "--results-dir"),
    ("data profile", "--data-dir"),
    ("tune", "--data-dir"),
    ("report study", "--results-dir"),
    ("report ls", "--results-dir"),
]


@pytest.mark.parametrize(
    ("command", "flag", "place"),
    [
        *((command, flag, "circle/x") for command, flag in FLAGS),
        *((command, flag, "~nobody-has-this-name/x") for command, flag in FLAGS[:3]),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_before_anything_is_written(
    command, flag, place, tmp_path, small_data_dir, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    (tmp_path / "study").mkdir()
    name, *words = command.split()
    places = {"--data-dir": str(small_data_dir)} if name in ("run", "sweep") else {}
    places[flag] = f"model:{place}" if flag == "--curriculum" else place
    words += [*(TINY if name == "run" else ()), *(word for pair in places.items() for word in pair)]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"bench.{name}.__main__").main(words)
    assert end.value.code == 2
    _, _, error = capsys.readouterr().err.partition("error: ")
    assert "Too many levels of symbolic links" in error or "home folder is not known" in error
    assert len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_current_folder_that_is_gone_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as end:
        importlib.import_module("bench.run.__main__").main([])
    assert end.value.code == 2
    assert "the current folder cannot be used (No such file or directory)" in capsys.readouterr().err


def test_a_zero_byte_in_a_path_is_refused(tmp_path, capsys):
    (tmp_path / "config.toml").write_text('results_dir = "a\\u0000b"\n')
    with pytest.raises(SystemExit):
        importlib.import_module("bench.run.__main__").main(["--config", str(tmp_path / "config.toml")])
    assert "results_dir is 'a\\x00b'; it must not hold a zero byte." in capsys.readouterr().err


def test_the_kind_of_a_path(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    names = [".", "file", "pipe", "link", "file/x", "absent/x"]
    assert [kind_of(tmp_path / name) for name in names] == ["folder", "file", "other", None, None, None]
    with pytest.raises(Refused, match=r"cannot be read .File name too long"):
        kind_of(tmp_path / ("x" * 300))

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(Refused, match=r"private cannot be read .Permission denied"):
        kind_of(Path("private"))


def test_no_pipe_is_waited_for(tmp_path):
    """In place of a page, and of a history or a log that a run goes on with."""
    page, folder = tmp_path / "page.md", RunFolder(tmp_path, "study", "id")
    folder.path.mkdir(parents=True)
    for path in (page, folder.path / "history.jsonl", folder.path / "log.txt"):
        os.mkfifo(path)
    with pytest.raises(Refused, match=r"page.md cannot be read .it is a pipe or a device"):
        write_between(page, str.upper)
    with pytest.raises(OSError, match="it is a pipe or a device"):
        folder.read_history()
    with pytest.raises(NotWritten, match=r"log.txt cannot be written: it is a pipe or a device"):
        folder.log("a line")


# --- a file that cannot be written


def _save(path: Path) -> None:
    save_checkpoint(path, {"weights": torch.rand(5000)})


def _arrays(path: Path) -> None:
    folder = RunFolder(path.parent.parent.parent, path.parent.parent.name, path.parent.name)
    folder.write_arrays(path.name, {"losses": np.random.default_rng(0).random(5000)})


def _history(path: Path) -> None:
    folder = RunFolder(path.parent.parent.parent, path.parent.parent.name, path.parent.name)
    folder.append_history({"kind": "x" * 50_000})


WRITES = {
    "checkpoint.pt": _save,
    "nll.npz": _arrays,
    "history.jsonl": _history,
    "page.html": lambda path: write_whole(path, bytes(50_000)),
    "plot.svg": lambda path: write_together({path: bytes(50_000)}),
}


@pytest.mark.parametrize(("name", "write"), WRITES.items(), ids=WRITES)
def test_a_file_that_cannot_be_written_is_named_with_the_reason(name, write, tmp_path):
    path = tmp_path / name
    before = b"" if name == "history.jsonl" else b"the old file"
    path.write_bytes(before)
    with pytest.raises(NotWritten, match=rf"^{name} cannot be written: File too large$"):
        _with_small_files(lambda: write(path))
    assert [found.name for found in tmp_path.iterdir()] == [name]
    assert name == "history.jsonl" or path.read_bytes() == before


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", {"step": 1})
    with pytest.raises(NotWritten):
        _with_small_files(lambda: _save(tmp_path / "checkpoint.pt"))
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 1


def test_a_cache_that_cannot_be_written_is_a_note(tmp_path):
    def make_and_keep() -> bytes:
        return cached(tmp_path / "x.bin", "text", lambda: bytes(50_000), read=lambda file: file.read(),
                      write=lambda file, made: file.write(made))  # fmt: skip

    with pytest.warns(UserWarning, match="the text cannot be kept in .* .File too large"):
        assert _with_small_files(make_and_keep) == bytes(50_000)
    assert not list(tmp_path.iterdir())


def _with_small_files(write: Callable[[], object]) -> object:
    """Write where no file may be longer than 8 kB; a quota and a full disk fail at the same calls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        return write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what stays as it was

MARKS = "<!-- a -->", "<!-- b -->"


def test_a_page_behind_a_link_keeps_its_place_its_mode_and_its_line_ends(tmp_path):
    page, link = tmp_path / "page.md", tmp_path / "link.md"
    page.write_bytes("caf\u00e9\r\n<!-- a -->\r\nold\r\n<!-- b -->\r\nend\n".encode())
    page.chmod(0o640)
    link.symlink_to("page.md")
    write_between(link, lambda text: between(text, MARKS, "new\ntable"))
    expected = "caf\u00e9\r\n<!-- a -->\r\n\r\nnew\r\ntable\r\n<!-- b -->\r\nend\n"
    assert page.read_bytes() == expected.encode()
    assert stat.S_IMODE(page.stat().st_mode) == 0o640
    assert link.is_symlink()


def test_toml_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "marked.toml").write_bytes(b'\xef\xbb\xbfcoupler = "mean"\n')
    assert read_toml("--config", tmp_path / "marked.toml") == {"coupler": "mean"}
