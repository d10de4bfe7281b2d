"""The table at the end of a run: its quality, its cost, and whether it counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.files import visible
from bench.measure.rates import difference_of_medians, paired_ratios
from bench.record import (
    Communication,
    Data,
    LeakCheck,
    NotMeasured,
    Record,
    Search,
    Time,
    Used,
    is_measured,
    record_of,
)
from bench.report import quantities
from bench.report.quantities import in_parts, mebibytes, number, percent, share, signed
from bench.study.labels import name_parts


def print_summary(record: Record, folder: Path, console: Console) -> None:
    """Print the record as a table of at most 80 columns, and its folder."""
    record = record_of(record.model_dump())  # as it may be shown
    table = Table(
        title=_title(record),
        title_justify="left",
        show_header=False,
        box=None,
        width=80,
        padding=(0, 1, 0, 0),
    )
    table.add_column(style="bold", no_wrap=True, width=12)
    table.add_column(overflow="fold")
    for label, text in _rows(record):
        table.add_row(label, Text(text))
    console.print()
    console.print(table)
    console.print(f"record: {visible(str(folder))}", markup=False, highlight=False, soft_wrap=True)


def _title(record: Record) -> Text:
    model = record.config.model
    name = record.run_name or record.run_id
    parts = [*name_parts(record.config), f"E {model['num_experts']}", f"seed {record.seed}", name]
    return Text(" · ".join(parts))


def _rows(record: Record) -> list[tuple[str, str]]:
    rows = [("status", record.status + (f": {record.error}" if record.error else ""))]
    rows.append(("data", _data(record.data)))
    rows += [(split, _quality(record, split)) for split in ("validation", "test")]
    rows.append(("batch", _batch(record)))
    rows += [
        ("speed", _speed(record)),
        ("coupler", _marginal(record)),
        ("memory", _memory(record)),
        ("parameters", _parameters(record)),
    ]
    rows += _communication(record.communication)
    rows.append(("counted", _counted(record.used)))
    if is_measured(record.check):
        rows.append(("leak check", _check(record.check)))
    rows.append(("time", _time(record.time)))
    return [(label, text) for label, text in rows if text]


def _quality(record: Record, split: str) -> str:
    value, bits = quantities.perplexity(record, split), quantities.bits_per_byte(record, split)
    scored = record.split(split)
    if scored is None:
        return ""
    lines = {
        "unigram": quantities.unigram_perplexity(record, split),
        "trigram": quantities.trigram_perplexity(record, split),
    }
    simple = ", ".join(f"{name} {number(line)}" for name, line in lines.items() if line is not None)
    text = f"perplexity {number(value)} ({simple})"
    if scored.words != scored.tokens:
        by_word = quantities.word_perplexity(record, split)
        text += (
            f" per token, {number(by_word)} per word"
            if by_word is not None
            else (" per token, none per word (no whole word was scored)")
        )
    text += (
        f", {number(bits, 3)} bits per byte"
        if bits is not None
        else (f", no bits per byte ({quantities.why_no_bits_per_byte(record, split)})")
    )
    text += f", on {scored.tokens:,} tokens, length {scored.length}, stride {scored.stride}"
    if scored.unknown_words:
        unknown = share(quantities.unknown_words_share(record, split))
        text += f"; {scored.unknown_words:,} of the tokens ({unknown}) are unknown words (<unk>)"
    return text


def _batch(record: Record) -> str:
    """Return the sizes that were asked for, found by a search, and used, each in a line."""
    asked, tuned, used = record.requested, record.tuned, record.used
    lines = []
    if is_measured(asked):
        lines.append(f"asked  {asked.batch_size} × {asked.max_seq_length}")
        if asked.micro_batch_size is not None:
            lines[0] += f" in micro-batches of {asked.micro_batch_size}"
    if is_measured(tuned):
        lines.append("tuned  " + _tuned(tuned))
    if is_measured(used) and used.micro_batch_shapes:
        lines.append("used   " + _used(used))
    return "\n".join(lines)


def _tuned(tuned: Search) -> str:
    if tuned.status == "failed":
        return f"FAILED: {tuned.error}"
    tried = len(tuned.trials)
    source = "kept from an earlier search" if tuned.from_cache else f"{tried} size{'s' * (tried != 1)} tried"
    return (
        f"length {tuned.length}, micro-batch {tuned.micro_batch_size} of at most {tuned.cap}, "
        f"{source}, within {(tuned.limit_bytes or 0) / 2**20:,.1f} MiB "
        f"({tuned.target or 0:.0%} of the budget)"
    )


def _used(used: Used) -> str:
    pieces = ", ".join(
        f"{count:,} × ({shape.replace('x', ' × ')})" for shape, count in used.micro_batch_shapes.items()
    )
    if len(used.micro_batch_shapes) == used.accumulation == 1 and not used.recoveries:
        return f"{pieces}, each an update" + _on_ranks(used)
    sizes = " and ".join(map(str, used.batch_sizes))
    text = f"{sizes} an update, run as {pieces}; at the end {used.micro_batch_size} at once"
    if (used.accumulation or 1) > 1:
        text += f", {used.accumulation} micro-batches an update"
    text += _on_ranks(used)
    if used.recoveries:
        times = len(used.recoveries)
        often = "once" if times == 1 else f"{times} times"
        text += f"; out of memory {often}, the same batch again in smaller pieces"
    if used.control:
        changes = len(used.control)
        text += f"; {changes} change{'s' * (changes > 1)} by the memory controller"
    return text


def _on_ranks(used: Used) -> str:
    ranks = used.world_size
    return f", on each of {ranks} ranks" if ranks > 1 else ""


def _counted(used: Used | NotMeasured) -> str:
    """Return what was asked for and what was counted from the tensors, in a line each."""
    if not is_measured(used):
        return ""
    counts = {f"training {name}": found for name, found in used.ledger.training.items()}
    counts |= {f"scored, {name}": found for name, found in used.ledger.evaluations.items()}
    rows = [(name, found.asked, found.got) for name, found in counts.items()]
    lines = [f"{'':34}{'asked':>10}  {'got':>10}"]
    lines += [
        f"{name:34}{asked:>10,}  {got:>10,}  {'✓' if asked == got else '✗'}" for name, asked, got in rows
    ]
    return "\n".join(lines)


def _data(data: Data | NotMeasured) -> str:
    if not is_measured(data):
        return ""
    if data.embedded:
        return f"NOT WIKITEXT-2 but the embedded text ({data.name}, {data.config_name})"
    name = " ".join(part for part in (data.name, data.config_name) if part)
    return f"{name} from {data.source} ({data.verdict})"


def _speed(record: Record) -> str:
    speed = record.speed
    if not is_measured(speed):
        return ""
    rate, median = speed.tokens_per_second, speed.median_step_seconds
    ends = ", ".join(f"p{q} {1e3 * np.percentile(speed.step_seconds, q):,.0f}" for q in (10, 90, 99))
    steps = f"{len(speed.step_seconds)} steps" + ("" if speed.steady else ", not steady")
    parts = [f"{rate:,.0f} tokens/s, median step {median * 1e3:,.0f} ms ({ends}; {steps})"]
    utilisation, waiting = quantities.utilisation(record), quantities.data_share(record)
    if utilisation is not None and is_measured(speed.matrix_flops_per_second):
        above = " (over 100 %: the matrix products timed are not the fastest ones here)"
        measured = f"{speed.matrix_flops_per_second / 1e12:,.0f} TFLOP/s{above if utilisation > 1 else ''}"
        parts.append(f"MFU {share(utilisation)} of {measured}")
    if waiting is not None:
        parts.append(f"fetching a batch {share(waiting)} of a step")
    if is_measured(speed.compile_seconds):
        parts.append(f"compiled in {speed.compile_seconds:,.1f} s")
    return ", ".join(parts)


def _marginal(record: Record) -> str:
    """Return the cost of the coupler alone, timed in turn with the mean coupler."""
    found = quantities.marginal(record)
    if found is None:
        return ""
    ours, theirs = found.step_seconds, found.reference_step_seconds
    ratios = paired_ratios(ours, theirs)
    low, median, high = map(percent, np.percentile(ratios, [10, 50, 90]))
    memory = found.peak_allocated_bytes
    parts = [
        f"{median} of a step (p10 {low}, p90 {high})",
        f"{signed(1e3 * difference_of_medians(ours, theirs), 1)} ms",
        *([mebibytes(memory, sign=True)] if is_measured(memory) else []),
        f"{signed(found.training_flops_per_token / 1e6, 2)} MFLOPs per token",
    ]
    steady = "" if found.steady else ", not steady"
    return f"{', '.join(parts)} over {found.reference} ({len(ours)} rounds in turn{steady})"


def _memory(record: Record) -> str:
    memory = record.memory
    if not is_measured(memory):
        return ""
    peak, reserved = memory.peak_allocated_bytes, memory.peak_reserved_bytes
    if is_measured(peak):
        text = f"peak {mebibytes(peak)} in a training step ({memory.meter.replace('_', ' ')})"
    elif is_measured(reserved):
        return f"peak {mebibytes(reserved)} reserved in a training step"
    else:
        return ""
    if is_measured(memory.by_part):
        parts = (f"{name} {size / 2**20:,.1f}" for name, size in memory.by_part.items())
        text = f"{text}: {', '.join(parts)}"
    return f"{text}; {memory.remark}" if memory.remark else text


def _parameters(record: Record) -> str:
    counts = record.parameters
    if not is_measured(counts):
        return ""
    return (
        f"{counts.total:,} = experts {counts.expert:,} + couplers {counts.coupler:,}"
        f" + embeddings and norms {counts.other:,}"
    )


def _communication(communication: Communication | NotMeasured) -> list[tuple[str, str]]:
    if not is_measured(communication):
        return []
    rows = []
    for layer, parts in communication.items():
        lines = [_values(name, value) for name, value in parts.items() if isinstance(value, dict)]
        rows.append((layer.replace("_", " "), "\n".join(lines)))
    return rows


def _values(name: str, values: dict[str, float]) -> str:
    if name == "mixing":
        return "shares   " + "  ".join(f"E{expert}={value:.3f}" for expert, value in values.items())
    label = "weights " if name == "hyperedge_weights" else name
    return f"{label} " + "  ".join(f"{member}={value:.3f}" for member, value in values.items())


def _check(found: LeakCheck) -> str:
    passed = [name.replace("_", " ") for name, check in found.checks.items() if check.passed]
    failed = [name.replace("_", " ") for name, check in found.checks.items() if not check.passed]
    parts = [
        f"{sign}: {', '.join(names)}" for sign, names in (("✗ failed", failed), ("✓ passed", passed)) if names
    ]
    reused = {check.reused_from: None for check in found.checks.values() if check.reused_from}
    parts += [f"the checks before training are those of run {name}" for name in reused]
    audit = found.audit
    if audit:
        share = audit.share_of_evaluation
        time = "" if share is None else f", in {100 * share:.1f}% of the evaluation's time"
        parts.append(f"audited {audit.windows:,} of {audit.all_windows:,} windows{time}")
    return "\n".join(parts)


def _time(time: Time) -> str:
    seconds = time.seconds
    phases = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    if "total" not in seconds:
        return phases
    return f"{seconds['total']:.0f} s{in_parts(time)} ({phases})"
