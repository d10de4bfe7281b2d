"""Other folders and other data sets: what is taken, and what is refused with which words."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.data import sources
from bench.data.corpus import load_corpus
from bench.data.tokenizer import SPLITS

pytestmark = pytest.mark.core("corpus")


def _txt(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in {
        "train": "a b a\nc\n",
        "validation": "a d",
        "test": "\ufeffb\r\n\r\nb\n",
        **texts,
    }.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def _parquet(folder: Path, column: str, *files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for file in files or [f"{split}-00000-of-00001" for split in SPLITS]:
        frame = pd.DataFrame({"label": [1, 2, 3], column: ["a b", None, "c\nd\n"]})
        frame.to_parquet(folder / f"{file}.parquet")
    return folder


def test_text_files(tmp_path):
    """Words are split at whitespace; a byte-order mark and Windows line breaks are no part of the text."""
    corpus = load_corpus(data_dir=_txt(tmp_path))
    words = corpus.vocabulary.words
    assert [words[i] for i in corpus.splits["validation"].stream] == ["<eos>", "a", "<unk>", "<eos>"]
    assert [words[i] for i in corpus.splits["test"].stream] == ["<eos>", "b", "<eos>", "<eos>", "b", "<eos>"]
    assert corpus.splits["test"].num_bytes == len("b\n \nb\n")
    assert (corpus.name, corpus.source, corpus.verdict) == ("local text", "folder", "other")
    assert list(corpus.files) == ["train.txt", "validation.txt", "test.txt"]
    (tmp_path / "validation.txt").rename(tmp_path / "valid.txt")
    assert load_corpus(data_dir=tmp_path).sha256 == corpus.sha256


def test_parquet_by_another_column(tmp_path):
    """Rows may be empty, or hold several lines."""
    corpus = load_corpus(data_dir=_parquet(tmp_path, "sentence"), text_column="sentence")
    words = [corpus.vocabulary.words[i] for i in corpus.splits["train"].stream[1:]]
    assert words == "a b <eos> <eos> c <eos> d <eos>".split()


@pytest.mark.parametrize("column", ["text", "label"])
def test_no_such_column_names_those_there_are(tmp_path, column):
    _parquet(tmp_path, "sentence")
    message = (
        f"train-00000-of-00001.parquet has no text column '{column}'; its text columns: 'sentence'; name"
    )
    with pytest.raises(ValueError, match=message):
        load_corpus(data_dir=tmp_path, text_column=column)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"wiki.{name}.tokens": b"a\n" for name in ("train", "valid", "test")},
         "holds its text as tokens and as txt.*it holds test.txt.*keep one kind"),
        ({"validation.txt": None, "wiki.valid.tokens": b"a\n"},
         "lacks validation.txt or valid.txt.* .all three of one kind.; it holds"),
        ({"valid.txt": b"e"}, "validation split needs one file, and there are 2: valid.txt, validation.txt"),
        ({"test.txt": b" \n\t\n"}, "test.txt holds no text; fetch"),
        ({"test.txt": "b ü\n".encode("utf-16")}, "test.txt is not UTF-8 text .*save it as UTF-8"),
        ({"test.txt": b"", "train.txt": b""}, "train.txt holds no text; fetch"),
        ({"test.txt": "b a\n".encode("utf-16-le")}, "test.txt is no text: line 1 holds a zero byte"),
        ({"test.txt": b"a b\nc\n" + bytes(9)}, "test.txt is no text: line 3 holds a zero byte, at letter 7 "),
        ({"test.txt": "link"}, "test.txt is a link whose target does not exist; pass --data-dir"),
        ({"test.txt": "pipe"}, "test.txt is a pipe or a device, not a file; pass --data-dir"),
        ({"test.txt": "folder"}, r"test.txt cannot be read \(Is a directory\); pass --data-dir"),
    ],
)  # fmt: skip
def test_a_folder_of_wrong_text_files_is_refused(tmp_path, changes, message):
    _txt(tmp_path)
    for name, content in changes.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content == "folder":
            (tmp_path / name).mkdir()
        elif content == "link":
            (tmp_path / name).symlink_to("nowhere")
        elif content == "pipe":
            os.mkfifo(tmp_path / name)
        elif content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train-00000-of-00002"], "the train split needs 2 files, and there are 1: train-00000-of-00002.pa"),
        (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
         "needs 2 files, and there are 3"),
        (["train-00000-of-00001"], "train-00000-of-00001.parquet is not a parquet file .*fetch"),
    ],
)  # fmt: skip
def test_a_damaged_shard_or_a_part_of_them_is_refused(tmp_path, files, message):
    _parquet(tmp_path, "text", *files, "validation-00000-of-00001", "test-00000-of-00001")
    if "not a parquet file" in message:
        (tmp_path / f"{files[0]}.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=message):
        load_corpus(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("kind", "cast"),
    [(name, name) for name in ("string", "large_string", "string_view")]
    + [(f"dictionary of {name}", name) for name in ("string", "large_string")],
)
def test_a_text_column_of_each_type_of_text_is_read(tmp_path, kind, cast):
    """A pandas category is a dictionary of texts."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    if not hasattr(pa, cast):
        pytest.skip(f"this pyarrow has no {cast}")
    column = pa.array(["a b", None, "c\nd\n", "a b"], getattr(pa, cast)())
    table = pa.table({"label": [1, 2, 3, 4], "text": column.dictionary_encode() if kind != cast else column})
    for split in SPLITS:
        write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    corpus = load_corpus(data_dir=tmp_path)
    words = [corpus.vocabulary.words[number] for number in corpus.splits["train"].stream[1:]]
    assert words == "a b <eos> <eos> c <eos> d <eos> a b <eos>".split()


def test_a_parquet_file_with_two_text_columns_of_one_name_is_refused_by_its_name(tmp_path):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    for split in ("train", "validation", "test"):
        table = pa.table([["a b"], ["c d"], ["e f"]], names=["text", "twice", "twice"])
        write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    assert load_corpus(data_dir=tmp_path).splits["train"].num_words == 2
    with pytest.raises(ValueError, match="has several columns 'twice'; rename them"):
        load_corpus(data_dir=tmp_path, text_column="twice")


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9\r\n", b"", b"HTTP/1.1 302 x\r\nLocation: /\r\n\r\n"])
def test_what_is_no_hub_is_not_reachable_and_prints_no_traceback(answer, monkeypatch, capfd):
    """The answer of another server, silence, and a redirect to itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_answer, args=(server, answer), daemon=True).start()
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(sources, "PROBE_SECONDS", 0.3)
        assert not sources.hub_reachable()
    assert capfd.readouterr().err == ""


def _answer(server: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            connection.recv(4096)
            if answer:
                connection.sendall(answer)
                connection.close()


def _hub(monkeypatch, splits: dict[str, dict[str, list]]) -> None:
    import datasets

    made = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})

    def absent(*_):
        raise ValueError("Couldn't find cache")

    monkeypatch.setattr(sources, "read_cache", absent)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: made)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """An empty folder to start in, an empty cache of ``datasets``, and no hub."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mytext",
            r"mytext is in the current folder, .* pass --data-dir mytext\. .* start in another folder",
        ),
        ("own/mytext", r"own/mytext is in the current folder"),
        ("./mytext", r"never a path; got '\./mytext'\. To read files, pass --data-dir DIR"),
        ("own/../mytext", "never a path"),
        ("../here", "never a path"),
        ("/tmp", "never a path"),
        ("~/mytext", "never a path"),
        ("mytext/", "never a path"),
        ("", "never a path"),
        ("text", "--dataset text names a file format of `datasets`"),
        ("parquet", "pass --data-dir DIR"),
    ],
)
def test_a_name_that_datasets_would_read_files_by_is_refused(offline, monkeypatch, name, message):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    (offline / "own").mkdir()
    for folder in (offline, offline / "mytext", offline / "own" / "mytext"):
        _txt(folder)
    with pytest.raises(ValueError, match=message):
        load_corpus(source="hub", dataset_name=name)


@pytest.mark.parametrize("reachable", [False, True])
def test_what_another_tool_read_from_a_folder_is_no_set_of_the_hub(offline, monkeypatch, reachable):
    """The cache of ``datasets`` keeps it by the name of the folder, and falls back to it."""
    import datasets

    _txt(offline / "mytext")
    datasets.load_dataset("mytext")
    (offline / "mytext").rename(offline / "gone")
    monkeypatch.setattr(sources, "hub_reachable", lambda: reachable)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # then it takes what it has in its cache
    with pytest.raises(ValueError, match="cache of `datasets` has mytext, but made from files of"):
        load_corpus(source="hub", dataset_name="mytext")


def test_what_the_hub_gave_is_taken_from_the_cache(offline):
    import datasets

    _txt(offline / "mytext")
    datasets.load_dataset("mytext")
    (offline / "mytext").rename(offline / "gone")
    (entry,) = (file.parent for file in offline.parent.glob("cache/mytext/default/0.0.0/*/dataset_info.json"))
    entry.rename(entry.with_name("b08601e04326c79dfdd32d625aee71d232d685c3"))  # the commit of a repository
    corpus = load_corpus(source="hub", dataset_name="mytext")
    assert (corpus.source, corpus.splits["train"].num_words) == ("cache", 4)


def test_another_set_of_the_hub(monkeypatch):
    rows = {"label": [0, 1], "sentence": ["a b", "a"]}
    _hub(monkeypatch, dict.fromkeys(SPLITS, rows))
    arguments: dict[str, Any] = {
        "source": "hub",
        "dataset_name": "some/set",
        "dataset_config_name": "plain",
    }
    corpus = load_corpus(**arguments, text_column="sentence")
    assert (corpus.name, corpus.config_name, corpus.source) == ("some/set", "plain", "hub")
    assert corpus.splits["test"].num_tokens == 5
    with pytest.raises(
        ValueError,
        match=r"some/set \(plain\), split train, has no text column 'label'; its text columns: 'sentence'",
    ):
        load_corpus(**arguments, text_column="label")


@pytest.mark.parametrize("absent", [["validation"], ["validation", "test"]])
def test_a_set_without_a_split_names_those_it_has(monkeypatch, absent):
    _hub(monkeypatch, {split: {"text": ["a"]} for split in SPLITS if split not in absent})
    there = ", ".join(split for split in SPLITS if split not in absent)
    with pytest.raises(
        ValueError, match=f"has no split {', '.join(absent)}; it has {there}; .* name another set"
    ):
        load_corpus(source="hub", dataset_name="some/set", dataset_config_name="plain")


def test_a_set_in_the_cache_that_cannot_serve_is_not_called_absent(monkeypatch):
    """The reason stands in the message, and the hub, which has the same set, is not asked."""

    def unfit(*_):
        raise sources.UnfitDataset("some/set (plain) has no split test; it has train")

    monkeypatch.setattr(sources, "read_cache", unfit)
    monkeypatch.setattr(sources, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="has no split test; it has train; pass --data-dir"):
        load_corpus(source="hub", dataset_name="some/set", dataset_config_name="plain")


def test_a_set_without_text(monkeypatch):
    _hub(monkeypatch, {split: {"text": ["a" if split == "train" else " "]} for split in SPLITS})
    with pytest.raises(ValueError, match="has no text in column 'text' of split validation"):
        load_corpus(source="hub", dataset_name="some/set", dataset_config_name="plain")
