from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.data.corpus import Corpus, load_corpus
from bench.data.tokenizer import Split, Vocabulary

TINY = {
    "train": " \n = One = \n \n a b a c \n \n = = Part = = \n \n a <unk> \n \n = Two = \n \n b a = \n",
    "valid": " \n = Three = \n \n a d \n",
    "test": " \n = Four = \n \n c c b \n",
}


@pytest.fixture(scope="session")
def wikitext(wikitext_dir) -> Corpus:
    return load_corpus(source="folder", data_dir=wikitext_dir)


@pytest.fixture
def tiny_dir(tmp_path) -> Path:
    """A folder of three token files: train has two articles, 32 tokens and one section."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, text in TINY.items():
        (folder / f"wiki.{name}.tokens").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def rows() -> dict[str, list[str]]:
    """The tiny texts as the hub stores them: a row per line, blank ones empty."""
    names = {"train": "train", "validation": "valid", "test": "test"}
    lines = {split: TINY[name].splitlines(keepends=True) for split, name in names.items()}
    return {split: [line if line.strip() else "" for line in found] for split, found in lines.items()}


def _split(num_tokens: int, name: str = "train") -> Split:
    """Target t has the id t + 1, <eos> is 0; two documents."""
    return Split(
        name=name,
        stream=np.arange(num_tokens + 1),
        document_starts=np.array([0, num_tokens // 2]),
        num_tokens=num_tokens,
        num_words=num_tokens,
        num_lines=0,
        num_bytes=0,
        sha256="",
    )


def _corpus(num_tokens: int) -> Corpus:
    splits = {name: _split(num_tokens, name) for name in ("train", "validation", "test")}
    words = ("<eos>", "<unk>")
    return Corpus("synthetic", "", "folder", "other", Vocabulary(words, np.zeros(2, dtype=np.int64)), splits)


@pytest.fixture(scope="session")
def make_split() -> Callable[..., Split]:
    return _split


@pytest.fixture(scope="session")
def make_corpus() -> Callable[[int], Corpus]:
    return _corpus
