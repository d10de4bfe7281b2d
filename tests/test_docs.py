"""README and docs hold what they promise: short sentences, working links, files and TOML that load."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bench.study.hypotheses import read_hypotheses
from bench.sweep.specification import sweep_of

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
WRITTEN = re.compile(r"<!-- begin of .*?<!-- end of [^>]*>", re.DOTALL)  # by a command, from records
LONGEST = 35  # words of a sentence
UNCLEAR = (
    r"\b(nats|bits|tokens|time|FLOPs|rows|steps|one|run|worker|loss|batch) an? "
    r"(token|byte|step|second|GPU|core|expert|layer|seed|rank|subword)\b",
    r"of as many parameters", r"\bin turn\b", r"\bless the mean", r"to be had", r"must be had", r"told apart",
    r"without a word", r"costs other than", r"held against", r"\d %",
)  # fmt: skip
"""Phrases that a reader had to read twice."""


def prose(page: Path) -> str:
    """Return the text of a page without code, tables, headings, and what a command writes."""
    text = WRITTEN.sub("", page.read_text(encoding="utf-8"))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "![")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short_and_plain(page):
    text = prose(page)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*- |\d\. )", text):
        line = re.sub(r"`[^`]*`|\]\([^)]*\)|\([^()]*\)", "X", " ".join(paragraph.split()))
        for sentence in re.split(r"(?<=[.?!:])\**\s+(?=\S)", line):
            assert len(re.findall(r"[A-Za-z0-9'’]+[\w.,'’-]*", sentence)) <= LONGEST, sentence
    for phrase in UNCLEAR:
        assert not re.search(phrase, text), phrase


def test_the_readme_fits_a_screen():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 135
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert not target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"`((?:gnnmoe|bench|tests|sweeps|examples|notebooks|tools|docs)/[\w./-]+)`", page.read_text()
    )
    for name in named:
        assert (REPOSITORY / name).exists() or "yours" in name or "NAME" in name, name


def test_every_page_of_docs_begins_with_a_command():
    for page in PAGES[2:]:
        head = page.read_text(encoding="utf-8").split("\n", 1)[1].lstrip()
        assert head.startswith(("```sh\n", "```\n$ python ", "```python\n")), page.name


def test_the_examples_of_sweep_and_hypothesis_files_load():
    text = (REPOSITORY / "docs/sweeps.md").read_text(encoding="utf-8")
    seen = 0
    for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        entries = tomllib.loads(block)
        if "hypothesis" in entries:
            assert read_hypotheses(entries["hypothesis"])[0].by in (0.01, 0.1)
        elif "where" in entries:
            grid = {"coupler": ["GNN", "HGNN"], "num_experts": [2, 4],
                    "static_hyperedge_strategy": ["all_pairs", "all_triplets"]}  # fmt: skip
            assert len(sweep_of({**entries, "grid": grid}, "x").runs) == 5
        else:
            seen += len(sweep_of(entries, "x").runs)
    assert seen == 9 + 8 * 6 + 20
