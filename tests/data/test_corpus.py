from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from bench.data import sources
from bench.data.corpus import load_corpus
from bench.data.tokenizer import article_lines, canonical_lines

pytestmark = pytest.mark.core("corpus")


def _refuse(*args):
    raise AssertionError("must not be asked")


def test_tiny_folder_by_hand(tiny_dir):
    """WikiText-2 protocol: whitespace words, <eos> ends every line, one <eos> in front."""
    corpus = load_corpus(data_dir=tiny_dir)
    train, words = corpus.splits["train"], corpus.vocabulary.words
    text = (tiny_dir / "wiki.train.tokens").read_bytes()
    expected = "<eos> = One = <eos> <eos> a b a c <eos> <eos> = = Part = = <eos> <eos> a <unk> <eos> <eos> "
    expected += "= Two = <eos> <eos> b a = <eos>"
    assert [words[i] for i in train.stream] == ["<eos>", *expected.split()]
    assert (train.num_tokens, train.num_words, train.num_lines) == (32, 20, 12)
    assert train.num_bytes == len(text)
    assert train.sha256 == hashlib.sha256(text).hexdigest()
    assert (corpus.source, corpus.verdict, corpus.warning) == ("folder", "other", None)
    assert corpus.vocabulary.size == 9  # = a b c One Part Two <eos> <unk>
    outside = " ".join(words[i] for i in corpus.splits["validation"].stream[1:])
    assert outside == "<eos> = <unk> = <eos> <eos> a <unk> <eos>"


def test_documents_are_articles_not_sections(tiny_dir):
    train = load_corpus(data_dir=tiny_dir).splits["train"]
    assert train.document_starts.tolist() == [0, 23]
    assert train.document_ids().tolist() == [0] * 23 + [1] * 9


@pytest.mark.parametrize(
    ("lines", "starts"),
    [
        ([" ", " = A = ", " ", " x ", " ", " = B = ", " "], [0, 5]),
        ([" x ", " ", " = A = ", " "], [0, 2]),  # text in front is a document of its own
        ([" = A = ", " ", " = = B = = ", " ", " x "], [0]),
        ([" = A = ", " ", " x ", " = Wins ; L = ", " y "], [0]),  # a row of a table
        ([" x ", " y "], [0]),
    ],
)
def test_article_lines(lines, starts):
    assert article_lines(lines) == starts


def test_blank_lines_and_line_breaks_have_one_form():
    assert canonical_lines("\r\n a \r\n\n b ") == [" ", " a ", " ", " b "]


def test_parquet_equals_tokens_bit_for_bit(tiny_dir, rows, tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split, texts in rows.items():
        half = len(texts) // 2
        for part, shard in enumerate((texts[:half], texts[half:])):
            pd.DataFrame({"text": shard}).to_parquet(folder / f"{split}-{part:05d}-of-00002.parquet")
    tokens, parquet = load_corpus(data_dir=tiny_dir), load_corpus(data_dir=folder)
    assert {**parquet.to_record(), "files": tokens.files} == tokens.to_record()
    for name, split in tokens.splits.items():
        assert np.array_equal(parquet.splits[name].stream, split.stream)


def test_missing_file_names_it_what_is_there_and_the_remedy(tiny_dir):
    """C1: a missing file names the path, what is there and the remedy."""
    (tiny_dir / "wiki.valid.tokens").rename(tiny_dir / "valid.txt")
    with pytest.raises(
        ValueError, match=r"lacks wiki.valid.tokens .*; it holds valid.txt, wiki.test.tokens"
    ) as caught:
        load_corpus(data_dir=tiny_dir)
    assert str(tiny_dir) in str(caught.value)
    assert "--data-dir" in str(caught.value)
    with pytest.raises(ValueError, match=r"valid.txt is not a folder; pass --data-dir"):
        load_corpus(data_dir=tiny_dir / "valid.txt")
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        load_corpus(data_dir=tiny_dir / "nowhere")


def test_a_long_listing_is_cut(tmp_path):
    for i in range(11):
        (tmp_path / f"a_file_with_a_name_{i:02d}").touch()
    with pytest.raises(ValueError, match=r"name_01, .* … and \d more;"):
        load_corpus(data_dir=tmp_path)


def test_sources_are_tried_in_order(tiny_dir, rows, monkeypatch):
    """Design, Data: folder given, else GNNMOE_DATA_DIR, else cache, else hub, else embedded."""
    texts = {split: sources.join_rows(lines) for split, lines in rows.items()}
    asked = []

    def cache(repository, config, text_column):
        asked.append((repository, config, text_column))
        if len(asked) > 1:
            raise FileNotFoundError("no cache")
        return texts

    monkeypatch.setattr(sources, "read_cache", cache)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(sources, "read_hub", lambda *_: texts)
    folder = load_corpus(data_dir=tiny_dir)
    monkeypatch.setenv("GNNMOE_DATA_DIR", str(tiny_dir))
    assert load_corpus().source == load_corpus(source="folder").source == "folder"
    assert asked == []
    monkeypatch.delenv("GNNMOE_DATA_DIR")
    assert [load_corpus().source, load_corpus().source] == ["cache", "hub"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1", "text")] * 2
    assert load_corpus(source="hub").sha256 == folder.sha256


def test_auto_without_network_serves_the_embedded_text_loudly(monkeypatch):
    monkeypatch.setattr(sources, "read_cache", lambda *_: {}["absent"])
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    monkeypatch.setattr(sources, "read_hub", _refuse)
    corpus = load_corpus()
    assert corpus.source == "embedded"
    assert corpus.verdict == "other"
    warning = corpus.to_record()["warning"]
    for part in ("NOT WIKITEXT-2", "hub cannot be reached", "--data-dir"):
        assert part in warning
    with pytest.raises(ValueError, match=r"Salesforce/wikitext .* cannot be reached; pass --data-dir"):
        load_corpus(source="hub")  # never falls back


def test_failure_of_datasets_is_one_clear_message(monkeypatch):
    def fail(*_):
        raise ConnectionError("broken pipe\nlong story")

    monkeypatch.setattr(sources, "read_cache", fail)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(sources, "read_hub", fail)
    with pytest.raises(
        ValueError, match=r"could not load Salesforce/wikitext .*: broken pipe; pass --data-dir"
    ):
        load_corpus(source="hub")
    assert "broken pipe" in (load_corpus().warning or "")


def test_cache_of_datasets_is_read_without_a_connection(rows, tiny_dir, tmp_path, monkeypatch):
    import datasets.config

    prepared = tmp_path / "cache" / "Salesforce___wikitext" / "wikitext-2-v1" / "0.0.0" / "abc"
    for split, texts in rows.items():
        pd.DataFrame({"text": texts}).to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in rows}
    builder = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path / "build"))
    builder.dataset_name, builder.info.config_name = "wikitext", "wikitext-2-v1"
    builder.info.dataset_name = "wikitext"
    builder.download_and_prepare(str(prepared))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "hub_reachable", _refuse)
    corpus = load_corpus()
    assert corpus.source == "cache"
    assert corpus.sha256 == load_corpus(data_dir=tiny_dir).sha256


def test_probe_keeps_its_time_and_its_peace(monkeypatch):
    from huggingface_hub import constants

    def slow(*_, **__):
        time.sleep(5)
        raise OSError("timed out")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources.urllib.request, "urlopen", slow)
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.2)
    start = time.monotonic()
    assert sources.hub_reachable() is False
    assert time.monotonic() - start < 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources.urllib.request, "urlopen", _refuse)
    assert sources.hub_reachable() is False


def test_probe_asks_the_hub_for_its_head(monkeypatch):
    from contextlib import nullcontext

    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        sources.urllib.request,
        "urlopen",
        lambda request, timeout: asked.append((request.full_url, request.method)) or nullcontext(),
    )
    assert sources.hub_reachable() is True
    assert asked == [(constants.ENDPOINT, "HEAD")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "embeded"}, "unknown data source 'embeded'.*Did you mean 'embedded'"),
        ({"source": "folder"}, "needs a folder; pass --data-dir"),
        ({"source": "hub", "data_dir": "x"}, "reads no folder"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(**arguments)


def test_wikitext_counts(wikitext):
    """WikiText-2 protocol and E1: counts with <eos>, vocabulary, bytes, hashes."""
    record = wikitext.to_record()
    splits = record["splits"]
    assert {name: split["tokens"] for name, split in splits.items()} == {
        "train": 2_088_628,
        "validation": 217_646,
        "test": 245_569,
    }
    assert [split["words"] for split in splits.values()] == [2_051_910, 213_886, 241_211]
    assert [split["bytes"] for split in splits.values()] == [10_797_148, 1_121_681, 1_256_449]
    assert [split["documents"] for split in splits.values()] == [600, 60, 60]
    assert [split["verdict"] for split in splits.values()] == ["same counts", "official", "official"]
    assert (record["vocabulary"]["size"], record["verdict"]) == (33_278, "same counts")
    assert json.loads(json.dumps(record)) == record


def test_record_holds_what_identifies_the_data(tiny_dir):
    """E1: data set name, config, file SHA-256s, token, word and byte counts, vocabulary size."""
    record = load_corpus(data_dir=tiny_dir).to_record()
    assert set(record) >= {"name", "config_name", "source", "verdict", "tokenizer", "files", "sha256"}
    assert (record["tokenizer"], record["vocabulary"]["size"]) == ("word", 9)
    for split in record["splits"].values():
        assert set(split) >= {"tokens", "words", "lines", "bytes", "sha256"}
    text = (tiny_dir / "wiki.test.tokens").read_bytes()
    assert record["files"]["wiki.test.tokens"] == hashlib.sha256(text).hexdigest()
    assert load_corpus(source="embedded").to_record()["files"] == {}


def test_importing_the_package_is_cheap():
    heavy = "{'torch', 'datasets', 'pandas', 'tokenizers'} & set(sys.modules)"
    code = f"import sys; import bench.data, bench.data.corpus; print({heavy} or 'light')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"
