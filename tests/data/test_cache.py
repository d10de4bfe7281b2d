"""The cache of prepared corpora gives what was prepared, or makes it again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from bench.data import cache, corpus
from bench.data.cache import cache_folder
from bench.data.corpus import Corpus

pytestmark = pytest.mark.core("corpus")
ARRAYS = ("stream", "document_starts", "target_bytes", "ends_word", "unknown")


def load_corpus(cache_dir: Path | None = None, **arguments) -> Corpus:
    """Return the corpus, with the cache in ``cache_dir``."""
    with mock.patch.dict(os.environ, {"GNNMOE_CACHE_DIR": str(cache_dir)} if cache_dir else {}):
        return corpus.load_corpus(**arguments)


def _same(first: Corpus, second: Corpus) -> None:
    assert first.to_record() == second.to_record()
    assert first.vocabulary.words == second.vocabulary.words
    assert np.array_equal(first.vocabulary.counts, second.vocabulary.counts)
    for name, split in first.splits.items():
        for field in ARRAYS:
            one, other = getattr(split, field), getattr(second.splits[name], field)
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                assert np.array_equal(one, other)


def _refuse(*args):
    raise AssertionError("must not be prepared again")


def _only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("spec", ["word", "bpe:270"])
@pytest.mark.parametrize("source", ["folder", "embedded"])
def test_hit_equals_fresh(small_data_dir, tmp_path, monkeypatch, spec, source):
    if spec != "word":
        pytest.importorskip("tokenizers")
    data_dir = small_data_dir if source == "folder" else None
    arguments = {"source": source, "data_dir": data_dir, "tokenizer": spec, "cache_dir": tmp_path / "c"}
    fresh = load_corpus(**arguments)
    monkeypatch.setattr(corpus, "tokenize", _refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _same(load_corpus(**arguments), fresh)


def test_a_changed_file_or_tokenizer_is_prepared_anew(tiny_dir, tmp_path):
    before = load_corpus(data_dir=tiny_dir, cache_dir=tmp_path / "c")
    (tiny_dir / "wiki.test.tokens").write_text(" e \n", encoding="utf-8")
    after = load_corpus(data_dir=tiny_dir, cache_dir=tmp_path / "c")
    assert (before.splits["test"].num_tokens, after.splits["test"].num_tokens) == (10, 2)
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_the_same_bytes_elsewhere_are_a_hit(tiny_dir, tmp_path, monkeypatch):
    load_corpus(data_dir=tiny_dir, cache_dir=tmp_path / "c")
    monkeypatch.setattr(corpus, "tokenize", _refuse)
    assert (
        load_corpus(data_dir=tiny_dir.rename(tmp_path / "moved"), cache_dir=tmp_path / "c").source == "folder"
    )


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"train.stream.npy") + 200] ^= 1  # within the array: only the checksum knows
    path.write_bytes(raw)


def _another_corpus(path: Path) -> None:
    folder = path.parent / "other"
    other = load_corpus(source="embedded", cache_dir=folder)
    assert other.source == "embedded"
    _only_file(folder).replace(path)
    folder.rmdir()


def _swapped_ids(path: Path) -> None:
    """A sound zip whose validation has the same ids in another order, with the old hash at its end."""
    raw = path.read_bytes()
    with np.load(path) as arrays:
        stored = {name: arrays[name] for name in arrays}
    stored["validation.stream"] = stored["validation.stream"][::-1]
    np.savez(path, **stored)
    with path.open("ab") as file:
        file.write(raw[-cache._SEAL_BYTES :])


@pytest.mark.parametrize("damage", [_flip, _another_corpus, _swapped_ids, lambda path: path.write_bytes(b"")])
def test_a_broken_entry_is_rebuilt_and_said_once(tiny_dir, tmp_path, damage):
    """Bad input: a broken cache (rebuilt, said once)."""
    folder = tmp_path / "c"
    fresh = load_corpus(data_dir=tiny_dir, cache_dir=folder)
    path = _only_file(folder)
    damage(path)
    with pytest.warns(UserWarning, match="is broken .* it is made anew") as caught:
        _same(load_corpus(data_dir=tiny_dir, cache_dir=folder), fresh)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _same(load_corpus(data_dir=tiny_dir, cache_dir=folder), fresh)


def test_a_record_tells_ids_apart_that_stand_for_the_same_text(tiny_dir):
    whole = load_corpus(data_dir=tiny_dir)
    found = whole.to_record()["splits"]["validation"]
    split = whole.splits["validation"]
    ids = b"".join(int(i).to_bytes(8, "little", signed=True) for i in split.stream)
    assert found["stream_sha256"] == hashlib.sha256(ids).hexdigest()
    other = replace(whole, splits={**whole.splits, "validation": replace(split, stream=split.stream[::-1])})
    assert other.sha256 == whole.sha256
    assert other.to_record()["splits"]["validation"]["stream_sha256"] != found["stream_sha256"]


def test_a_folder_that_cannot_be_written_only_warns(tiny_dir, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match=r"cannot be kept in .*file.*; set GNNMOE_CACHE_DIR") as caught:
        found = load_corpus(data_dir=tiny_dir, cache_dir=tmp_path / "file" / "c")
    assert len(caught) == 1
    assert found.splits["train"].num_tokens == 32

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        load_corpus(data_dir=tiny_dir, cache_dir=tmp_path / "c")
    assert len(caught) == 1
    assert list((tmp_path / "c").iterdir()) == []


def test_an_entry_that_can_be_neither_read_nor_replaced(tiny_dir, tmp_path):
    folder = tmp_path / "c"
    fresh = load_corpus(data_dir=tiny_dir, cache_dir=folder)
    path = _only_file(folder)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be kept") as caught:
        _same(load_corpus(data_dir=tiny_dir, cache_dir=folder), fresh)
    assert len(caught) == 1
    assert list(folder.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_after_an_hour(tmp_path):
    """Temporary files of the same kind only, and none that may still be written."""
    names = [
        ".a.npz.ff01",
        ".b.npz.22ab12",
        ".young.npz.ff03",
        ".a.txt.ff04",
        "a.npz",
        ".tmp",
    ]
    old = time.time() - 3700
    for name in names:
        (tmp_path / name).touch()
        if "young" not in name:
            os.utime(tmp_path / name, (old, old))
    cache.replace_file(tmp_path / "c.npz", lambda file: np.save(file, np.zeros(1)))
    assert {path.name for path in tmp_path.iterdir()} == {*names[2:], "c.npz"}


def test_two_processes_prepare_at_once(small_data_dir, tmp_path):
    """Both get the corpus, one whole file remains, and nothing else lies beside it."""
    code = (
        "import sys, time, warnings; from pathlib import Path; from bench.data import corpus\n"
        "warnings.simplefilter('error'); fresh = corpus.tokenize\n"
        "def slow(*a):\n"
        "    time.sleep(0.3)\n"  # both miss before either writes
        "    return fresh(*a)\n"
        "corpus.tokenize = slow\n"
        "c = corpus.load_corpus(data_dir=Path(sys.argv[1])); print(c.sha256)"
    )
    arguments = [sys.executable, "-c", code, str(small_data_dir)]
    places = {**os.environ, "GNNMOE_CACHE_DIR": str(tmp_path / "c")}
    runs = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=places) for _ in range(2)]
    hashes = [run.communicate(timeout=60)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    _only_file(tmp_path / "c")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_corpus(data_dir=small_data_dir, cache_dir=tmp_path / "c")
    assert hashes == [found.sha256] * 2


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GNNMOE_CACHE_DIR", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("GNNMOE_CACHE_DIR")
    assert cache_folder() == Path("/xdg/gnnmoe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "gnnmoe"


@pytest.mark.slow
def test_wikitext_times(wikitext_dir, tmp_path):
    """Speed: from scratch under 10 s, from the cache under 1 s."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        load_corpus(data_dir=wikitext_dir, cache_dir=tmp_path)
        seconds.append(time.perf_counter() - start)
    assert seconds[0] < 10
    assert seconds[1] < 1
    assert _only_file(tmp_path).stat().st_size < 12e6
