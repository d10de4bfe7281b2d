"""Byte-level BPE: lossless, trained on the training split only, the same everywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from bench.data.corpus import load_corpus, say_unknown_words
from bench.data.reference_lines import unigram_nll
from bench.data.tokenizer import _training_text, tokenize

pytestmark = pytest.mark.core("corpus")
pytest.importorskip("tokenizers", reason="BPE needs the extra `bpe`: pip install 'gnnmoe[bpe]'")


def _documents(train: str, validation: str = " v \n", test: str = " t \n"):
    texts = {"train": train, "validation": validation, "test": test}
    return {split: (text.splitlines(), [0]) for split, text in texts.items()}


def _text(corpus, name: str) -> str:
    from tokenizers.decoders import ByteLevel

    lines, words = [""], corpus.vocabulary.words
    pieces: list[str] = []
    for token in (words[i] for i in corpus.splits[name].stream[1:]):
        if token in ("<eos>", "<unk>"):
            lines[-1] += ByteLevel().decode(pieces) if pieces else ""
            pieces = []
        if token == "<eos>":
            lines.append("")
        elif token == "<unk>":
            lines[-1] += " <unk>"
        else:
            pieces.append(token)
    return "\n".join(lines)


def test_round_trip_of_bytes_never_seen_in_training():
    validation = " Çà et là , 東京 \U0001f600 \n  \n (<unk>) <unk> <unk> don't -- 1,000 \n"
    content = tokenize(_documents(" a b \n", validation), "bpe:258")
    assert (
        _text(content, "validation") == " Çà et là , 東京 \U0001f600\n\n (<unk>) <unk> <unk> don't -- 1,000\n"
    )
    assert content.vocabulary.size == 258


def test_special_tokens_are_single_and_scored():
    """Protocol: <unk> and <eos> are one token each; <eos> in front and after every line."""
    content = tokenize(_documents(" <unk> a <unk> \n \n <unk> \n" * 3), "bpe:300")
    vocabulary, stream = content.vocabulary, content.splits["train"].stream
    tokens = [vocabulary.words[i] for i in stream]
    assert tokens[:8] == ["<eos>", "<unk>", "Ġa", "<unk>", "<eos>", "<eos>", "<unk>", "<eos>"]
    assert (vocabulary.eos_id, vocabulary.unk_id, stream[0]) == (0, 1, 0)
    assert vocabulary.counts.tolist() == np.bincount(stream[1:], minlength=vocabulary.size).tolist()
    assert not any("un" in word for word in vocabulary.words[2:])  # no piece is spent on the mark's letters


def test_trained_on_the_training_split_only():
    train = " hello world hello there \n" * 5
    plain = tokenize(_documents(train), "bpe:290")
    other = tokenize(_documents(train, " zebra zebra zebra zebra zebra zebra \n" * 9), "bpe:290")
    assert other.vocabulary.sha256 == plain.vocabulary.sha256
    assert other.vocabulary.counts.tolist() == plain.vocabulary.counts.tolist()
    assert "Ġhello" in plain.vocabulary.words
    assert not any("ze" in word for word in other.vocabulary.words)


@pytest.mark.parametrize("spec", ["word", "bpe:258"])
def test_unknown_words_are_counted_but_for_marks_in_the_text(tiny_dir, spec, tmp_path, monkeypatch):
    """``<unk>`` in place of a word is told from the mark that a text itself holds."""
    text = " a <unk> zebra \n <unk> b lion lion \n"
    (tiny_dir / "wiki.valid.tokens").write_text(text, encoding="utf-8")
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path / "c"))
    for _ in range(2):  # fresh, and from the cache
        splits = load_corpus(data_dir=tiny_dir, tokenizer=spec).splits
        assert splits["train"].unknown is None
        split = splits["validation"]
        found = [split.unknown_words(targets) for targets in range(split.num_tokens + 1)]
        assert found == ([0, 0, 0, 1, 1, 1, 1, 2, 3, 3] if spec == "word" else [0] * len(found))
    record = load_corpus(data_dir=tiny_dir, tokenizer=spec).to_record()
    assert record["splits"]["validation"]["unknown_words"] == (3 if spec == "word" else 0)


def test_a_large_share_of_unknown_words_is_said_in_one_line(tiny_dir):
    (tiny_dir / "wiki.test.tokens").write_text(" a a a a a a e \n", encoding="utf-8")  # 1 of 7
    corpus = load_corpus(data_dir=tiny_dir)
    with pytest.warns(UserWarning, match="not in the vocabulary") as caught:
        say_unknown_words(corpus.splits)
    (said,) = caught
    assert str(said.message).startswith("2 of the 5 words of the validation split are not in the vocabulary.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say_unknown_words(load_corpus(data_dir=tiny_dir, tokenizer="bpe:258").splits)


def test_same_tokens_in_every_process(small_data_dir, tmp_path):
    code = (
        "import sys; from pathlib import Path; from bench.data.corpus import load_corpus; "
        "c = load_corpus(data_dir=Path(sys.argv[1]), tokenizer='bpe:280'); "
        "import hashlib; print(c.sha256, hashlib.sha256(c.splits['train'].stream.tobytes()).hexdigest())"
    )
    arguments = [sys.executable, "-c", code, str(small_data_dir)]
    places = {**os.environ, "GNNMOE_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(arguments, capture_output=True, text=True, check=True, env=places).stdout.split()
    corpus = load_corpus(data_dir=small_data_dir, tokenizer="bpe:280")
    assert found == [corpus.sha256, hashlib.sha256(corpus.splits["train"].stream.tobytes()).hexdigest()]


def test_tokenizers_differ_in_identity_and_agree_on_the_text(tiny_dir):
    found = {spec: load_corpus(data_dir=tiny_dir, tokenizer=spec) for spec in ("word", "bpe:258", "bpe:260")}
    assert len({corpus.sha256 for corpus in found.values()}) == 3
    for spec, corpus in found.items():
        assert corpus.to_record()["tokenizer"] == spec
        assert [split.sha256 for split in corpus.splits.values()] == [
            split.sha256 for split in found["word"].splits.values()
        ]
        train = corpus.splits["train"]
        assert (train.num_words, train.num_lines) == (20, 12)
        assert train.words_and_bytes(train.num_tokens)[0] == 32


def test_fewer_pieces_than_asked_for_is_said(tiny_dir):
    for _ in range(2):  # fresh, and from the cache
        with pytest.warns(UserWarning, match="asked for bpe:500; the training text gives only 2"):
            corpus = load_corpus(data_dir=tiny_dir, tokenizer="bpe:500")
    assert 258 <= corpus.vocabulary.size < 500


def test_the_same_pieces_are_the_same_text_whatever_was_asked_for(tiny_dir):
    """A corpus's identity: what the tokenizer is, not how its size was said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer pieces than asked for
        found = [load_corpus(data_dir=tiny_dir, tokenizer=spec) for spec in ("bpe:9000", "bpe:10000")]
    padded, plain = (load_corpus(data_dir=tiny_dir, tokenizer=spec) for spec in ("bpe:0260", "bpe:260"))
    assert found[0].sha256 == found[1].sha256 != plain.sha256
    assert padded.to_record() == plain.to_record()
    assert plain.tokenizer == "bpe:260"


def test_the_merges_count_for_the_identity(tiny_dir):
    corpus = load_corpus(data_dir=tiny_dir, tokenizer="bpe:260")
    assert corpus.merges_sha256
    assert dataclasses.replace(corpus, merges_sha256="0").sha256 != corpus.sha256


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bep:8000", "unknown tokenizer 'bep:8000'; allowed: word, or bpe:SIZE such as bpe:8000"),
        ("bpe", "unknown tokenizer 'bpe'"),
        ("bpe:-1", "unknown tokenizer"),
        ("", "unknown tokenizer ''"),
        ("bpe:257", "the size must lie in 258..1000000"),
        ("bpe:999999999", "the size must lie in"),
        (f"bpe:{'9' * 5000}", "^unknown tokenizer 'bpe:9{30}…; allowed: word, or bpe:SIZE such as bpe:8000$"),
    ],
)
def test_wrong_tokenizer_is_refused_before_the_text_is_read(tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(data_dir=tmp_path / "nowhere", tokenizer=spec)


def test_without_the_package_it_says_how_to_install(tiny_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"needs the package `tokenizers`.*pip install 'gnnmoe\[bpe\]'.*'word'"
    ):
        load_corpus(data_dir=tiny_dir, tokenizer="bpe:300")
    assert load_corpus(data_dir=tiny_dir).tokenizer == "word"


@pytest.mark.slow
def test_wikitext_under_bpe_compares_with_the_word_level(wikitext, wikitext_dir):
    """WikiText-2 protocol: N_word and bytes of a subword model are the word level's; so is the verdict."""
    corpus = load_corpus(data_dir=wikitext_dir, tokenizer="bpe:1000")
    assert (corpus.vocabulary.size, corpus.verdict, corpus.name) == (1000, wikitext.verdict, "wikitext")
    for name, words in (("train", 2_088_628), ("validation", 217_646), ("test", 245_569)):
        split = corpus.splits[name]
        assert split.num_tokens > words
        assert split.words_and_bytes(split.num_tokens) == (words, wikitext.splits[name].num_bytes)
        assert len(split.document_starts) == len(wikitext.splits[name].document_starts)
    validation = corpus.splits["validation"]
    unk = wikitext.splits["validation"].stream == wikitext.vocabulary.unk_id
    assert (validation.stream == corpus.vocabulary.unk_id).sum() == unk.sum()
    nll = unigram_nll(corpus.vocabulary, validation.stream[1:])
    assert np.exp(nll / validation.num_tokens) < 1000  # per piece
    assert np.exp(nll / 217_646) > 968  # per word: a unigram of pieces knows less than one of words


def test_words_below_the_least_count_are_unknown_in_training_too():
    documents = _documents(" a a b <unk> \n", " a b \n")
    splits = tokenize(documents, "word", min_count=2).splits
    assert [split.unknown_words(split.num_tokens) for split in splits.values()] == [1, 1, 1]


def test_documents_begin_at_the_same_words(tiny_dir):
    words, pieces = (
        load_corpus(data_dir=tiny_dir, tokenizer=spec).splits["train"] for spec in ("word", "bpe:258")
    )
    counted = [pieces.words_and_bytes(int(start))[0] for start in pieces.document_starts]
    assert counted == words.document_starts.tolist() == [0, 23]
    assert len(pieces.document_ids()) == pieces.num_tokens > words.num_tokens


def test_the_search_for_merges_sees_a_giant_word_in_parts_and_any_other_text_whole():
    """Its time is quadratic in the length of a word: 334 s were seen for one word of 960 kB."""
    giant = "\u5929" * 2500
    parts = list(_training_text([f" a {giant} b ", " c <unk> d "]))
    assert parts == [f" a {giant[:1000]}", giant[:1000], f"{giant[:500]} b", " c d"]
    content = tokenize(_documents(f" a {giant} b \n"), "bpe:260")
    assert content.splits["train"].num_words == 3
