"""The end of a run on the screen: the details, then the answer: quality, speed, memory and what is next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.files import visible
from bench.measure.rates import difference_of_medians, paired_ratios
from bench.record import (
    Communication,
    Data,
    Diagnostics,
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
from bench.study.run_files import train_rows

LEAST_SHOWN_MIB = 0.05
LEAST_SHOWN_SHARE = 0.0005
FROM = {"folder": "a folder", "cache": "the local cache", "hub": "the hub"}
VERDICTS = {
    "official": "official text",
    "same counts": "official word counts",
    "other": "not WikiText-2",
}


def print_summary(record: Record, folder: Path, console: Console, again: str = "") -> None:
    """Print the record in at most 80 columns: the details, the answer, and the paths of the files.

    ``again`` is the command of the run, from which the next command is made; no next command without it.
    """
    record = record_of(record.model_dump())  # as it may be shown
    steps = train_rows(folder)
    console.print()
    console.print(_table(_details(record, steps), _title(record)))
    console.print()
    console.print(_table(_answer(record), None))
    for line in _places(record, folder, again):
        console.print(visible(line), markup=False, highlight=False, soft_wrap=True)


def _table(rows: Sequence[tuple[str, str]], title: Text | None) -> Table:
    table = Table(
        title=title, title_justify="left", show_header=False, box=None, width=80, padding=(0, 1, 0, 0)
    )
    table.add_column(style="bold", no_wrap=True, width=12)
    table.add_column(overflow="fold")
    for label, text in rows:
        if text:
            table.add_row(label, Text(text))
    return table


def _title(record: Record) -> Text:
    model = record.config.model
    name = record.run_name or record.run_id
    parts = [*name_parts(record.config), f"E {model['num_experts']}", f"seed {record.seed}", name]
    return Text(" · ".join(parts))


def _details(record: Record, steps: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = [
        ("data", _data(record.data)),
        ("batch", _batch(record)),
        ("training", _training(record, steps)),
        ("parameters", _parameters(record)),
        *_communication(record.communication),
        ("experts", _experts(record.diagnostics)),
        ("coupler", _marginal(record)),
        ("counts", _counts(record.used)),
    ]
    if is_measured(record.check):
        rows.append(("leak check", _check(record.check)))
    return [*rows, ("time", _time(record.time))]


def _answer(record: Record) -> list[tuple[str, str]]:
    return [
        ("status", record.status + (f": {record.error}" if record.error else "")),
        ("validation", _quality(record, "validation")),
        ("test", _quality(record, "test")),
        ("speed", _speed(record)),
        ("memory", _memory(record)),
    ]


def _places(record: Record, folder: Path, again: str) -> Iterator[str]:
    """Yield where the files of the run are, and the next command."""
    yield f"record: {folder}"
    if plots := len(list(folder.glob("plots/*.png"))):
        yield f"plots:  {folder / 'plots'} ({quantities.counted(plots, 'picture')})"
    if (page := folder.parent / "report" / "report.html").is_file():
        yield f"page:   {page} (of an earlier bench.report)"
    if again and (command := _next(record, folder, again)):
        yield f"next:   {command}"


def _next(record: Record, folder: Path, again: str) -> str:
    """Return the command that most users need after a run with this end."""
    study, checkpoint = folder.parent, folder / "checkpoint.pt"
    if record.status in ("crashed", "timeout") and checkpoint.is_file():
        return _with(again, f"--resume-checkpoint {shlex.quote(str(checkpoint))}")
    training, coupler = record.config.training, record.config.model["coupler_type"]
    if record.status == "ok" and len(list(study.glob("*/record.json"))) > 1:
        return f"python -m bench.report {study}"
    return {
        "ok": _with(again, "--coupler mean" if coupler != "mean" else f"--seed {record.seed + 1}"),
        "interrupted": _with(again, "--resume"),
        "oom": _with(again, "--tune-batch-size"),
        "diverged": _with(again, f"--learning-rate {training['learning_rate'] / 2:g}"),
        "check_failed": f"python -m bench.check --coupler {coupler}",
    }.get(record.status, "")


def _with(command: str, flag: str) -> str:
    """Return a command with another value of a flag, and without --resume and --force."""
    name, words = flag.split()[0], shlex.split(command)
    for place in reversed(range(len(words))):
        if words[place] in ("--resume", "--force") or words[place].startswith(f"{name}="):
            del words[place]
        elif words[place] == name:
            del words[place : place + 2]
    return f"{shlex.join(words)} {flag}"


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
    baselines = f" (n-gram baselines: {simple})" if simple else ""
    text = f"perplexity {number(value)} per token{baselines}"
    if scored.words != scored.tokens:
        by_word = quantities.word_perplexity(record, split)
        none = ", none per word (no whole word was scored)"
        text += none if by_word is None else f", {number(by_word)} per word"
    why_none = f"no bits per byte ({quantities.why_no_bits_per_byte(record, split)})"
    text += f", {why_none if bits is None else f'{number(bits, 3)} bits per byte'}"
    text += f"; {_tokens(record, split)}, length {scored.length}, stride {scored.stride}"
    if scored.unknown_words:
        unknown = share(quantities.unknown_words_share(record, split))
        text += f"; {scored.unknown_words:,} of the tokens ({unknown}) are unknown words (<unk>)"
    return text


def _tokens(record: Record, split: str) -> str:
    """Return how many tokens were scored, and of how many."""
    scored, data = record.split(split), record.data
    assert scored is not None
    whole = data.splits[split].tokens if is_measured(data) and split in data.splits else scored.tokens
    return (
        f"{scored.tokens:,} tokens"
        if whole <= scored.tokens
        else f"first {scored.tokens:,} of {whole:,} tokens"
    )


def _batch(record: Record) -> str:
    """Return the sizes that were asked for, found by a search, and used."""
    asked, tuned, used = record.requested, record.tuned, record.used
    batch = f"{asked.batch_size} sequences × {asked.max_seq_length} tokens" if is_measured(asked) else ""
    if is_measured(asked) and asked.micro_batch_size is not None:
        batch += f" in micro-batches of {asked.micro_batch_size}"
    lines = [batch]
    if is_measured(tuned):
        lines.append("tuned: " + _tuned(tuned))
    if is_measured(used) and used.micro_batch_shapes:
        whole = is_measured(asked) and used.micro_batch_shapes.keys() == {
            f"{asked.batch_size // used.world_size}x{asked.max_seq_length}"
        }
        if whole and not used.recoveries and not is_measured(tuned):
            return f"{batch}; {_updates(used)}{_on_ranks(used)}"
        lines.append("used: " + _used(used))
    return "\n".join(lines)


def _updates(used: Used) -> str:
    if used.steps == used.total_steps:
        return f"{used.steps:,} updates, as requested"
    return f"{used.steps:,} of {used.total_steps:,} updates"


def _tuned(tuned: Search) -> str:
    if tuned.status == "failed":
        return f"FAILED: {tuned.error}"
    tried = len(tuned.trials)
    source = "from an earlier search" if tuned.from_cache else f"{tried} size{'s' * (tried != 1)} tried"
    return (
        f"length {tuned.length}, micro-batch {tuned.micro_batch_size} of at most {tuned.cap}, "
        f"{source}, within {(tuned.limit_bytes or 0) / 2**20:,.1f} MiB "
        f"({tuned.target or 0:.0%} of the budget)"
    )


def _used(used: Used) -> str:
    pieces = ", ".join(
        f"{count:,} micro-batches of {shape.replace('x', ' × ')}"
        for shape, count in used.micro_batch_shapes.items()
    )
    sizes = " and ".join(map(str, used.batch_sizes))
    text = f"{_updates(used)}; {sizes} sequences per update, as {pieces}"
    if (used.accumulation or 1) > 1:
        text += f"; at the end {used.accumulation} micro-batches of {used.micro_batch_size} per update"
    text += _on_ranks(used)
    if used.recoveries:
        times = len(used.recoveries)
        often = "once" if times == 1 else f"{times} times"
        text += f"; memory ran out {often}, and the batch ran again in smaller micro-batches"
    if used.control:
        changes = len(used.control)
        text += f"; {changes} change{'s' * (changes > 1)} by the memory controller"
    return text


def _on_ranks(used: Used) -> str:
    ranks = used.world_size
    return f", on each of {ranks} ranks" if ranks > 1 else ""


def _training(record: Record, steps: Sequence[dict[str, Any]]) -> str:
    """Return the learning rate, the last training loss, and how often the gradient was clipped."""
    training = record.config.training
    text = f"learning rate {training['learning_rate']:g}, {training['warmup_steps']:g} warm-up steps"
    if not steps:
        return text
    most = training["max_grad_norm"]
    clipped = sum(float(row.get("gradient_norm", 0.0)) > most for row in steps)
    text += f"; final training loss {number(steps[-1].get('loss'), 3)} nats per token"
    if not clipped:
        return f"{text}; no gradient was clipped"
    return f"{text}; gradient clipped to norm {most:g} in {clipped:,} of {len(steps):,} updates"


def _counts(used: Used | NotMeasured) -> str:
    """Return that what was counted from the tensors is what was planned, or each difference in a line."""
    if not is_measured(used):
        return ""
    counts = {f"training {name}": found for name, found in used.ledger.training.items()}
    counts |= {f"tokens of {name}": found for name, found in used.ledger.evaluations.items()}
    unlike = [f"{name}: {found.asked:,} planned, {found.got:,} counted"
              for name, found in counts.items() if found.asked != found.got]  # fmt: skip
    if unlike:
        return "\n".join(f"✗ {line}" for line in unlike)
    tokens = used.ledger.training["tokens"].got
    return f"as planned: {tokens:,} training tokens, all batches and evaluations"


def _data(data: Data | NotMeasured) -> str:
    if not is_measured(data):
        return ""
    if data.embedded:
        return f"NOT WIKITEXT-2 but the embedded text ({data.name}, {data.config_name})"
    name = " ".join(part for part in (data.name, data.config_name) if part)
    return f"{name} from {FROM.get(data.source, data.source)} ({VERDICTS.get(data.verdict, data.verdict)})"


def _speed(record: Record) -> str:
    speed = record.speed
    if not is_measured(speed):
        return f"not measured: {speed.reason}" if record.status == "ok" else ""
    rate, median = speed.tokens_per_second, speed.median_step_seconds
    ends = ", ".join(f"p{q} {1e3 * np.percentile(speed.step_seconds, q):,.0f}" for q in (10, 90))
    parts = [
        f"{rate:,.0f} tokens/s, median step {median * 1e3:,.0f} ms ({ends}; {len(speed.step_seconds)} steps)"
    ]
    utilisation, waiting = quantities.utilisation(record), quantities.data_share(record)
    if utilisation is not None and is_measured(speed.matrix_flops_per_second):
        above = " (over 100%: the timed matrix products are not the fastest ones here)"
        measured = f"{speed.matrix_flops_per_second / 1e12:,.0f} TFLOP/s{above if utilisation > 1 else ''}"
        parts.append(f"MFU {share(utilisation)} of {measured}")
    if waiting is not None and waiting >= LEAST_SHOWN_SHARE:
        parts.append(f"fetching a batch takes {share(waiting)} of a step")
    if is_measured(speed.compile_seconds):
        parts.append(f"compiled in {speed.compile_seconds:,.1f} s")
    return ", ".join(parts) + ("" if speed.steady else f"; {speed.remark or 'not steady'}")


def _marginal(record: Record) -> str:
    """Return the cost of the coupler alone, timed alternating with the mean coupler."""
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
    return f"{', '.join(parts)} over {found.reference} ({len(ours)} alternating rounds{steady})"


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
        sizes = {name: size / 2**20 for name, size in memory.by_part.items()}
        parts = [f"{name} {size:,.1f}" for name, size in sizes.items() if size >= LEAST_SHOWN_MIB]
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
    """Return the smallest and the largest expert share and hyperedge weight of each layer."""
    if not is_measured(communication):
        return []
    return [
        (layer.replace("_", " "),
         "\n".join(_range(name, value) for name, value in parts.items() if isinstance(value, dict) and value))
        for layer, parts in communication.items()
    ]  # fmt: skip


def _range(name: str, values: dict[str, float]) -> str:
    low, high = (pick(values, key=lambda member: values[member]) for pick in (min, max))
    if name == "mixing" and values[high] - values[low] < LEAST_SHOWN_SHARE:
        return f"equal expert shares, {values[low]:.3f} each"
    if name == "mixing":
        ends = f"{values[low]:.3f} (E{low}) to {values[high]:.3f} (E{high})"
        return f"expert shares {ends}; equal shares are {1 / len(values):.3f}"
    return f"{name.replace('_', ' ')} {values[low]:.3f} ({low}) to {values[high]:.3f} ({high})"


def _experts(found: Diagnostics | NotMeasured) -> str:
    """Return how alike the experts are, which one matters most, and the time of the measurement."""
    if not is_measured(found):
        return ""
    most, of = quantities.largest_rise(found), len(found.layers[0].cosine)
    rank = f"effective rank {number(found.effective_rank, 2)} of {of}"
    alike = f"cosine {number(found.expert_cosine, 2)}, CKA {number(found.expert_cka, 2)}, {rank}"
    rise = f"{signed(most.nats)} ± {number(most.standard_error, 4)} nats"
    taken = f" ({share(found.share_of_run)} of the time)" if found.share_of_run else ""
    return f"{alike}{taken}\nlargest rise of the loss {rise} (layer {most.layer}, E{most.expert})"


def _check(found: LeakCheck) -> str:
    failed = [name.replace("_", " ") for name, check in found.checks.items() if not check.passed]
    passed, audit = len(found.checks) - len(failed), found.audit
    text = (
        f"✗ FAILED: {', '.join(failed)}; passed: {passed} checks" if failed else f"✓ passed: {passed} checks"
    )
    if audit:
        text += f", {audit.windows:,} of {audit.all_windows:,} windows evaluated again"
    reused = {check.reused_from: None for check in found.checks.values() if check.reused_from}
    return text + "".join(f"; checks before training are from run {name}" for name in reused)


def _time(time: Time) -> str:
    seconds = time.seconds
    phases = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    if "total" not in seconds:
        return phases
    return f"{seconds['total']:.0f} s{in_parts(time)} ({phases})"
