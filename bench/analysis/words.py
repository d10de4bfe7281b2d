"""What a comparison says, in sentences: which coupler is better, by how much, how sure, and at what cost."""

from __future__ import annotations

from bench.analysis.comparison import Comparison, ComparisonRow
from bench.analysis.marginal import CostOverMean
from bench.analysis.numbers import counted, mebibytes, p_value, percent, perplexities, signed, span
from bench.analysis.quantities import exp_or_infinity
from bench.study.hypotheses import seeds_needed


def verdict_sentences(comparison: Comparison) -> list[str]:
    """Return what is known of every configuration beside the reference, and what can be known at all."""
    sentences = [_sentence(row, comparison) for row in comparison.rows if row.against is not None]
    sentences = [*_about_best(comparison), *sentences]
    alone = [row.configuration for row in comparison.rows
             if row.against is None and row.configuration is not comparison.reference]  # fmt: skip
    doubled = [row.configuration for row in comparison.rows if row.configuration.doubled]
    for why, some in (
        ("since a seed of it has several runs", doubled),
        ("without a seed that counts in common", [one for one in alone if one not in doubled]),
    ):
        if some:
            sentences.append(f"Not compared, {why}: {', '.join(one.label for one in some)}.")
    few = _too_few(comparison)
    return [*sentences, few] if few else sentences


def _about_best(comparison: Comparison) -> list[str]:
    """Return whether one configuration beats all others, or why that cannot be told."""
    best = comparison.best()
    if best is not None:
        return [f"{best.label} is better than every other configuration beyond the noise."]
    seeds = [pair.paired.n for pair in comparison.pairs]
    if not seeds or len(comparison.rows) <= 2 or _too_few(comparison):
        return []
    among = len(comparison.pairs) - comparison.comparisons
    if max(seeds) < seeds_needed(among):
        return [f"With {counted(max(seeds), 'seed')} no single best can be named, only differences from "
                f"{comparison.reference.label}: {seeds_needed(among)} are needed for the "
                f"{counted(among, 'comparison')} among the others."]  # fmt: skip
    return ["No configuration is better than every other one beyond the noise."]


def _sentence(row: ComparisonRow, comparison: Comparison) -> str:
    against = row.against
    assert against is not None, "the caller's"
    paired, name = against.paired, comparison.reference.label
    ratio = percent(exp_or_infinity(paired.mean), 2)
    interval = perplexities(paired.interval)
    about = f", 95 % interval {percent(interval[0], 2)} to {percent(interval[1], 2)}" if interval else ""
    head = {
        "better": f"better than {name}", "worse": f"worse than {name}",
        "equivalent": f"equivalent to {name} (within ±0.01 nats)",
    }.get(against.verdict.kind, f"not told apart from {name}")  # fmt: skip
    if against.verdict.below_minimum:
        head += ", by less than the minimum effect of 0.01 nats"
    text = (f"{row.configuration.label}: {head}: perplexity {ratio}{about} ({signed(paired.mean)} nats; "
            f"{counted(paired.n, 'paired seed')}, p {p_value(against.p_adjusted)})")  # fmt: skip
    if against.verdict.kind == "not resolved":
        text += f"; {against.verdict.words()}"
    noise = against.articles
    if noise and against.verdict.kind in ("better", "worse") and noise[0] <= 0 <= noise[1]:
        text += f"; over other articles the difference might vanish {span(noise, 4, sign=True)}"
    return f"{text}.{_cost(row.cost)}"


def _cost(cost: CostOverMean | None) -> str:
    """Return what a configuration costs over the mean coupler."""
    if cost is None:
        return ""
    parts = []
    time, ends = cost.step_time_ratio(), cost.step_time_interval()
    if time is not None:
        about = f" ({percent(ends[0], 0)} to {percent(ends[1], 0)})" if ends else ""
        parts.append(f"{percent(time, 0)} time a step{about}")
    if cost.memory_bytes is not None:
        parts.append(f"{mebibytes(cost.memory_bytes, sign=True)} of memory")
    if cost.parameters is not None:
        parts.append(f"{signed(cost.parameters, 0)} parameters")
    if cost.flops_per_token is not None:
        parts.append(f"{signed(cost.flops_per_token / 1e6, 2)} MFLOPs a token")
    return f" Over {cost.over}: {', '.join(parts)}." if parts else ""


def _too_few(comparison: Comparison) -> str:
    """Return that there are too few seeds for any verdict, where there are."""
    count = comparison.comparisons
    seeds = [row.against.paired.n for row in comparison.rows if row.against is not None]
    if not seeds or max(seeds) >= seeds_needed(count):
        return ""
    have, need = counted(max(seeds), "seed"), seeds_needed(count)
    return (f"With {have} no difference can be told from noise here: {need} are needed for "
            f"{counted(count, 'comparison')} at p ≤ 0.05.")  # fmt: skip
