"""A figure is given where it says what it seems to, and else the reason; and every number can be read."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench.record import Record, number, read_record, record_of
from bench.report import quantities
from bench.report.contents import make_plots, make_report, study_markdown
from bench.report.page import render_page
from bench.report.quantities import percent, signed, span
from bench.report.summary import print_summary
from bench.report.tables import UNKNOWN_NOTE
from bench.report.terminal import print_report, runs_listing
from bench.run.progress import Reporter, Workload
from bench.study.runs import load_study
from tests.report._made_studies import made_study
from tests.study.test_study import change, runs_of


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Record:
    study = made_study(tmp_path_factory.mktemp("made") / "one", {"mean": 0.0}, seeds=1, history=2)
    return read_record(runs_of(study, "mean")[0])


def scored(record: Record, **changes: Any) -> Record:
    """A sound record whose validation has other raw sums."""
    found = record.model_dump(mode="json")
    validation = found["quality"]["validation"]
    for name in ("loss_nats", "perplexity", "bits_per_byte"):
        del validation[name]
    validation |= changes
    return record_of(found)


def shown(record: Record) -> str:
    file = io.StringIO()
    print_summary(record, Path("folder"), Console(file=file, width=80))
    return " ".join(file.getvalue().split())


def test_bits_per_byte_are_the_nats_of_every_byte(record):
    found = scored(record, nll_sum=300.0, tokens=100, words=80, bytes=150)
    assert quantities.bits_per_byte(found) == pytest.approx(2 / math.log(2), rel=1e-12)
    assert quantities.why_no_bits_per_byte(found) is None
    assert quantities.word_perplexity(found) == pytest.approx(math.exp(3.75), rel=1e-12)
    large = scored(record, nll_sum=4046e3, tokens=1000, words=1000, bytes=5000)  # a perplexity beyond a float
    assert quantities.perplexity(large) == math.inf
    assert quantities.bits_per_byte(large) == pytest.approx(4046 / 5 / math.log(2), rel=1e-12)
    assert "perplexity inf per token (n-gram baselines: " in shown(large)
    assert f", {4046 / 5 / math.log(2):,.3f} bits per byte;" in shown(large)


def test_no_bits_per_byte_over_unknown_words_and_their_share_beside_the_perplexity(record):
    found = scored(record, tokens=600, words=600, bytes=3000, unknown_words=107)
    assert quantities.bits_per_byte(found) is None
    assert quantities.unknown_words_share(found) == 107 / 600
    assert quantities.perplexity(found) is not None
    assert "no bits per byte (unknown words were not predicted)" in shown(found)
    assert "; 107 of the tokens (17.8%) are unknown words (<unk>)" in shown(found)
    assert "unknown" not in shown(scored(record, words=600, bytes=3000))


def test_what_no_word_and_no_byte_was_scored_of_is_not_measured(record):
    found = scored(record, tokens=600, words=0, bytes=0)
    assert quantities.word_perplexity(found) is None
    assert quantities.bits_per_byte(found) is None
    assert ", none per word (no whole word was scored)" in shown(found)
    assert "no bits per byte (the scored tokens cover no byte of the text)" in shown(found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"words": -1}, "words is -1; it must be a whole number, 0 or more"),
        ({"bytes": 1.5}, "bytes is 1.5"),
        ({"unknown_words": None}, "unknown_words is None"),
        ({"unknown_words": True}, "unknown_words is True"),
    ],
)
def test_counts_of_a_record_are_whole_numbers(record, changes, says):
    with pytest.raises(ValueError, match=f"quality.validation.{says}"):
        scored(record, **changes)


def test_a_record_says_how_many_words_were_unknown(record):
    found = record.model_dump(mode="json")
    del found["quality"]["validation"]["unknown_words"]
    with pytest.raises(ValueError, match=r"it lacks quality\.validation\.unknown_words"):
        record_of(found)


def test_a_record_says_its_figures_and_they_are_those_of_its_sums(record):
    found = record.model_dump(mode="json")
    validation, speed = found["quality"]["validation"], found["speed"]
    assert validation["loss_nats"] == validation["nll_sum"] / validation["tokens"]
    assert validation["perplexity"] == math.exp(validation["loss_nats"])
    assert validation["bits_per_byte"] == quantities.bits_per_byte(record)
    assert speed["tokens_per_second"] == sum(speed["step_tokens"]) / sum(speed["step_seconds"])
    assert record_of(found) == record
    validation["perplexity"] *= 1.001
    with pytest.raises(ValueError, match=r"quality\.validation\.perplexity is .*, by the numbers beside it"):
        record_of(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (1234.56, "1,234.6"), (999_999_999.0, "999,999,999.0"), (1e9, "1.0e+09"),
        (4.7e57, "4.7e+57"), (np.float32(1e20), "1.0e+20"), (-3e12, "−3.0e+12"), (math.inf, "inf"),
        (-math.inf, "−inf"), (math.nan, "nan"), (123_456_789_012, "123,456,789,012.0"),
    ],
)  # fmt: skip
def test_a_number_can_be_read(value, text):
    assert number(value) == text


def test_other_forms_of_a_number_can_be_read_too():
    assert number(123_456_789_012, 0) == "123,456,789,012"  # a count
    assert signed(2e10) == "+2.0e+10"
    assert percent(math.inf) == "+inf%"
    assert percent(1e53) == "+1.0e+55%"
    assert span((1.0, 1e30)) == "[1.0, 1.0e+30]"


def test_a_perplexity_beyond_a_float_is_infinite_while_training_too():
    file = io.StringIO()
    reporter = Reporter(Console(file=file, width=200))
    reporter.training_begins(Workload(steps=4, eval_every=1))
    for step, nats in ((1, 4046.0), (2, 705.0), (3, 30.0), (4, 5.0)):
        reporter.evaluated({"step": step, "nll_sum": 10 * nats, "tokens": 10})
    found = [line.partition("perplexity ")[2].partition(", ")[0] for line in file.getvalue().splitlines()]
    assert found == ["inf", "1.5e+306", "1.1e+13", "148.4"]


def all_texts(study: Path) -> dict[str, str]:
    """Every place in which a report shows its perplexities."""
    report = make_report(load_study(study))
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    listing = Console(file=io.StringIO(), width=80)
    listing.print(runs_listing(study))
    (section,) = report.sections
    return {
        "terminal": console.file.getvalue(), "listing": listing.file.getvalue(),  # pyright: ignore
        "comparison": section.comparison_table.markdown(), "runs": report.runs_table.markdown(),
        "page": render_page(report, {}), "Markdown page": study_markdown(report),
        "plots": " ".join(t.get_text() for p in make_plots(report) for t in p.figure.texts),
    }  # fmt: skip


def test_the_share_of_unknown_words_stands_beside_every_perplexity_of_a_report(tmp_path):
    study = made_study(tmp_path / "made", {"mean": 0.0, "gate": 0.02}, seeds=2, history=2, test=True)
    for place, text in all_texts(study).items():
        assert "unknown words" not in text, place
    for run in (*runs_of(study, "mean"), *runs_of(study, "gate")):
        change(run, quality__validation__unknown_words=60, quality__test__unknown_words=150)
    for place, text in all_texts(study).items():
        assert "10.0%" in text, place
    report = make_report(load_study(study))
    table = report.sections[0].comparison_table
    assert UNKNOWN_NOTE in table.notes
    assert table.figures["unknown_words_share"].dropna().unique().tolist() == [0.1]
    assert table.figures["test_unknown_words_share"].dropna().unique().tolist() == [0.25]
    assert report.runs_table.figures["unknown_words_share"].unique().tolist() == [0.1]
    assert report.runs_table.figures["bits_per_byte"].dropna().empty


def test_runs_with_other_unknown_words_share_no_table(tmp_path):
    study = made_study(tmp_path / "made", {"mean": 0.0, "gate": 0.02}, seeds=1, history=2)
    change(runs_of(study, "gate")[0], quality__validation__unknown_words=60)
    assert len(load_study(study).groups) == 2
