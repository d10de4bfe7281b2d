"""The tables of single runs: all of them, and those that do not count."""

from __future__ import annotations

from collections.abc import Sequence

from bench.analysis import quantities
from bench.analysis.numbers import mebibytes, number, share
from bench.analysis.provenance import DIGITS
from bench.analysis.setting import Setting
from bench.analysis.study import Configuration, Group, Run, Study, doubled_words, text_warnings
from bench.analysis.tables import Cells, Table, make_table
from bench.files import visible
from bench.record import Environment, NotMeasured, Record, is_measured


def runs_table(groups: Sequence[Group]) -> Table:
    """Return one row a run, failed ones too."""
    figures = [run_figures(run, found, number) for number, group in enumerate(groups, 1)
               for found in group.configurations for run in found.runs]  # fmt: skip
    known = any(cells["matrix_utilisation"] is not None for cells in figures)
    unknown = any(cells["unknown_words_share"] for cells in figures)
    rows = [(cells, _run_texts(cells, len(groups) > 1, known, unknown)) for cells in figures]
    return make_table("runs", "Runs", rows, notes=text_warnings(groups))


def failures_table(study: Study) -> Table:
    """Return one row a run that does not count, with the reason."""
    rows = []
    for group in study.groups:
        for found in group.configurations:
            others = dict(zip(found.doubled, doubled_words(found), strict=True))
            for run in found.runs:
                if others or not run.counts:
                    doubled = others.get(run.seed, "another seed of this row has several runs")
                    why = doubled if run.counts else run.record.error or ""
                    rows.append(_failure(found.label, run.seed, run.record.run_id, run.status, why))
    rows += [_failure("", None, visible(folder.name), kind, why)
             for kind, folders in (("unreadable", study.unreadable), ("not counted", study.misplaced))
             for folder, why in folders]  # fmt: skip
    return make_table("failures", "Runs that do not count", rows, notes=text_warnings(study.groups))


def run_figures(run: Run, configuration: Configuration, table: int = 1) -> Cells:
    """Return what a table says of one run, raw; ``table`` is the number of the comparison that it is in."""
    record, setting = run.record, Setting.of(run.record, allow_unequal=False)
    return {
        "run_id": record.run_id, "name": record.run_name, "configuration": configuration.label,
        "seed": run.seed, "status": run.status, "perplexity": quantities.perplexity(record),
        "loss_nats": run.loss(), "test_perplexity": quantities.perplexity(record, "test"),
        "unknown_words_share": quantities.unknown_words_share(record),
        "test_unknown_words_share": quantities.unknown_words_share(record, "test"),
        "bits_per_byte": quantities.bits_per_byte(record),
        "tokens_per_second": quantities.tokens_per_second(record),
        "matrix_utilisation": quantities.utilisation(record),
        "peak_memory_bytes": quantities.peak_memory_bytes(record),
        "requested_batch_size": record.config.batch_size,
        **_sizes(record),
        "steps": record.used.steps if is_measured(record.used) else None,
        "seconds": record.time.seconds.get("total"), "start": record.time.start,
        **_code(record.environment),
        "table": table, "corpus": setting.corpus_words(), "device": setting.device_words(),
        "scored": setting.scored_words(), "command": record.command,
    }  # fmt: skip


def _sizes(record: Record) -> Cells:
    """Return length and micro-batch as they were found by a search, and as they were used."""
    tuned = record.tuned if is_measured(record.tuned) else None
    used = record.used if is_measured(record.used) else None
    return {
        "tuned_status": tuned and tuned.status, "tuned_length": tuned and tuned.length,
        "tuned_micro_batch_size": tuned and tuned.micro_batch_size,
        "used_shapes": " ".join(used.micro_batch_shapes or used.batch_shapes) or None if used else None,
        "used_micro_batch_size": used and used.micro_batch_size,
        "used_accumulation": used and used.accumulation,
        "recoveries": None if used is None else len(used.recoveries),
    }  # fmt: skip


def _code(environment: Environment | NotMeasured) -> Cells:
    """Return the first digits of the hashes of the project's code and of the coupler's, if they are known."""
    if not is_measured(environment):
        return {"code": "", "coupler_code": ""}
    project = environment.project_sha256 or environment.code_sha256 or ""
    return {"code": project[:DIGITS], "coupler_code": (environment.coupler_sha256 or "")[:DIGITS]}


def _run_texts(cells: Cells, several: bool, utilisation: bool, unknown: bool) -> Cells:
    """Return one run as it is shown; the number of its table, MFU and unknown words where a run has them."""
    tuned = "failed" if cells["tuned_status"] == "failed" else cells["tuned_micro_batch_size"]
    used, pieces = cells["used_shapes"], cells["used_accumulation"] or 1
    if used and pieces > 1:
        used += f" in {pieces} pieces"
    batch = [cells["requested_batch_size"], tuned, used]
    return {
        "run": cells["run_id"], **({"table": str(cells["table"])} if several else {}),
        "name": cells["name"] or "", "configuration": cells["configuration"],
        "seed": str(cells["seed"]), "status": cells["status"], "perplexity": number(cells["perplexity"]),
        **({"unknown words": share(cells["unknown_words_share"])} if unknown else {}),
        "tokens/s": number(cells["tokens_per_second"], 0),
        **({"MFU": share(cells["matrix_utilisation"])} if utilisation else {}),
        "peak memory": mebibytes(cells["peak_memory_bytes"]),
        "batch asked / tuned / used": " / ".join("–" if part is None else str(part) for part in batch),
        "seconds": number(cells["seconds"], 0), "code": cells["code"],
    }  # fmt: skip


def _failure(label: str, seed: int | None, run_id: str, status: str, error: str) -> tuple[Cells, Cells]:
    cells = {"configuration": label, "seed": seed, "run_id": run_id, "status": status, "error": error}
    return cells, {
        **cells,
        "seed": "" if seed is None else str(seed),
        "error": error.partition("\n")[0][:200],
    }
