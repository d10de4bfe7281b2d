"""One split of a corpus as a token stream: text in, ids, byte counts and document boundaries out."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np

from bench.data.vocabulary import EOS

SPLITS = ("train", "validation", "test")
_TITLE = re.compile(r" = (?!=)(.*[^=]|[^=]) = ")
_WORD = re.compile(r"\S+")  # the same whitespace as str.split()


@dataclass(frozen=True, eq=False)
class Split:
    """A continuous stream of token ids.

    Shapes: ``stream`` (num_tokens + 1,) int64, one ``<eos>`` in front so that every token is
    predicted once (target t is ``stream[t + 1]``); ``document_starts`` (documents,) int64, the target
    index at which each document begins, the first 0; ``target_bytes`` (num_tokens,) int32, bytes of
    the text that each target covers; ``ends_word`` (num_tokens,) bool, the targets that complete a
    word or are an end-of-line mark, or None where every target is one of these (word level);
    ``unknown`` (num_tokens,) bool, the targets that are ``<unk>`` in place of another word, or None
    where there is none. A ``<unk>`` that stands in the text itself is no unknown word.

    ``num_tokens`` counts targets, ``num_words`` whitespace-separated words without the end-of-line
    marks, ``num_lines`` those marks; ``num_bytes`` and ``sha256`` are those of the text in UTF-8 (see
    ``canonical_lines``) and the same for every tokenizer.
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
        """Hash of the ids in use: of ``stream`` as little-endian int64."""
        return hashlib.sha256(np.ascontiguousarray(self.stream, dtype="<i8").data).hexdigest()

    def unknown_words(self, num_targets: int) -> int:
        """Return how many of the first ``num_targets`` targets are ``<unk>`` in place of another word."""
        return 0 if self.unknown is None else int(np.count_nonzero(self.unknown[:num_targets]))

    def document_ids(self) -> np.ndarray:
        """Return the document number of each target, (num_tokens,) int64."""
        lengths = np.diff(self.document_starts, append=self.num_tokens)
        return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)

    def words_and_bytes(self, num_targets: int) -> tuple[int, int]:
        """Return the words and the bytes of text that the first ``num_targets`` targets cover.

        Words are those of the word level, end-of-line marks included (N_word of word perplexity); a
        word counts once its last piece is covered. Bytes are UTF-8: a word's include the whitespace
        in front of it, an end-of-line mark's the whitespace in front of it and the line break, so all
        targets together have ``num_bytes``. Raises ValueError for a number outside the split.
        """
        if not 0 <= num_targets <= self.num_tokens:
            raise ValueError(f"the {self.name} split has {self.num_tokens} targets; got {num_targets}")
        assert len(self.target_bytes) == self.num_tokens, "a split without its byte counts"
        ends = self.ends_word
        words = num_targets if ends is None else int(np.count_nonzero(ends[:num_targets]))
        return words, int(self.target_bytes[:num_targets].sum(dtype=np.int64))


class WordTable(defaultdict[str, int]):
    """Number every distinct word in the order of its first look-up; ``<eos>`` is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.default_factory = self.__len__
        self[EOS] = 0

    def byte_lengths(self) -> np.ndarray:
        """Return the UTF-8 bytes of each word, (words,) int32."""
        return np.fromiter((len(word.encode()) for word in self), dtype=np.int32, count=len(self))


@dataclass(frozen=True, eq=False)
class Words:
    """One split at word level.

    Shapes: ``numbers`` (N,) int32, each word and end-of-line mark by its number in a ``WordTable``;
    ``num_bytes`` (N,) int32, bytes that each covers; ``document_starts`` (documents,) int64, indices
    into ``numbers``.
    """

    name: str
    numbers: np.ndarray
    num_bytes: np.ndarray
    document_starts: np.ndarray
    num_lines: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Pieces:
    """How a tokenizer cuts each word of a ``WordTable`` of W words.

    Shapes: word w becomes ``ids[starts[w] : starts[w + 1]]``, ids (P,) int64 and starts (W + 1,)
    int64, one piece at least each; ``num_bytes`` (P,) int32, bytes of each piece; ``unknown`` (W,) bool,
    the words that stand as ``<unk>``, or None where there is none. What a word's bytes in the text have
    more or less than its pieces' is counted with its first piece.
    """

    ids: np.ndarray
    starts: np.ndarray
    num_bytes: np.ndarray
    unknown: np.ndarray | None = None


def canonical_lines(text: str) -> list[str]:
    """Return the lines of ``text``, each blank one as a single space.

    The published token files already look like this; the hub stores blank lines as empty strings.
    In this form both have the same bytes, so one hash identifies the text whatever it came from.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return [line if line.strip() else " " for line in lines]


def article_lines(lines: Sequence[str]) -> list[int]:
    """Return the indices of the lines at which WikiText articles begin; the first is 0.

    A title is `` = Title = `` between two blank lines (without the blank lines, rows of sports
    tables such as `` = Wins ; L = `` would count); one ``=`` on each side, since two are a section.
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


def split_words(name: str, lines: Sequence[str], starts: Sequence[int], table: WordTable) -> Words:
    """Return the whitespace-separated words of ``lines``, ``<eos>`` after each, blank lines too.

    ``starts`` are the indices of the lines at which documents begin, the first 0; new words are
    added to ``table``.
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
    num_bytes = table.byte_lengths()[numbers] + np.int32(1)  # the space in front
    num_bytes[offsets[1:] - 1] = 2  # the space at the end and the line break
    for index in odd:  # other whitespace than one space in front of each word and one at the end
        num_bytes[ends[index] : ends[index + 1]] = _line_bytes(lines[index])
    text = "".join(f"{line}\n" for line in lines).encode()
    document_starts = offsets[np.asarray(starts, dtype=np.int64)]
    return Words(name, numbers, num_bytes, document_starts, len(lines), hashlib.sha256(text).hexdigest())


def _line_bytes(line: str) -> list[int]:
    """Return the bytes of each word with the whitespace in front, then those of the line's end."""
    ends = [0, *(match.end() for match in _WORD.finditer(line))]
    return [*(len(line[i:j].encode()) for i, j in pairwise(ends)), len(line[ends[-1] :].encode()) + 1]


def build_split(words: Words, pieces: Pieces, eos_id: int) -> Split:
    """Return the split in which each word stands as its pieces; an unknown word has one."""
    lengths = np.diff(pieces.starts)[words.numbers]
    ends = np.cumsum(lengths)
    num_tokens = int(ends[-1])
    first = ends - lengths  # index of each word's first target
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
