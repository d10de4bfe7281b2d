"""The tables of a study: of a comparison, of all pairs, of all runs, of the runs that do not count.

Each table has figures in full, which become csv, and texts for people, which become Markdown and LaTeX.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from bench.files import visible
from bench.record import Environment, NotMeasured, Record, exp_or_infinity, is_measured, number
from bench.report.comparison import Comparison, ComparisonRow, Difference, simple_models
from bench.report.provenance import DIGITS, codes_of
from bench.report.quantities import (
    QUANTITIES,
    TEST_UNKNOWN_WORDS,
    UNKNOWN_WORDS,
    Interval,
    counted,
    mebibytes,
    p_value,
    percent,
    perplexities,
    signed,
    span,
    with_interval,
)
from bench.study.runs import Basis, Configuration, Group, Run, Study, doubled_words, text_warnings
from gnnmoe.discovery import short_name

Cells = dict[str, Any]
"""One row: column → value."""
TO_LATEX = {
    "−": "$-$",
    "·": "$\\cdot$",
    "×": "$\\times$",
    "±": "$\\pm$",
    "≤": "$\\leq$",
    "†": "\\dag{}",
    "–": "--",
    "…": "\\ldots{}",
    "→": "$\\rightarrow$",
}
KNOWN_LETTERS = frozenset(map(chr, range(0xC0, 0x100))) - frozenset("×÷ÐðÞþ")
"""Letters of Latin-1 that LaTeX reads in UTF-8 with its usual fonts."""
AWD_LSTM = ("AWD-LSTM (Merity et al. 2017), test split", "published", 65.8)
FULL_TEST_TOKENS = 245_569
PAPER = (
    "configuration", "first", "second", "n", "seed", "seeds", "perplexity", "difference", "p", "verdict",
    "first is", "cosine", "CKA", "effective rank",
    "experts that matter", "status", "tokens/s", "peak memory", "error",
)  # fmt: skip
"""The columns of a LaTeX table without --columns: the first six of these that the table has."""
NAMES = PAPER[:3]
"""The columns that say what a row is; they are in every LaTeX table."""
LONG = {"configuration": 0.25, "first": 0.22, "second": 0.22, "verdict": 0.17, "first is": 0.17, "error": 0.4}
"""Columns whose texts are wrapped, with their share of the width of a line."""
WRAPPED = r">{{\raggedright\arraybackslash}}p{{{}\linewidth}}"
OLD_CODE = "†"
UNKNOWN_NOTE = "Unknown words: the share of the scored tokens that are <unk>, which stands for another word."
ARTICLES_NOTE = (
    "In the csv, articles_low_nats and articles_high_nats are the ends of a 95% interval over the scored "
    "articles. It shows the noise of the evaluation, without the noise of the seeds."
)


@dataclass(frozen=True)
class Table:
    """One table: the figures, and the same rows as text."""

    name: str
    """Also the name of its files, without the ending."""
    caption: str
    figures: pd.DataFrame
    """Raw values, with units in the names of the columns."""
    shown: pd.DataFrame
    """Texts only, with as many rows as ``figures``."""
    bold: frozenset[int] = frozenset()
    """Rows that are best beyond the noise."""
    notes: list[str] = field(default_factory=list)

    def csv(self) -> str:
        """Return the figures as csv."""
        return self.figures.to_csv(index=False, lineterminator="\n")

    def files(self, columns: Sequence[str] = ()) -> dict[str, str]:
        """Return the contents of the Markdown, csv and LaTeX files, by file name."""
        contents = {"md": self.markdown(), "csv": self.csv(), "tex": self.latex(columns)}
        return {f"{self.name}.{ending}": text for ending, text in contents.items()}

    def markdown(self) -> str:
        """Return the table in Markdown, with caption and notes."""
        shown = self.shown.map(_escape_markdown)
        for row in self.bold:
            shown.iloc[row, 0] = f"**{shown.iloc[row, 0]}**"
        body = shown.to_markdown(index=False, disable_numparse=True)
        notes = "".join(f"\n{_escape_markdown(note)}\n" for note in self.notes)
        return f"**{_escape_markdown(self.caption)}**\n\n{body}\n{notes}"

    def latex(self, columns: Sequence[str] = ()) -> str:
        """Return the table in LaTeX, with those of ``columns`` that it has, else six that fit a paper."""
        known = list(self.shown.columns)
        own = [title for title in columns if title in known] or [name for name in PAPER if name in known][:6]
        own = list(dict.fromkeys([*(name for name in NAMES if name in known), *own]))
        style: Any = self.shown[own].map(_plain_letters).style.format(escape="latex")
        style = style.hide(axis="index").format_index(escape="latex", axis="columns")
        if self.bold and own:
            style = style.map(lambda _: "textbf:--rwrap;", subset=pd.IndexSlice[sorted(self.bold), own[:1]])
        widths = "".join(WRAPPED.format(LONG[title]) if title in LONG else "r" for title in own)
        comments = [
            self.caption,
            *self.notes,
            "Packages: \\usepackage{array,booktabs}",
            f"Columns that --columns can choose: {', '.join(known)}",
        ]
        text = "".join(f"% {_plain_letters(comment)}\n" for comment in comments)
        text += "\\begingroup\\footnotesize\\setlength{\\tabcolsep}{4pt}\n"
        text += style.to_latex(hrules=True, column_format=widths) + "\\endgroup\n"
        for letter, command in TO_LATEX.items():
            text = text.replace(letter, command)
        return text


def make_table(name: str, caption: str, rows: Sequence[tuple[Cells, Cells]], **more: Any) -> Table:
    """Return a table of rows, each with its figures and its texts."""
    figures = pd.DataFrame([figures for figures, _ in rows]).convert_dtypes()
    shown = pd.DataFrame([shown for _, shown in rows], dtype=object)
    return Table(name, caption, figures, shown.fillna("").astype(str), **more)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", " ".join(text.split()))


def _plain_letters(text: str) -> str:
    """Return ``text`` in one line, with "?" for letters that LaTeX may not know."""
    return "".join(
        letter if letter.isascii() or letter in TO_LATEX or letter in KNOWN_LETTERS else "?"
        for letter in " ".join(text.split())
    )


def comparison_table(comparison: Comparison, suffix: str = "") -> Table:
    """Return a row for each configuration, the baseline first, then other models on the same tokens."""
    rows = [(_figures(row), _texts(row, comparison)) for row in comparison.rows]
    for name, kind, value in other_models(comparison.group):
        line = {"configuration": name, "status": kind}
        shown = {"configuration": name, "perplexity": number(value), "verdict": kind}
        rows.append(({**line, "perplexity": value}, shown))
    best = comparison.best()
    bold = [place for place, row in enumerate(comparison.rows) if row.configuration is best]
    notes = _notes(comparison)
    if any(figures.get("articles_low_nats") is not None for figures, _ in rows):
        notes.append(ARTICLES_NOTE)
    caption = f"Couplers against {comparison.reference.label}: {comparison.group.basis.words()}"
    return make_table(f"comparison{suffix}", caption, rows, bold=frozenset(bold), notes=notes)


def _figures(row: ComparisonRow) -> Cells:
    against, cost, loss = row.against, row.cost, row.loss
    return {
        "configuration": row.configuration.label,
        "coupler": short_name(row.configuration.coupler),
        "n": loss.n,
        "perplexity": None if loss.mean is None else exp_or_infinity(loss.mean),
        **_ends("perplexity_{}", perplexities(loss.interval)),
        "loss_nats": loss.mean,
        "loss_standard_deviation_nats": loss.standard_deviation,
        **_difference_figures(against),
        **_ends("bootstrap_{}_nats", against and against.bootstrap),
        **_ends("articles_{}_nats", against and against.articles),
        "perplexity_ratio": against and exp_or_infinity(against.paired.mean),
        "test_perplexity": None if row.test_loss.mean is None else exp_or_infinity(row.test_loss.mean),
        **{found.name: row.means[found].mean for found in (UNKNOWN_WORDS, TEST_UNKNOWN_WORDS)},
        **{
            found.name: row.means[found].mean
            for found in QUANTITIES
            if found.comparison and not found.of_model
        },
        "step_time_ratio_to_mean_coupler": cost and cost.step_time_ratio(),
        "memory_over_mean_coupler_bytes": cost and cost.memory_bytes,
        "flops_over_mean_coupler_per_token": cost and cost.flops_per_token,
        **{found.name: row.model[found] for found in QUANTITIES if found.comparison and found.of_model},
        "status": row.configuration.statuses(),
    }


def _texts(row: ComparisonRow, comparison: Comparison) -> Cells:
    against, cost, loss = row.against, row.cost, row.loss
    shown = [found for found in QUANTITIES if found.comparison == "shown"]
    test = row.test_loss.mean
    ratio = "" if cost is None else percent(cost.step_time_ratio(), 0)
    extra = "" if cost is None else mebibytes(cost.memory_bytes, sign=True)
    return {
        "configuration": row.configuration.label + code_mark(row, comparison),
        "n": str(loss.n),
        "perplexity": with_interval(loss.mean, loss.interval),
        **(
            {"test perplexity": number(None if test is None else exp_or_infinity(test))}
            if any(other.test_loss.n for other in comparison.rows)
            else {}
        ),
        **{
            found.title: found.show(row.means[found].mean)
            for found in (UNKNOWN_WORDS, TEST_UNKNOWN_WORDS)
            if any(other.means[found].mean for other in comparison.rows)
        },
        "difference": ratio_words(against) if against else "",
        "p": p_value(against.p_adjusted) if against else "",
        "verdict": against.verdict.words()
        if against
        else "baseline"
        if row.configuration is comparison.reference
        else "",
        **{found.title: found.show(row.means[found].mean) for found in shown if not found.of_model},
        "cost relative to mean": ", ".join(part for part in (ratio and f"{ratio} time", extra) if part),
        **{found.title: found.show(row.model[found]) for found in shown if found.of_model},
        "status": row.configuration.statuses(),
    }


def ratio_words(difference: Difference) -> str:
    """Return a difference of perplexity in percent with its interval: +2.1% [+0.8, +3.5]."""
    ends = perplexities(difference.paired.interval)
    change = percent(exp_or_infinity(difference.paired.mean))
    about = ends and (100 * (ends[0] - 1), 100 * (ends[1] - 1))
    return f"{change} {span(about, 1, sign=True)}".strip()


def difference_words(difference: Difference) -> str:
    """Return a difference in nats with its interval."""
    paired = difference.paired
    return f"{signed(paired.mean)} {span(paired.interval, 4, sign=True)}".strip()


def _difference_figures(against: Difference | None) -> Cells:
    paired = against and against.paired
    return {
        "difference_nats": paired and paired.mean,
        **_ends("difference_{}_nats", paired and paired.interval),
        **_ends("difference_{}_90_nats", paired and paired.interval_90),
        "seeds_paired": paired and paired.n,
        "p": paired and paired.p,
        "p_holm": against and against.p_adjusted,
        "verdict": against and against.verdict.words(),
    }


def _ends(name: str, interval: Interval | None) -> Cells:
    low, high = interval or (None, None)
    return {name.format("low"): low, name.format("high"): high}


def any_unknown(comparison: Comparison) -> bool:
    """Return whether any scored token of validation is ``<unk>`` in place of a word."""
    return any(row.means[UNKNOWN_WORDS].mean for row in comparison.rows)


def _notes(comparison: Comparison) -> list[str]:
    notes = [
        *text_warnings([comparison.group]),
        "Perplexity is exp of the mean loss over seeds, with its 95% t interval. A difference is of "
        "perplexity, paired by seed.",
        "p is of an exact sign-flip test, with Holm's correction over "
        f"{counted(comparison.comparisons, 'comparison')}.",
        f"A cost is relative to the same model with the mean coupler, {_timed(comparison)}.",
    ]
    splits = (UNKNOWN_WORDS, TEST_UNKNOWN_WORDS)
    if any(row.means[found].mean for row in comparison.rows for found in splits):
        notes.append(UNKNOWN_NOTE)
    return [*notes, *code_warnings(comparison)]


def _timed(comparison: Comparison) -> str:
    """Return how the costs over the mean coupler were timed."""
    costs = [row.cost for row in comparison.rows if row.cost is not None]
    if not any(cost.in_turn for cost in costs):
        return "timed in separate runs"
    some = "" if all(cost.in_turn for cost in costs) else " where each run did so"
    return f"timed alternately in one process{some}"


def code_warnings(comparison: Comparison) -> list[str]:
    """Return a warning if several versions of the code made the runs of a table, or may have made them."""
    codes = codes_of(comparison.group.runs)
    mixed = f"{OLD_CODE} another version of the code made some runs of this row: {codes.words()}."
    return [mixed] * codes.mixed + [f"{codes.silent()}."] * bool(codes.silent())


def code_mark(row: ComparisonRow, comparison: Comparison) -> str:
    """Return the mark of a row with a run that another version of the code made than most runs."""
    codes = codes_of(comparison.group.runs).runs
    own = {id(run) for run in row.configuration.runs}
    others = [run for text in list(codes)[1:] for run in codes[text]]
    return f" {OLD_CODE}" if any(id(run) in own for run in others) else ""


def other_models(group: Group) -> list[tuple[str, str, float]]:
    """Return name, kind and perplexity of n-gram models on the scored tokens, and of a published model."""
    names = {"unigram": "unigram", "trigram": "Kneser-Ney trigram"}
    lines = [(names[name], "n-gram baseline", value) for name, value in simple_models(group).items()]
    published = any(_scored_all_of_test(run.record) for run in group.runs if run.counts)
    return [*lines, AWD_LSTM] if published else lines


def _scored_all_of_test(record: Record) -> bool:
    test, data = record.split("test"), record.data
    if test is None or not is_measured(data):
        return False
    wikitext = (data.name, data.config_name, data.tokenizer) == ("wikitext", "wikitext-2-v1", "word")
    return wikitext and test.tokens == FULL_TEST_TOKENS


def pairs_table(comparison: Comparison, suffix: str = "") -> Table:
    """Return a row for every two configurations."""
    rows = [(_pair_figures(pair), _pair_texts(pair)) for pair in comparison.pairs]
    caption = f"Every two configurations, the first minus the second: {counted(len(rows), 'pair')}"
    own = counted(comparison.comparisons, "pair")
    others = counted(len(rows) - comparison.comparisons, "pair")
    family = (
        f"Holm's correction has two families: {own} with {comparison.reference.label}, and {others} of the "
        "other configurations."
    )
    notes = [*text_warnings([comparison.group]), family]
    return make_table(f"pairs{suffix}", caption, rows, notes=notes)


def _pair_figures(pair: Difference) -> Cells:
    return {"first": pair.candidate.label, "second": pair.reference.label, **_difference_figures(pair)}


def _pair_texts(pair: Difference) -> Cells:
    return {
        "first": pair.candidate.label,
        "second": pair.reference.label,
        "seeds": str(pair.paired.n),
        "difference (nats)": difference_words(pair),
        "difference": ratio_words(pair),
        "p": p_value(pair.p_adjusted),
        "first is": pair.verdict.words(),
    }


def runs_table(groups: Sequence[Group]) -> Table:
    """Return a row for each run, also for failed runs."""
    figures = [
        run_figures(run, found, place)
        for place, group in enumerate(groups, 1)
        for found in group.configurations
        for run in found.runs
    ]
    shown = [
        found
        for found in QUANTITIES
        if found.runs == "shown"
        or (found.runs == "where measured" and any(cells[found.name] for cells in figures))
    ]
    rows = [
        (
            cells,
            {
                "run": cells["run_id"],
                **({"table": str(cells["table"])} if len(groups) > 1 else {}),
                "name": cells["run_name"] or "",
                "configuration": cells["configuration"],
                "seed": str(cells["seed"]),
                "status": cells["status"],
                **{found.title: found.show(cells[found.name]) for found in shown},
                "batch requested / found / used": _batch(cells),
                "seconds": number(cells["seconds"], 0),
                "code": cells["code"],
            },
        )
        for cells in figures
    ]
    return make_table("runs", "Runs", rows, notes=text_warnings(groups))


def run_columns(run: Run, configuration: str) -> Cells:
    """Return the columns that ``runs.csv`` and ``bench.load`` share: the config's fields, and quantities."""
    groups = run.record.config.model_dump().values()
    return {
        "run_id": run.record.run_id,
        "configuration": configuration,
        "status": run.status,
        "error": run.record.error,
        **{name: value for group in groups for name, value in group.items()},
        **{found.name: found.read(run.record) for found in QUANTITIES if found.runs},
    }


def run_figures(run: Run, configuration: Configuration, table: int) -> Cells:
    """Return the figures of one run; ``table`` is the number of the comparison that the run is in."""
    record, basis = run.record, Basis.of(run.record, allow_unequal=False)
    return {
        **run_columns(run, configuration.label),
        **_sizes(record),
        "steps": record.used.steps if is_measured(record.used) else None,
        "seconds": record.time.seconds.get("total"),
        "start": record.time.start,
        **_code(record.environment),
        "table": table,
        "corpus": basis.corpus_words(),
        "hardware": basis.device_words(),
        "scored": basis.scored_words(),
        "command": record.command,
    }


def _sizes(record: Record) -> Cells:
    """Return length and micro-batch size that a search found, and those that were used."""
    tuned = record.tuned if is_measured(record.tuned) else None
    used = record.used if is_measured(record.used) else None
    return {
        "tuned_status": tuned and tuned.status,
        "tuned_length": tuned and tuned.length,
        "tuned_micro_batch_size": tuned and tuned.micro_batch_size,
        "used_shapes": " ".join(used.micro_batch_shapes or used.batch_shapes) or None if used else None,
        "used_micro_batch_size": used and used.micro_batch_size,
        "used_accumulation": used and used.accumulation,
        "recoveries": None if used is None else len(used.recoveries),
    }


def _code(environment: Environment | NotMeasured) -> Cells:
    """Return the first digits of the hashes of the project's code and of the coupler's, if they are known."""
    if not is_measured(environment):
        return {"code": "", "coupler_code": ""}
    project = environment.project_sha256 or environment.code_sha256 or ""
    return {"code": project[:DIGITS], "coupler_code": (environment.coupler_sha256 or "")[:DIGITS]}


def _batch(cells: Cells) -> str:
    """Return the batch size that was asked for, the size that a search found, and the used shapes."""
    tuned = "failed" if cells["tuned_status"] == "failed" else cells["tuned_micro_batch_size"]
    used, pieces = cells["used_shapes"], cells["used_accumulation"] or 1
    if used and pieces > 1:
        used += f" in {pieces} pieces"
    parts = (cells["batch_size"], tuned, used)
    return " / ".join("–" if part is None else str(part) for part in parts)


def failures_table(study: Study) -> Table:
    """Return a row for each run that does not count, with the reason."""
    rows = []
    for group in study.groups:
        for found in group.configurations:
            others = dict(zip(found.doubled, doubled_words(found), strict=True))
            for run in found.runs:
                if others or not run.counts:
                    doubled = others.get(run.seed, "another seed of this row has several runs")
                    why = doubled if run.counts else run.record.error or ""
                    rows.append(_failure(found.label, run.seed, run.record.run_id, run.status, why))
    rows += [
        _failure("", None, visible(folder.name), kind, why)
        for kind, folders in (("unreadable", study.unreadable), ("not counted", study.misplaced))
        for folder, why in folders
    ]
    return make_table("failures", "Runs that do not count", rows, notes=text_warnings(study.groups))


def _failure(label: str, seed: int | None, run_id: str, status: str, error: str) -> tuple[Cells, Cells]:
    figures = {"configuration": label, "seed": seed, "run_id": run_id, "status": status, "error": error}
    first_line = error.partition("\n")[0][:200]
    return figures, {**figures, "seed": "" if seed is None else str(seed), "error": first_line}
