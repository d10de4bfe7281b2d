"""A made record, complete, of which a test changes what it is about."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from bench.config import RunConfig
from bench.record import Record
from bench.run.prepare import settings_in_record

SHA = hashlib.sha256(b"made").hexdigest()
PART = {"command": "the first", "start": "2025-01-01T00:00:00Z", "end": None, "seconds": {"prepare": 0.1},
        "resumed_at_step": None}  # fmt: skip
ENVIRONMENT = {
    "python": "3.11.0", "system": "Linux x86_64",
    "packages": {"torch": "2.13.0+cpu", "torch_geometric": "2.8.1", "torch_scatter": None,
                 "torch_sparse": None, "numpy": "2.4.0", "datasets": "5.0.0"},
    "device_type": "cpu", "device_name": "a made processor", "cuda": None, "driver": None,
    "cpu_cores": 2, "threads": 1, "omp_wait_policy": "PASSIVE", "git_commit": SHA[:40],
    "git_changes_sha256": None, "project_sha256": SHA,
}  # fmt: skip
SCORED = {
    "nll_sum": 30.0,
    "tokens": 10,
    "words": 10,
    "bytes": 50,
    "unknown_words": 0,
    "length": 16,
    "stride": 8,
}
NO_TEST = {"value": None, "reason": "not asked for; --evaluate-test scores it"}
NOT_READ = {"value": None, "reason": "only a caching allocator reserves memory"}


def made_data(embedded: bool = False) -> dict[str, Any]:
    """Return the ``data`` of WikiText-2, or of the embedded text."""
    names = {"name": "pydoc_data.topics", "config_name": "CPython 3.11", "source": "embedded",
             "warning": "NOT WIKITEXT-2: embedded text", "python_version": "3.11.0",
             "verdict": "not WikiText-2"} if embedded else {
             "name": "wikitext", "config_name": "wikitext-2-v1", "source": "folder", "warning": None,
             "python_version": None, "verdict": "official"}  # fmt: skip
    split = {"tokens": 217646, "words": 213886, "lines": 3760, "bytes": 1121681, "documents": 60,
             "sha256": SHA, "verdict": names["verdict"]}  # fmt: skip
    return names | {
        "tokenizer": "word", "sha256": hashlib.sha256(str(names["name"]).encode()).hexdigest(),
        "files": {f"wiki.{part}.tokens": SHA for part in ("train", "valid", "test")},
        "vocabulary": {"size": 33278, "sha256": SHA},
        "splits": dict.fromkeys(("train", "validation", "test"), split),
        "training_blocks": {"count": 32634, "subset_seed": None, "curriculum": None},
    }  # fmt: skip


def made_used(steps: int, rows: int, length: int, evaluations: dict[str, Any]) -> dict[str, Any]:
    """Return what was used by a training of one epoch in whole batches."""
    counts = {"batches": steps, "samples": steps * rows, "tokens": steps * rows * length, "updates": steps}
    shapes = {f"{rows}x{length}": steps}
    ledger = {
        "epochs": [{"epoch": 0, "batch_size": rows, "asked": counts, "got": counts}],
        "training": {name: {"asked": count, "got": count} for name, count in counts.items()},
        "evaluations": evaluations,
    }
    return {"batch_shapes": shapes, "steps": steps, "tokens": counts["tokens"], "total_steps": steps,
            "epochs": 0.058852, "precision": "fp32", "ledger": ledger, "batch_sizes": [rows],
            "lengths": [length], "micro_batch_shapes": shapes, "micro_batch_size": rows, "accumulation": 1,
            "recoveries": [], "control": []}  # fmt: skip


def epochs(batch_size: int) -> list[dict[str, Any]]:
    """Return the accounts of one epoch in batches of another size."""
    return [{"epoch": 0, "batch_size": batch_size, "asked": {}, "got": {}}]


def made_speed(step_seconds: list[float], tokens: int) -> dict[str, Any]:
    """Return the ``speed`` of steps of so many tokens."""
    missing = {"value": None, "reason": "not asked for"}
    return {"step_seconds": step_seconds, "step_tokens": [tokens] * len(step_seconds), "warmup_steps": 3,
            "steady": False, "remark": "not steady: a fixed, short warm-up",
            "matrix_flops_per_second": missing, "compile_seconds": missing, "marginal": missing}  # fmt: skip


def made_memory(peak: int, process_peak: int) -> dict[str, Any]:
    """Return the ``memory`` of a step on the CPU."""
    parts = {"parameter": peak // 10, "activation": peak - 3 * (peak // 10), "optstate": 2 * (peak // 10)}
    unknown = ("peak_reserved_bytes", "peak_active_bytes", "allocator_retries", "device_used_bytes",
               "nvml_used_bytes", "by_part", "by_phase")  # fmt: skip
    return {"meter": "tracked_tensors", "peak_allocated_bytes": peak, "peak_by_part_bytes": parts,
            "process_peak_bytes": process_peak, **dict.fromkeys(unknown, NOT_READ)}  # fmt: skip


def made_diagnostics(
    alike: float, rises: Sequence[float] = (0.02, 0.0, 0.0), error: float = 0.002,
    information: float | None = None, layers: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Return the ``diagnostics`` of experts whose updates all have one cosine; ``rises`` are by expert."""
    of = range(len(rises))
    missing = {"value": None, "reason": "the coupler has no weights that depend on the token"}
    similar = [[1.0 if one == other else alike for other in of] for one in of]
    layer = {"cosine": similar, "cka": similar, "effective_rank": len(of) - alike,
             "ablation_nats": list(rises), "ablation_standard_error": [error] * len(of),
             "load": missing if information is None else [1 / len(of)] * len(of),
             "mutual_information": missing if information is None else information,
             "effective_experts": float(len(of))}  # fmt: skip
    return {"tokens": 2048, "layers": [layer] * layers, "seconds": 1.2, "share_of_run": 0.018}


def measured(quantity: Any) -> bool:
    """Say whether a quantity, as JSON has it, is a reading."""
    return not (isinstance(quantity, dict) and set(quantity) == {"value", "reason"})


def made_record(**known: Any) -> Record:
    """Return a record of a run that has only begun, with what is ``known``, as JSON has it."""
    base = {
        "run_id": "0123456789ab", "configuration": "ba9876543210", "study": "made", "status": "interrupted",
        "seed": 0, "command": "", "config": settings_in_record(RunConfig()).model_dump(),
        "environment": ENVIRONMENT, "data": made_data(),
        "time": {name: PART[name] for name in ("start", "end", "seconds", "resumed_at_step")}
        | {"parts": [PART]},
    }  # fmt: skip
    return Record.model_validate(base | known)


def record_json(**known: Any) -> dict[str, Any]:
    """Return ``made_record`` as JSON has it."""
    return made_record(**known).model_dump(mode="json")


def without_diagnostic_times(record: dict) -> dict:
    """Return the JSON of a record without the seconds that measuring the experts took."""
    times = ("seconds", "share_of_run")
    kept = {name: value for name, value in record["diagnostics"].items() if name not in times}
    return {**record, "diagnostics": kept}
