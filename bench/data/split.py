"""One split of a corpus as a token stream: text in, ids and document boundaries out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from bench.data.vocabulary import EOS, Vocabulary

SPLITS = ("train", "validation", "test")
_TITLE = re.compile(r" = (?!=)(.*[^=]|[^=]) = ")


@dataclass(frozen=True, eq=False)
class Split:
    """A continuous stream of token ids.

    Shapes: ``stream`` (num_tokens + 1,) int64, one ``<eos>`` in front so that every token is
    predicted once (target t is ``stream[t + 1]``); ``document_starts`` (documents,) int64, the target
    index at which each document begins, the first 0. ``num_tokens`` counts words and end-of-line
    marks; ``num_bytes`` and ``sha256`` are those of the text in UTF-8 (see ``canonical_lines``).
    """

    name: str
    stream: np.ndarray
    document_starts: np.ndarray
    num_tokens: int
    num_words: int
    num_lines: int
    num_bytes: int
    sha256: str

    def document_ids(self) -> np.ndarray:
        """Return the document number of each target, (num_tokens,) int64."""
        lengths = np.diff(self.document_starts, append=self.num_tokens)
        return np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)


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


def line_words(lines: Sequence[str]) -> list[list[str]]:
    """Return the whitespace-separated words of each line, closed by ``<eos>``, blank lines too."""
    return [[*line.split(), EOS] for line in lines]


def build_split(
    name: str, lines: Sequence[str], starts: Sequence[int], vocabulary: Vocabulary, words: list[list[str]]
) -> Split:
    """Return the split of ``lines``, whose ``words`` come from ``line_words``.

    ``starts`` are the indices of the lines at which documents begin, the first 0.
    """
    offsets = np.cumsum([0] + [len(line) for line in words], dtype=np.int64)
    text = "".join(f"{line}\n" for line in lines).encode()
    num_tokens = int(offsets[-1])
    return Split(
        name=name,
        stream=vocabulary.encode([EOS, *chain.from_iterable(words)]),
        document_starts=offsets[np.asarray(starts, dtype=np.int64)],
        num_tokens=num_tokens,
        num_words=num_tokens - len(lines),
        num_lines=len(lines),
        num_bytes=len(text),
        sha256=hashlib.sha256(text).hexdigest(),
    )
