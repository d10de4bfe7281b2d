"""Token streams: a text's words, or pieces of words by byte-level BPE, as ids of one vocabulary.

BPE is trained on the training split. It cuts each word on its own, with one space in front of the word.
``<eos>`` closes every line, and the word ``<unk>`` stays one token. A word ``<eos>`` in the text is the same
mark as at word level.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from gnnmoe.config import Refused, brief

SPLITS = ("train", "validation", "test")
EOS = "<eos>"
UNK = "<unk>"
MIN_PIECES = 256 + 2  # every byte, <eos> and <unk>
MAX_PIECES = 1_000_000
_SPEC = re.compile(r"bpe:([0-9]{1,9})")
_TITLE = re.compile(r" = (?!=)(.*[^=]|[^=]) = ")
_WORD = re.compile(r"\S+")  # the same whitespace as str.split()
LONGEST_WORD = 1000
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)")

Documents = Mapping[str, tuple[Sequence[str], Sequence[int]]]
"""The lines of each split, and the indices of the lines at which documents begin, the first 0."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words (or pieces of words) in the order of their ids, with their counts in the training split.

    Shapes: ``counts`` (size,) int64.

    Raises:
        ValueError: a word stands twice, ``<eos>`` or ``<unk>`` is missing, or a word has no count.
    """

    words: tuple[str, ...]
    counts: np.ndarray

    def __post_init__(self) -> None:
        if len(self._ids) != len(self.words) or not {EOS, UNK} <= self._ids.keys():
            raise ValueError(f"a vocabulary needs each word once, {EOS} and {UNK} among them")
        if self.counts.shape != (len(self.words),):
            raise ValueError(f"a vocabulary of {len(self.words)} words has {self.counts.size} counts")

    @classmethod
    def from_counts(cls, found: Mapping[str, int], min_count: int = 1) -> Vocabulary:
        """Return the vocabulary of counted words: most frequent first, equal counts in alphabetical order.

        Words with fewer than ``min_count`` occurrences count as ``<unk>``. ``<unk>`` and ``<eos>`` always
        belong to the vocabulary, with a count of 0 if ``found`` lacks them.
        """
        kept = {word: n for word, n in found.items() if n >= min_count or word in (EOS, UNK)}
        kept[UNK] = kept.get(UNK, 0) + sum(found.values()) - sum(kept.values())
        kept.setdefault(EOS, 0)
        ordered = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
        return cls(tuple(word for word, _ in ordered), np.array([n for _, n in ordered], dtype=np.int64))

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}

    @property
    def size(self) -> int:
        """Number of words, with ``<eos>`` and ``<unk>``."""
        return len(self.words)

    @property
    def eos_id(self) -> int:
        """Id of the mark at the end of every line."""
        return self._ids[EOS]

    @property
    def unk_id(self) -> int:
        """Id of every word outside the vocabulary."""
        return self._ids[UNK]

    @cached_property
    def sha256(self) -> str:
        """Hash of the words in the order of their ids."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """Return the ids (len(words),) int64, each in 0..size − 1; a word outside becomes ``<unk>``."""
        ids, unk = self._ids, self.unk_id
        return np.fromiter((ids.get(word, unk) for word in words), dtype=np.int64, count=len(words))

    def log_unigram(self) -> np.ndarray:
        """Return log p(word) in nats, (size,) float64: p = (count + 1) / Σ (count + 1) in training.

        The added one gives a word that training lacks a probability. (The usual unigram baselines of
        WikiText-2 were made in this way: 914 on test. Plain frequencies give 912.)
        """
        counts = self.counts.astype(np.float64) + 1.0
        return np.log(counts) - np.log(counts.sum())


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a corpus as a continuous stream of token ids.

    Shapes: ``stream`` (num_tokens + 1,) int64, with one ``<eos>`` in front so that every token is predicted
    once (target t is ``stream[t + 1]``); ``document_starts`` (documents,) int64, the number of the first
    target of each document, the first 0; ``target_bytes`` (num_tokens,) int32, the bytes of text that each
    target covers; ``ends_word`` (num_tokens,) bool, whether the target completes a word or is an end-of-line
    mark, or None if every target does (word level); ``unknown`` (num_tokens,) bool, whether the target is
    ``<unk>`` in place of another word, or None if no target is. A ``<unk>`` of the text itself is no unknown
    word.

    ``num_tokens`` counts targets, ``num_words`` words between whitespace without the end-of-line marks, and
    ``num_lines`` these marks. ``num_bytes`` and ``sha256`` describe the text in UTF-8 (``canonical_lines``);
    they are the same for every tokenizer.
    """

    name: str
    stream: np.ndarray
    document_starts: np.ndarray
    num_tokens: int
    num_words: int
    num_lines: int
    num_bytes: int
    sha256: str
    target_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    ends_word: np.ndarray | None = None
    unknown: np.ndarray | None = None

    @cached_property
    def stream_sha256(self) -> str:
        """Hash of the ids: of ``stream`` as little-endian int64."""
        return hashlib.sha256(np.ascontiguousarray(self.stream, dtype="<i8").data).hexdigest()

    def unknown_words(self, num_targets: int) -> int:
        """Return how many of the first ``num_targets`` targets are ``<unk>`` in place of another word."""
        return 0 if self.unknown is None else int(np.count_nonzero(self.unknown[:num_targets]))

    def document_ids(self) -> np.ndarray:
        """Return the document number of each target, (num_tokens,) int64."""
        lengths = np.diff(self.document_starts, append=self.num_tokens)
        return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)

    def words_and_bytes(self, num_targets: int) -> tuple[int, int]:
        """Return how many words and bytes of text the first ``num_targets`` targets cover.

        Words are counted as at word level, with end-of-line marks (N_word of word perplexity). A word counts
        when its last piece is covered. Bytes are UTF-8. The bytes of a word include the whitespace in front
        of it; the bytes of an end-of-line mark also include the line break. All targets together have
        ``num_bytes``.

        Raises:
            ValueError: the number lies outside the split.
        """
        if not 0 <= num_targets <= self.num_tokens:
            raise ValueError(f"the {self.name} split has {self.num_tokens} targets; got {num_targets}")
        assert len(self.target_bytes) == self.num_tokens, "a split without its byte counts"
        ends = self.ends_word
        words = num_targets if ends is None else int(np.count_nonzero(ends[:num_targets]))
        return words, int(self.target_bytes[:num_targets].sum(dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Content:
    """A prepared text, as the cache keeps it.

    ``num_distinct_words`` is the size of the vocabulary at word level. ``merges_sha256`` is the hash of the
    merges that BPE found, "" at word level.
    """

    vocabulary: Vocabulary
    splits: Mapping[str, Split]
    num_distinct_words: int
    merges_sha256: str = ""


def tokenize(documents: Documents, spec: str, min_count: int = 1) -> Content:
    """Return the streams of ``documents`` and the vocabulary of their training split.

    ``min_count`` applies to the word level (``Vocabulary.from_counts``).

    Raises:
        Refused: as ``bpe_size`` does.
    """
    size = bpe_size(spec)
    table = _WordTable()
    words = {split: _split_words(split, *documents[split], table) for split in SPLITS}
    counts = np.bincount(words["train"].numbers, minlength=len(table)).tolist()
    vocabulary = Vocabulary.from_counts(dict(zip(table, counts, strict=True)), min_count)
    num_distinct_words = vocabulary.size
    if size is None:
        return Content(vocabulary, _by_words(words, table, vocabulary), num_distinct_words)
    bpe = _train(documents["train"][0], size)
    return Content(*_by_pieces(words, table, bpe), num_distinct_words, _merges_sha256(bpe))


def bpe_size(spec: str) -> int | None:
    """Return the vocabulary size that ``bpe:SIZE`` asks for, None for ``word``.

    Raises:
        Refused: another spec, an impossible size, or BPE without its package.
    """
    if spec == "word":
        return None
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise Refused(f"unknown tokenizer {brief(spec)}; allowed: word, or bpe:SIZE such as bpe:8000")
    size = int(match[1])
    if not MIN_PIECES <= size <= MAX_PIECES:
        raise Refused(
            f"tokenizer {brief(spec)}: the size must lie in {MIN_PIECES}..{MAX_PIECES} "
            f"(every byte, {EOS} and {UNK} are always in); such as bpe:8000"
        )
    tokenizer_version(spec)
    return size


def tokenizer_version(spec: str) -> str:
    """Return the version of the library that cuts words, "" at word level.

    Raises:
        Refused: the library is not installed.
    """
    if spec == "word":
        return ""
    try:
        import tokenizers
    except ImportError as error:
        raise Refused(
            f"tokenizer {brief(spec)} needs the package `tokenizers`; install it with pip install "
            "'gnnmoe[bpe]', or use the tokenizer 'word'"
        ) from error
    return tokenizers.__version__


# --- from text to words ------------------------------------------------------------------------------


def canonical_lines(text: str) -> list[str]:
    """Return the lines of ``text``, with each blank line as a single space.

    The published token files have this form; the hub stores blank lines as empty strings. Both have the same
    bytes in this form, so one hash identifies the text, whatever its source.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line if line.strip() else " " for line in lines]


def article_lines(lines: Sequence[str]) -> list[int]:
    """Return the indices of the lines at which WikiText articles begin; the first is 0.

    A title is `` = Title = `` between two blank lines. Without the blank lines, rows of sports tables such as
    `` = Wins ; L = `` would count too. Two ``=`` on each side mark a section.
    """
    titles = [
        index
        for index, line in enumerate(lines)
        if _TITLE.fullmatch(line)
        and (index == 0 or not lines[index - 1].strip())
        and (index + 1 == len(lines) or not lines[index + 1].strip())
    ]
    lead = lines[: titles[0]] if titles else lines
    if any(line.strip() for line in lead):
        return [0, *titles]
    return [0, *titles[1:]]  # blank lines in front belong to the first article


class _WordTable(defaultdict[str, int]):
    """The number of every distinct word, in the order of its first look-up; ``<eos>`` is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.default_factory = self.__len__
        self[EOS] = 0


@dataclass(frozen=True, eq=False)
class _Words:
    """One split at word level.

    Shapes: ``numbers`` (N,) int32, the number of each word and end-of-line mark in a ``_WordTable``;
    ``num_bytes`` (N,) int32, the bytes that each of them covers; ``document_starts`` (documents,) int64,
    indices into ``numbers``.
    """

    name: str
    numbers: np.ndarray
    num_bytes: np.ndarray
    document_starts: np.ndarray
    num_lines: int
    sha256: str


def _split_words(name: str, lines: Sequence[str], starts: Sequence[int], table: _WordTable) -> _Words:
    """Return the words of ``lines`` with ``<eos>`` after each line, also after a blank line.

    ``starts`` holds the indices of the lines at which documents begin, the first 0. New words are added to
    ``table``.
    """
    found = array("i")
    ends: list[int] = [0]
    odd: list[int] = []
    number_of, eos = table.__getitem__, table[EOS]
    for index, line in enumerate(lines):
        words = line.split()
        found.extend(map(number_of, words))
        found.append(eos)
        ends.append(len(found))
        if " ".join(["", *words, ""]) != line:
            odd.append(index)
    numbers, offsets = np.array(found, dtype=np.int32), np.array(ends, dtype=np.int64)
    lengths = np.fromiter((len(word.encode()) for word in table), dtype=np.int32, count=len(table))
    num_bytes = lengths[numbers] + np.int32(1)  # the space in front
    num_bytes[offsets[1:] - 1] = 2  # the space at the end and the line break
    for index in odd:  # other whitespace than one space in front of each word and one at the end
        num_bytes[ends[index] : ends[index + 1]] = _line_bytes(lines[index])
    text = "".join(f"{line}\n" for line in lines).encode()
    document_starts = offsets[np.asarray(starts, dtype=np.int64)]
    return _Words(name, numbers, num_bytes, document_starts, len(lines), hashlib.sha256(text).hexdigest())


def _line_bytes(line: str) -> list[int]:
    """Return the bytes of each word with the whitespace in front, then the bytes of the line's end."""
    ends = [0, *(match.end() for match in _WORD.finditer(line))]
    return [*(len(line[i:j].encode()) for i, j in pairwise(ends)), len(line[ends[-1] :].encode()) + 1]


# --- from words to streams ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pieces:
    """The pieces of each word of a ``_WordTable`` of W words.

    Shapes: word w becomes ``ids[starts[w] : starts[w + 1]]``, with ids (P,) int64 and starts (W + 1,) int64,
    at least one piece per word; ``num_bytes`` (P,) int32, the bytes of each piece; ``unknown`` (W,) bool,
    whether the word stands as ``<unk>``, or None if no word does. A word may have more or fewer bytes in the
    text than its pieces; the difference counts with its first piece.
    """

    ids: np.ndarray
    starts: np.ndarray
    num_bytes: np.ndarray
    unknown: np.ndarray | None = None


def _by_words(words: Mapping[str, _Words], table: _WordTable, vocabulary: Vocabulary) -> dict[str, Split]:
    none = np.zeros(len(table), dtype=np.int32)  # all bytes of a word go to its only piece
    ids = vocabulary.encode(list(table))
    unknown = ids == vocabulary.unk_id
    if UNK in table:
        unknown[table[UNK]] = False
    pieces = _Pieces(ids, np.arange(len(table) + 1), none, unknown)
    return {name: _build_split(found, pieces, vocabulary.eos_id) for name, found in words.items()}


def _by_pieces(
    words: Mapping[str, _Words], table: _WordTable, bpe: Any
) -> tuple[Vocabulary, dict[str, Split]]:
    ids = bpe.get_vocab()
    tokens = tuple(sorted(ids, key=ids.__getitem__))
    assert [ids[token] for token in tokens] == list(range(len(tokens))), "token ids have a gap"
    pieces = _cut(table, bpe, tokens)
    splits = {name: _build_split(found, pieces, ids[EOS]) for name, found in words.items()}
    counts = np.bincount(splits["train"].stream[1:], minlength=len(tokens)).astype(np.int64)
    return Vocabulary(tokens, counts), splits


def _build_split(words: _Words, pieces: _Pieces, eos_id: int) -> Split:
    """Return the split in which the pieces of each word replace the word; an unknown word has one piece."""
    lengths = np.diff(pieces.starts)[words.numbers]
    ends = np.cumsum(lengths)
    num_tokens = int(ends[-1])
    first = ends - lengths  # number of each word's first target
    position = np.arange(num_tokens) + np.repeat(pieces.starts[:-1][words.numbers] - first, lengths)
    of_word = np.diff(np.concatenate([[0], np.cumsum(pieces.num_bytes)])[pieces.starts])
    target_bytes = pieces.num_bytes[position]
    target_bytes[first] += (words.num_bytes - of_word[words.numbers]).astype(np.int32)
    ends_word = None
    if num_tokens > len(ends):
        ends_word = np.zeros(num_tokens, dtype=bool)
        ends_word[ends - 1] = True
    unknown = None if pieces.unknown is None else pieces.unknown[words.numbers]
    return Split(
        name=words.name,
        stream=np.concatenate([[eos_id], pieces.ids[position]]).astype(np.int64),
        document_starts=first[words.document_starts],
        num_tokens=num_tokens,
        num_words=len(ends) - words.num_lines,
        num_lines=words.num_lines,
        num_bytes=int(words.num_bytes.sum(dtype=np.int64)),
        sha256=words.sha256,
        target_bytes=target_bytes,
        ends_word=ends_word,
        unknown=unknown if unknown is not None and unknown.any() else None,
    )


# --- byte-level BPE ----------------------------------------------------------------------------------


def _train(lines: Iterable[str], size: int) -> Any:
    """Return a ``tokenizers.Tokenizer`` with ``size`` pieces, or fewer if no other pair occurs twice."""
    # If this is unset, the library warns at every later fork, such as a data loader's worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_text(lines), trainer)
    bpe.encode_special_tokens = True  # "(<unk>" within a word is text; ``_cut`` handles the word <unk>
    return bpe


def _training_text(lines: Iterable[str]) -> Iterator[str]:
    """Yield the words of each line; the search for merges sees a longer word than ``LONGEST_WORD`` in parts.

    The time of that search is quadratic in the length of a word.
    """
    for line in lines:
        text = " ".join(["", *(word for word in line.split() if word not in (EOS, UNK))])
        yield from _LONG_WORD.sub(r"\g<0>\n", text).split("\n")


def _cut(table: Iterable[str], bpe: Any, tokens: Sequence[str]) -> _Pieces:
    words = list(table)
    cut = [encoding.ids for encoding in bpe.encode_batch([f" {word}" for word in words])]
    for mark in (EOS, UNK):
        if mark in words:
            cut[words.index(mark)] = [bpe.token_to_id(mark)]
    starts = np.cumsum([0, *map(len, cut)], dtype=np.int64)
    ids = np.fromiter((piece for pieces in cut for piece in pieces), dtype=np.int64, count=starts[-1])
    # The byte-level alphabet has one character for each byte.
    lengths = np.array([0 if token in (EOS, UNK) else len(token) for token in tokens], dtype=np.int32)
    return _Pieces(ids, starts, lengths[ids])


def _merges_sha256(bpe: Any) -> str:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return hashlib.sha256(json.dumps(merges).encode()).hexdigest()
