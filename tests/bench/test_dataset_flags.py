"""``--dataset`` and ``--dataset-config-name``: what is asked for by name must be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.cli import parse
from bench.config import RunConfig
from bench.run.prepare import Identifier, prepare


def config(folder: Path | None, results: Path, *flags: str) -> RunConfig:
    place = [] if folder is None else ["--data-dir", str(folder)]
    return parse(RunConfig, [*place, "--results-dir", str(results), "--num-eval-samples", "4", *flags])


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset wikitext", "--dataset Salesforce/wikitext", "--dataset wikitext-2-v1",
        "--dataset_config_name wikitext-2-v1",
        "--dataset_name wikitext --dataset_config_name wikitext-2-v1",
    ],
)  # fmt: skip
def test_every_name_of_wikitext_2_takes_its_folder(wikitext_dir, tmp_path, flags):
    identify = Identifier()
    found = identify(config(wikitext_dir, tmp_path, *flags.split()))
    named, corpus = found.identity, found.corpus
    assert (corpus.name, corpus.config_name) == ("wikitext", "wikitext-2-v1")
    assert named == identify(config(wikitext_dir, tmp_path))[0]


@pytest.mark.parametrize(
    ("flags", "asked", "drop"),
    [
        ("--dataset Salesforce/wikitext", "wikitext wikitext-2-v1", "--dataset to"),
        ("--dataset-config-name wikitext-2-v1", "wikitext wikitext-2-v1", "--dataset-config-name to"),
        ("--dataset wikitext-103-v1", "wikitext wikitext-103-v1", "--dataset to"),
        ("--dataset my/own --dataset-config-name x", "my/own x", "--dataset and --dataset-config-name to"),
    ],
)
def test_another_text_is_refused_by_what_was_asked(small_data_dir, tmp_path, flags, asked, drop):
    message = rf"asked for {asked} by name, but the folder holds local text \(other\); drop {drop} use it"
    with pytest.raises(ValueError, match=message):
        prepare(config(small_data_dir, tmp_path, *flags.split()))


@pytest.mark.parametrize("flags", ["--dataset-config-name wikitext-2-v1", "--dataset some/set"])
def test_what_was_asked_for_by_name_is_not_replaced_by_the_embedded_text(tmp_path, monkeypatch, flags):
    def nothing_cached(*_):
        raise FileNotFoundError

    monkeypatch.setattr("bench.data.sources.hub_reachable", lambda *_: False)
    monkeypatch.setattr("bench.data.sources.read_cache", nothing_cached)
    with pytest.raises(
        ValueError, match="not in the local cache of `datasets`, and the hub cannot be reached"
    ):
        prepare(config(None, tmp_path, *flags.split()))
