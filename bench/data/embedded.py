"""A small English corpus that every CPython carries: the help texts in ``pydoc_data.topics``.

It serves where neither a folder nor the hub is at hand, so that the tool runs anywhere. It is not
WikiText-2, and its text differs between Python versions.
"""

from __future__ import annotations

import re

from bench.data.split import SPLITS
from gnnmoe.config import Refused

MIN_COUNT = 2  # words seen once in training become <unk>
_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
# Words, numbers and the marks of prose; no operators, brackets or quotes.
_TOKEN = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?|[0-9]+(?:[.][0-9]+)*|[.,;:!?]")


def embedded_texts() -> dict[str, tuple[list[str], list[int]]]:
    """Return for each split its lines (one a paragraph) and the line at which each topic begins.

    A paragraph that several topics share is kept once; no topic is in two splits.
    """
    texts: dict[str, tuple[list[str], list[int]]] = {split: ([], []) for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for paragraphs in _topics():
        tokens = sum(len(paragraph.split()) + 1 for paragraph in paragraphs)
        total = sum(sizes.values()) + tokens
        split = max(SPLITS, key=lambda name: _SHARES[name] * total - sizes[name])  # furthest below its share
        lines, starts = texts[split]
        starts.append(len(lines))
        lines.extend(f" {paragraph} " for paragraph in paragraphs)
        sizes[split] += tokens
    return texts


def _topics() -> list[list[str]]:
    """Return the tokenised paragraphs of each topic, topics in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Refused(
            "this Python lacks pydoc_data.topics, the text of the embedded corpus; install Python's standard "
            "library in full, or pass --data-dir DIR (or set GNNMOE_DATA_DIR) with WikiText-2"
        ) from error
    seen: set[str] = set()
    found: list[list[str]] = []
    for name in sorted(topics):
        paragraphs = dict.fromkeys(map(_paragraph, re.split(r"\n\s*\n", topics[name])))
        fresh = [paragraph for paragraph in paragraphs if paragraph and paragraph not in seen]
        seen.update(fresh)
        if fresh:
            found.append(fresh)
    return found


def _paragraph(text: str) -> str:
    """Return the tokens of a paragraph between spaces, without lines that only draw (``*****``)."""
    drawn = (line for line in text.split("\n") if re.search(r"[A-Za-z]", line))
    return " ".join(_TOKEN.findall(" ".join(drawn)))
