"""Words and bytes that a prefix of the targets covers, against a count by hand at every prefix."""

from __future__ import annotations

import re

import pytest

from bench.data.corpus import load_corpus
from bench.data.tokenizer import SPLITS, canonical_lines

pytestmark = pytest.mark.core("corpus")

ODD = (
    " \n = Ünï = \n \n naïve café 東京 don't \U0001f600 <unk> \n\n"
    "no space in front\n  two  spaces\tand a tab \u00a0 \n\u3000wide\u2003 spaces \n"
    "don't wait , naïve café (<unk>) 東京 x \x1c y \r\n \t \n the end"
)


@pytest.fixture
def odd_dir(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_bytes((ODD * (1 + (split == "train"))).encode())
    return tmp_path


def _parts(text: str) -> list[bytes]:
    """The bytes of each word and end-of-line mark: what precedes a word belongs to it."""
    parts = []
    for line in canonical_lines(text):
        found = re.findall(r"\s*\S+|\s+$", line)
        tail = found.pop() if found and not found[-1].strip() else ""
        parts += [*(part.encode() for part in found), tail.encode() + b"\n"]
    return parts


def test_every_prefix_at_word_level(odd_dir):
    split = load_corpus(data_dir=odd_dir).splits["validation"]
    parts = _parts(ODD)
    text = "".join(f"{line}\n" for line in canonical_lines(ODD)).encode()
    assert b"".join(parts) == text
    assert split.num_tokens == len(parts) == split.num_words + split.num_lines
    for n in range(len(parts) + 1):
        assert split.words_and_bytes(n) == (n, sum(map(len, parts[:n])))
    assert split.words_and_bytes(split.num_tokens) == (len(parts), len(text)) == (len(parts), split.num_bytes)


@pytest.mark.parametrize("size", [258, 300])
def test_every_prefix_under_bpe(odd_dir, size):
    """A word counts with its last piece; each piece has its own bytes, the first the whitespace too."""
    corpus = load_corpus(data_dir=odd_dir, tokenizer=f"bpe:{size}")
    split, parts, words = corpus.splits["validation"], _parts(ODD), corpus.vocabulary.words
    pieces = [words[i] for i in split.stream[1:]]
    at, covered, expected = 0, 0, [(0, 0)]
    for number, part in enumerate(parts):
        whole = part.decode().strip()
        left = 1 if whole in ("", "<unk>") else len(f" {whole}".encode())  # pieces have one space in front
        extra = len(part) - left
        while left:
            length = 1 if pieces[at] in ("<eos>", "<unk>") else len(pieces[at])
            left -= length
            covered, extra, at = covered + length + extra, 0, at + 1
            expected.append((number + (left == 0), covered))
    assert at == split.num_tokens
    assert [split.words_and_bytes(n) for n in range(at + 1)] == expected
    assert expected[-1] == (split.num_words + split.num_lines, split.num_bytes)


@pytest.mark.parametrize("num_targets", [-1, 33])
def test_targets_outside_the_split_are_refused(tiny_dir, num_targets):
    split = load_corpus(data_dir=tiny_dir).splits["train"]
    with pytest.raises(ValueError, match=f"the train split has 32 targets; got {num_targets}"):
        split.words_and_bytes(num_targets)


def test_wikitext_prefixes(wikitext):
    """WikiText-2 protocol: N_word counts <eos>; all targets together have all bytes."""
    for split in wikitext.splits.values():
        assert split.words_and_bytes(split.num_tokens) == (split.num_tokens, split.num_bytes)
    validation = wikitext.splits["validation"]
    assert validation.words_and_bytes(217_646) == (217_646, 1_121_681)
    assert validation.words_and_bytes(3) == (3, len(" \n = Homarus"))
