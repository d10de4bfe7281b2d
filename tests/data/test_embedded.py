from __future__ import annotations

import platform
import sys

import pytest

from bench.data.corpus import load_corpus
from bench.data.sources import embedded_texts


def test_size_and_shares():
    """Design, Data: about 62,000 tokens, about 80/10/10."""
    splits = load_corpus(source="embedded").splits
    tokens = {name: split.num_tokens for name, split in splits.items()}
    total = sum(tokens.values())
    assert 55_000 < total < 72_000
    assert tokens["train"] / total == pytest.approx(0.8, abs=0.03)
    assert tokens["validation"] / total == pytest.approx(0.1, abs=0.03)


def test_no_paragraph_is_in_two_splits_or_twice():
    paragraphs = [line for lines, _ in embedded_texts().values() for line in lines]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any("***" in line or "===" in line for line in paragraphs)


def test_words_seen_once_are_unknown():
    corpus = load_corpus(source="embedded")
    counts = dict(zip(corpus.vocabulary.words, corpus.vocabulary.counts, strict=True))
    assert min(counts.values()) == 2
    stream = corpus.splits["train"].stream[1:]
    assert (stream == corpus.vocabulary.unk_id).sum() == counts["<unk>"] > 0


def test_same_text_every_time_and_the_python_is_named():
    first, second = load_corpus(source="embedded"), load_corpus(source="embedded")
    assert first.sha256 == second.sha256
    assert first.to_record()["python_version"] == platform.python_version()


def test_python_without_the_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"lacks pydoc_data.topics.*--data-dir"):
        load_corpus(source="embedded")


def test_topics_are_the_documents():
    for lines, starts in embedded_texts().values():
        assert starts[0] == 0
        assert starts == sorted(set(starts))
        assert starts[-1] < len(lines)
    train = load_corpus(source="embedded").splits["train"]
    assert len(train.document_starts) == len(embedded_texts()["train"][1])
