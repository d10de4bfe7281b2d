"""A study as data frames, for notebooks: one row per run, or one row per step and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from bench.config import RunConfig, build
from bench.record import Record, is_measured, is_stale
from bench.report import quantities
from bench.study.runs import Run, load_study, the_study
from bench.training.environment import code_hashes
from gnnmoe.config import Refused


def load(study: str | Path, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return one row per run of a study, in the order of configurations and seeds.

    Columns: ``run_id``, ``label`` (of the configuration), ``status``, ``error``, every field of the config,
    ``loss`` (nats per token), ``perplexity``, ``bits_per_byte`` (these three on validation, at the end),
    ``tokens_per_second``, ``peak_memory_bytes``, ``parameters``, ``training_flops_per_token`` and ``stale``.
    What was not measured is missing. ``stale`` says whether other code made the run than today's code; it is
    missing where the record has no hashes, or the coupler's file is not here.

    Args:
        study: The name of a study in ``results_dir``, or its folder.
        results_dir: The folder of the studies.

    Raises:
        Refused: there is no such study, or it has no record.
    """
    return pd.DataFrame([_row(label, run.record) for label, run in _runs(study, results_dir)])


def history(study: str | Path, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return one row per training step and per evaluation of each run of a study.

    Columns: ``run_id``, ``label``, ``seed``, ``kind`` (train or validation), ``step``, ``epoch``, ``tokens``
    (counted targets), ``loss`` (nats per token), ``perplexity``; a training step also has ``learning_rate``
    and ``gradient_norm``. The arguments and errors are those of ``load``.
    """
    rows = []
    for label, run in _runs(study, results_dir):
        known = {"run_id": run.record.run_id, "label": label, "seed": run.seed}
        for row in (*run.data.train, *run.data.validation):
            sums = dict(row)
            if "nll_sum" in sums:
                sums["loss"] = sums.pop("nll_sum") / sums["tokens"]
            rows.append({**known, **sums, "perplexity": quantities.exp_or_infinity(sums["loss"])})
    return pd.DataFrame(rows)


def _runs(study: str | Path, results_dir: str | Path) -> Iterator[tuple[str, Run]]:
    for group in load_study(the_study(str(study), Path(results_dir))).groups:
        for configuration in group.configurations:
            for run in configuration.runs:
                yield configuration.label, run


def _row(label: str, record: Record) -> dict[str, Any]:
    groups = record.config.model_dump().values()
    return {
        "run_id": record.run_id,
        "label": label,
        "status": record.status,
        "error": record.error,
        **{name: value for group in groups for name, value in group.items()},
        "loss": quantities.loss_nats(record),
        "perplexity": quantities.perplexity(record),
        "bits_per_byte": quantities.bits_per_byte(record),
        "tokens_per_second": quantities.tokens_per_second(record),
        "peak_memory_bytes": quantities.peak_memory_bytes(record),
        "parameters": record.parameters.total if is_measured(record.parameters) else None,
        "training_flops_per_token": (
            record.flops.training_flops_per_token if is_measured(record.flops) else None
        ),
        "stale": _stale(record),
    }


def _stale(record: Record) -> bool | None:
    try:
        today = code_hashes(build(RunConfig, record.config.model).model.resolved(1))
    except Refused:  # the coupler comes from a file that is not here
        return None
    return is_stale(record, today)
