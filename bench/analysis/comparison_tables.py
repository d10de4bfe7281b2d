"""The tables of a comparison: every configuration against the reference, and against every other."""

from __future__ import annotations

from bench.analysis import quantities
from bench.analysis.comparison import Comparison, ComparisonRow, Difference
from bench.analysis.numbers import (
    Interval,
    counted,
    mebibytes,
    millions,
    number,
    p_value,
    percent,
    perplexities,
    share,
    signed,
    span,
)  # fmt: skip
from bench.analysis.over_seeds import unknown_words
from bench.analysis.provenance import codes_of
from bench.analysis.quantities import exp_or_infinity
from bench.analysis.tables import Cells, Table, make_table
from bench.record import Record, is_measured
from bench.study.runs import Group, text_warnings

AWD_LSTM = ("AWD-LSTM, published (Merity et al. 2017), test split", 65.8)
FULL_TEST_TOKENS = 245_569
OLD_CODE = "†"
UNKNOWN = {"unknown words": "validation", "unknown words, test": "test"}
"""Column → the split of which it has the share of unknown words; shown where there are any."""
UNKNOWN_WORDS = "Unknown words: the share of the scored tokens that are <unk> in place of another word."
ARTICLES = (
    "articles_low_nats to articles_high_nats, in the csv, is the 95 % interval of a difference over the "
    "articles scored: the noise of the evaluation, without that of the seeds."
)


def comparison_table(comparison: Comparison, suffix: str = "") -> Table:
    """Return one row a configuration, the reference first, then the reference lines."""
    rows = [(_figures(row), _texts(row, comparison)) for row in comparison.rows]
    rows += [({"configuration": name, "perplexity": value, "status": "reference line"},
              {"configuration": name, "perplexity": number(value), "status": "reference line"})
             for name, value in reference_lines(comparison.group)]  # fmt: skip
    best = comparison.best()
    bold = [place for place, row in enumerate(comparison.rows) if row.configuration is best]
    notes = _notes(comparison)
    if any(figures.get("articles_low_nats") is not None for figures, _ in rows):
        notes.append(ARTICLES)
    caption = f"Couplers against {comparison.reference.label}: {comparison.group.basis.words()}"
    return make_table(f"comparison{suffix}", caption, rows, bold=frozenset(bold), notes=notes)


def pairs_table(comparison: Comparison, suffix: str = "") -> Table:
    """Return one row for every two configurations, judged as one family."""
    rows = [(_pair_figures(pair), _pair_texts(pair)) for pair in comparison.pairs]
    caption = f"Every two configurations: the first less the second; {counted(len(rows), 'pair')}"
    own = counted(comparison.comparisons, "pair")
    others = counted(len(rows) - comparison.comparisons, "pair")
    family = f"p after Holm: with {comparison.reference.label} over {own}, among the others over {others}."
    notes = [*text_warnings([comparison.group]), family]
    return make_table(f"pairs{suffix}", caption, rows, notes=notes)


def reference_lines(group: Group) -> list[tuple[str, float]]:
    """Return name and perplexity of simple models on the tokens that were scored, and of a published one."""
    names = {"unigram": "unigram", "trigram": "Kneser-Ney trigram"}
    lines = [(f"{names[name]}, validation split", value) for name, value in simple_models(group).items()]
    published = any(_scored_all_of_test(run.record) for run in group.runs if run.counts)
    return [*lines, AWD_LSTM] if published else lines


def simple_models(group: Group) -> dict[str, float]:
    """Return the perplexity of unigram and trigram on the tokens scored, where all runs agree in it.

    Runs that were scored on other tokens (--allow-unequal) have other ones, and none is all of theirs.
    """
    records = [run.record for run in group.runs if run.counts]
    found = {}
    lines = {"unigram": quantities.unigram_perplexity, "trigram": quantities.trigram_perplexity}
    for name, line in lines.items():
        values = [line(record) for record in records]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and max(known) <= min(known) * (1 + 1e-9):
            found[name] = known[0]
    return found


def _figures(row: ComparisonRow) -> Cells:
    against, cost, loss = row.against, row.cost, row.loss
    low, high = perplexities(loss.interval) or (None, None)
    paired = None if against is None else against.paired
    return {
        "configuration": row.configuration.label, "coupler": row.configuration.coupler, "n": loss.n,
        "perplexity": None if loss.mean is None else exp_or_infinity(loss.mean),
        "perplexity_low": low, "perplexity_high": high,
        "loss_nats": loss.mean, "loss_standard_deviation_nats": loss.standard_deviation,
        **_difference_figures(against),
        "bootstrap_low_nats": _end(against and against.bootstrap, 0),
        "bootstrap_high_nats": _end(against and against.bootstrap, 1),
        "articles_low_nats": _end(against and against.articles, 0),
        "articles_high_nats": _end(against and against.articles, 1),
        "perplexity_ratio": None if paired is None else exp_or_infinity(paired.mean),
        "test_perplexity": None if row.test_loss.mean is None else exp_or_infinity(row.test_loss.mean),
        "unknown_words_share": unknown_words(row.configuration),
        "test_unknown_words_share": unknown_words(row.configuration, "test"),
        "tokens_per_second": row.tokens_per_second.mean,
        "peak_memory_bytes": row.peak_memory_bytes.mean,
        "step_time_ratio_to_mean_coupler": cost and cost.step_time_ratio(),
        "memory_over_mean_coupler_bytes": cost and cost.memory_bytes,
        "flops_over_mean_coupler_per_token": cost and cost.flops_per_token,
        "parameters": row.parameters, "coupler_parameters": row.coupler_parameters,
        "training_flops_per_token": row.flops_per_token, "status": row.configuration.statuses(),
    }  # fmt: skip


def _texts(row: ComparisonRow, comparison: Comparison) -> Cells:
    against, cost, loss = row.against, row.cost, row.loss
    verdict = "reference" if row.configuration is comparison.reference else ""
    value = None if loss.mean is None else exp_or_infinity(loss.mean)
    ratio = "" if cost is None else percent(cost.step_time_ratio(), 0)
    extra = "" if cost is None else mebibytes(cost.memory_bytes, sign=True)
    test = {} if not any(other.test_loss.n for other in comparison.rows) else {
        "test perplexity": number(None if row.test_loss.mean is None else exp_or_infinity(row.test_loss.mean))
    }  # fmt: skip
    return {
        "configuration": row.configuration.label + code_mark(row, comparison), "n": str(loss.n),
        "perplexity": f"{number(value)} {span(perplexities(loss.interval))}".strip(), **test,
        **{title: share(unknown_words(row.configuration, split)) for title, split in UNKNOWN.items()
           if any_unknown(comparison, split)},
        "difference (nats)": "" if against is None else
        f"{signed(against.paired.mean)} {span(against.paired.interval, 4, sign=True)}".strip(),
        "p": p_value(against.p_adjusted) if against else "",
        "verdict": against.verdict.words() if against else verdict,
        "tokens/s": number(row.tokens_per_second.mean, 0),
        "peak memory": mebibytes(row.peak_memory_bytes.mean),
        "cost over mean": ", ".join(part for part in (ratio and f"{ratio} time", extra) if part),
        "parameters": number(row.parameters, 0),
        "FLOPs a token": millions(row.flops_per_token), "status": row.configuration.statuses(),
    }  # fmt: skip


def any_unknown(comparison: Comparison, split: str = "validation") -> bool:
    """Whether any of the scored tokens is ``<unk>`` in place of another word."""
    return any(unknown_words(row.configuration, split) for row in comparison.rows)


def _difference_figures(against: Difference | None) -> Cells:
    paired = None if against is None else against.paired
    return {
        "difference_nats": paired and paired.mean,
        "difference_low_nats": _end(paired and paired.interval, 0),
        "difference_high_nats": _end(paired and paired.interval, 1),
        "difference_low_90_nats": _end(paired and paired.interval_90, 0),
        "difference_high_90_nats": _end(paired and paired.interval_90, 1),
        "seeds_paired": paired and paired.n, "p": paired and paired.p,
        "p_holm": against and against.p_adjusted,
        "verdict": against and against.verdict.words(),
    }  # fmt: skip


def _pair_figures(pair: Difference) -> Cells:
    names = {"first": pair.candidate.label, "second": pair.reference.label}
    return {**names, **_difference_figures(pair)}


def _pair_texts(pair: Difference) -> Cells:
    paired = pair.paired
    return {
        "first": pair.candidate.label, "second": pair.reference.label, "seeds": str(paired.n),
        "difference (nats)": f"{signed(paired.mean)} {span(paired.interval, 4, sign=True)}".strip(),
        "perplexity": percent(exp_or_infinity(paired.mean)), "p": p_value(pair.p_adjusted),
        "first is": pair.verdict.words(),
    }  # fmt: skip


def _end(interval: Interval | None, place: int) -> float | None:
    return None if interval is None else interval[place]


def _notes(comparison: Comparison) -> list[str]:
    notes = [
        *text_warnings([comparison.group]),
        "Perplexity is exp of the mean loss over seeds, with its 95 % t interval; differences are paired by "
        "seed, p is of an exact sign-flip test after Holm over "
        f"{counted(comparison.comparisons, 'comparison')}. Costs are beside the same model with the mean "
        f"coupler, {_timed(comparison)}.",
    ]
    if any(any_unknown(comparison, split) for split in UNKNOWN.values()):
        notes.append(UNKNOWN_WORDS)
    return [*notes, *code_warnings(comparison)]


def code_warnings(comparison: Comparison) -> list[str]:
    """Return that the runs of a table are of several versions of the code, or may be."""
    codes = codes_of(comparison.group.runs)
    mixed = f"{OLD_CODE} some runs of this row are of another code than most: {codes.words()}."
    return [mixed] * codes.mixed + [f"{codes.silent()}."] * bool(codes.silent())


def code_mark(row: ComparisonRow, comparison: Comparison) -> str:
    """Return the mark of a row that another version of the code made than most of its table, else nothing."""
    codes = codes_of(comparison.group.runs).runs
    own = {id(run) for run in row.configuration.runs}
    others = [run for text in list(codes)[1:] for run in codes[text]]
    return f" {OLD_CODE}" if any(id(run) in own for run in others) else ""


def _timed(comparison: Comparison) -> str:
    """Return how the costs over the mean coupler were timed."""
    costs = [row.cost for row in comparison.rows if row.cost is not None]
    if not any(cost.in_turn for cost in costs):
        return "of separate runs"
    return "timed in turn in one process" + (
        "" if all(c.in_turn for c in costs) else " where each run did so"
    )


def _scored_all_of_test(record: Record) -> bool:
    test, data = record.split("test"), record.data
    if test is None or not is_measured(data):
        return False
    wikitext = (data.name, data.config_name, data.tokenizer) == ("wikitext", "wikitext-2-v1", "word")
    return wikitext and test.tokens == FULL_TEST_TOKENS
