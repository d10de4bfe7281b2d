"""A study as data frames, for notebooks: one row per run, or one row per step and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from bench.config import RunConfig, build
from bench.record import Record, is_stale
from bench.report.quantities import exp_or_infinity
from bench.report.tables import run_columns
from bench.study.runs import Run, load_study, the_study
from bench.training.environment import code_hashes
from gnnmoe.config import Refused


def load(study: str | Path, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return one row per run of a study, in the order of configurations and seeds.

    Columns: ``run_id``, ``configuration`` (its label), ``status``, ``error``, every field of the config,
    the quantities of a run (``perplexity``, ``loss`` and more, see docs/python.md) and ``stale``. What was
    not measured is missing. ``stale`` says whether other code made the run than today's code; it is missing
    where the record has no hashes, or the coupler's file is not here.

    Args:
        study: The name of a study in ``results_dir``, or its folder.
        results_dir: The folder of the studies.

    Raises:
        Refused: there is no such study, or it has no record.
    """
    return pd.DataFrame(
        [{**run_columns(run, label), "stale": _stale(run.record)} for label, run in _runs(study, results_dir)]
    )


def history(study: str | Path, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return one row per training step and per evaluation of each run of a study.

    Columns: ``run_id``, ``configuration``, ``seed``, ``kind`` (train or validation), ``step``, ``epoch``,
    ``tokens`` (counted targets), ``loss`` (nats per token), ``perplexity``; a training step also has
    ``learning_rate`` and ``gradient_norm``. The arguments and errors are those of ``load``.
    """
    rows = []
    for label, run in _runs(study, results_dir):
        known = {"run_id": run.record.run_id, "configuration": label, "seed": run.seed}
        for row in (*run.data.train, *run.data.validation):
            sums = dict(row)
            if "nll_sum" in sums:
                sums["loss"] = sums.pop("nll_sum") / sums["tokens"]
            rows.append({**known, **sums, "perplexity": exp_or_infinity(sums["loss"])})
    return pd.DataFrame(rows)


def _runs(study: str | Path, results_dir: str | Path) -> Iterator[tuple[str, Run]]:
    for group in load_study(the_study(str(study), Path(results_dir))).groups:
        for configuration in group.configurations:
            for run in configuration.runs:
                yield configuration.label, run


def _stale(record: Record) -> bool | None:
    try:
        today = code_hashes(build(RunConfig, record.config.model).model.resolved(1))
    except Refused:  # the coupler comes from a file that is not here
        return None
    return is_stale(record, today)
