from __future__ import annotations

import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from bench.data import reference_lines
from bench.data.cache import HERE, code_of, key_of
from bench.data.corpus import Corpus, load_corpus
from bench.data.reference_lines import KneserNey


@pytest.fixture
def tiny(tiny_dir) -> Corpus:
    return load_corpus(source="folder", data_dir=tiny_dir)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The sizes of the streams for which the trigram was computed."""
    found: list[int] = []

    def counted(model, stream, real=KneserNey.token_nll):
        found.append(len(stream))
        return real(model, stream)

    monkeypatch.setattr(KneserNey, "token_nll", counted)
    return found


def reference_nll(corpus: Corpus, split: str, num_scored: int, folder: Path) -> dict[str, float]:
    """Return the sums, with the cache in ``folder``."""
    with mock.patch.dict(os.environ, GNNMOE_CACHE_DIR=str(folder)):
        return reference_lines.reference_nll(corpus, split, num_scored)


def cached_file(corpus: Corpus, folder, split: str):
    streams = [corpus.splits[name].stream_sha256 for name in ("train", split)]
    code = code_of(HERE, *reference_lines.MADE_BY)
    key = key_of(code, *streams, corpus.vocabulary.size)
    return folder / "reference_lines" / f"{key}.npy"


def test_sums_over_each_prefix_and_one_computation(tiny, tmp_path, calls):
    test = tiny.splits["test"]
    expected = KneserNey(tiny.splits["train"].stream, tiny.vocabulary.size).token_nll(test.stream)
    for num_scored in range(1, test.num_tokens + 1):
        found = reference_nll(tiny, "test", num_scored, tmp_path)
        unigram = -tiny.vocabulary.log_unigram()[test.stream[1 : num_scored + 1]].sum()
        assert found["unigram"] == pytest.approx(unigram, rel=1e-12)
        assert found["kneser_ney_trigram"] == pytest.approx(expected[:num_scored].sum(), rel=1e-12)
    reference_nll(tiny, "validation", 1, tmp_path)
    assert calls[1:] == [test.num_tokens + 1, tiny.splits["validation"].num_tokens + 1]
    names = {path.name for path in (tmp_path / "reference_lines").iterdir()}
    assert names == {cached_file(tiny, tmp_path, split).name for split in ("test", "validation")}


def other_losses(path):
    """As many losses, in another order, with the old hash at their end."""
    raw = path.read_bytes()
    with path.open("wb") as file:
        np.save(file, np.load(BytesIO(raw))[::-1])
        file.write(raw[file.tell() :])


def another_split(path):
    """A whole file in the place of another one."""
    (other,) = (found for found in path.parent.iterdir() if found != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        other_losses,
        another_split,
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_broken_file_is_made_again_with_one_warning(tiny, tmp_path, calls, damage):
    expected = reference_nll(tiny, "test", 5, tmp_path)
    reference_nll(tiny, "validation", 1, tmp_path)
    damage(cached_file(tiny, tmp_path, "test"))
    with pytest.warns(UserWarning, match="broken") as caught:
        assert reference_nll(tiny, "test", 5, tmp_path) == expected
    assert len(caught) == 1
    assert reference_nll(tiny, "test", 5, tmp_path) == expected  # and no warning: it is whole again
    assert len(calls) == 3


def test_other_ids_of_the_same_text_and_other_code_are_computed_anew(tiny, tmp_path, calls, monkeypatch):
    reference_nll(tiny, "test", 5, tmp_path)
    split = tiny.splits["test"]
    other = replace(tiny, splits={**tiny.splits, "test": replace(split, stream=split.stream[::-1].copy())})
    assert other.sha256 == tiny.sha256
    reference_nll(other, "test", 5, tmp_path)
    monkeypatch.setattr(reference_lines, "code_of", lambda *_: "edited")
    reference_nll(tiny, "test", 5, tmp_path)
    assert len(calls) == 3


def test_bad_questions_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        reference_nll(tiny, "valid", 1, tmp_path)
    for num_scored in (0, tiny.splits["test"].num_tokens + 1):
        with pytest.raises(ValueError, match="num_scored"):
            reference_nll(tiny, "test", num_scored, tmp_path)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("split", "tokens", "unigram", "trigram"),
    [
        pytest.param("test", None, 914, 235.45, marks=pytest.mark.slow),
        ("validation", None, 968, 252.59),
        ("validation", 512 * 128, 931, 231.19),
    ],
)
def test_reference_lines_of_wikitext(wikitext, cache_dir, split, tokens, unigram, trigram):
    """WikiText-2 protocol: unigram 914, 968 and 931; Kneser-Ney trigram 235 on test."""
    num_scored = tokens or wikitext.splits[split].num_tokens
    found = reference_nll(wikitext, split, num_scored, cache_dir)
    assert round(np.exp(found["unigram"] / num_scored)) == unigram
    assert np.exp(found["kneser_ney_trigram"] / num_scored) == pytest.approx(trigram, rel=0.005)


def test_a_vocabulary_too_large_for_the_trigram_has_a_unigram_only(small_data_dir, monkeypatch):
    corpus = load_corpus(data_dir=small_data_dir)
    monkeypatch.setattr("bench.data.reference_lines.LARGEST_VOCABULARY", corpus.vocabulary.size - 1)
    assert set(reference_lines.reference_nll(corpus, "test", 10)) == {"unigram"}
