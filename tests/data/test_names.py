"""A data set has several names, and a name several configurations."""

from __future__ import annotations

import pytest

from bench.data import sources
from bench.data.corpus import load_corpus
from bench.data.sources import UnfitDataset, known_as
from bench.data.tokenizer import SPLITS


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ((None, None), ("wikitext", "wikitext-2-v1")),
        (("wikitext", None), ("wikitext", "wikitext-2-v1")),
        (("Salesforce/wikitext", None), ("wikitext", "wikitext-2-v1")),
        (("Salesforce/wikitext", "wikitext-103-raw-v1"), ("wikitext", "wikitext-103-raw-v1")),
        (("wikitext-2-v1", None), ("wikitext", "wikitext-2-v1")),
        (("wikitext-2-raw-v1", None), ("wikitext", "wikitext-2-raw-v1")),
        (("wikitext-103-v1", "wikitext-103-v1"), ("wikitext", "wikitext-103-v1")),
        (("wikitext-103-raw-v1", None), ("wikitext", "wikitext-103-raw-v1")),
        ((None, "wikitext-103-v1"), ("wikitext", "wikitext-103-v1")),
        (("some/set", None), ("some/set", "")),
        (("some/set", "plain"), ("some/set", "plain")),
    ],
)
def test_the_names_of_a_data_set(given, known):
    assert known_as(*given) == known


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("wikitext", "wikitext-2"), "unknown configuration of wikitext 'wikitext-2'.*mean 'wikitext-2-v1'"),
        (("wikitext-2-v1", "wikitext-103-v1"), "wikitext-2-v1 is a configuration .* give one of them"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(source="hub", dataset_name=given[0], dataset_config_name=given[1])


def test_another_set_is_asked_for_without_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sources, "read_cache", lambda *names: asked.append(names) or dict.fromkeys(SPLITS, " a \n")
    )
    corpus = load_corpus(source="hub", dataset_name="some/set")
    assert asked == [("some/set", "", "text")]
    assert (corpus.name, corpus.config_name) == ("some/set", "")
    again = load_corpus(source="hub", dataset_name="Salesforce/wikitext")
    assert asked[1] == ("Salesforce/wikitext", "wikitext-2-v1", "text")
    assert (again.name, again.config_name) == ("wikitext", "wikitext-2-v1")


def test_a_set_that_needs_a_configuration_names_those_there_are(monkeypatch):
    def fail(*_):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nMore"
        )

    monkeypatch.setattr(sources, "read_cache", fail)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    monkeypatch.setattr(sources, "read_hub", fail)
    with pytest.raises(
        ValueError, match=r"load some/set: .*configs: \['a', 'b'\]; name one by --dataset-config-n"
    ):
        load_corpus(source="hub", dataset_name="some/set")


def test_the_wrong_column_is_not_replaced_by_the_embedded_text(monkeypatch):
    """Data: ``auto`` falls back where there is no text, not where the text was asked for wrongly."""

    def unfit(*_):
        raise UnfitDataset("wikitext has no text column 'txt'; its text columns: 'text'")

    monkeypatch.setattr(sources, "read_cache", unfit)
    with pytest.raises(ValueError, match="no text column 'txt'; its text columns: 'text'"):
        load_corpus(source="auto", text_column="txt")
