"""Made run folders, as ``bench.run`` would write them, and their training figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.config import RunConfig
from bench.report.plots.run import training_plot
from bench.report.plots.style import plot_style
from bench.run.prepare import config_dict
from bench.study.run_files import read_run
from tests._records import NO_TEST, SCORED, made_memory, record_json

STEPS, EVAL_EVERY, TOKENS = 12, 4, 50
MEMORY = {"model": 2**20, "gradients": 2**19, "optimizer": 2**21, "activations": 5 * 2**20}
PAIRS = [(0, 1), (0, 2), (1, 2)]


def made_run(folder: Path, coupler: str = "HGNN", steps: int = STEPS, **changes: Any) -> Path:
    """Write a run folder of three experts and two layers as ``bench.run`` would; return it."""
    folder.mkdir(parents=True)
    config = config_dict(RunConfig())
    config["model"] |= {"coupler_type": coupler, "hgnn_conv_type": "HypergraphConv",
             "static_hyperedge_strategy": "all_pairs", "num_experts": 3}  # fmt: skip
    validation = SCORED | {
        "nll_sum": 300.5,
        "tokens": TOKENS,
        "unigram_nll_sum": 341.25,
        "kneser_ney_trigram_nll_sum": 273.0,
        "unknown_words": 0,
        "length": 16,
        "stride": 8,
    }
    known = {
        "run_id": "0123456789ab", "configuration": "ba9876543210", "study": "made",
        "run_name": "made", "status": "ok", "seed": 3, "command": "",
        "config": config,
        "memory": made_memory(sum(MEMORY.values()), 2**25) | {"by_part": MEMORY},
        "parameters": {"total": 1000, "expert": 600, "coupler": 150, "other": 250},
        "quality": {"validation": validation, "test": NO_TEST, "best_step": steps},
        "communication": {f"layer_{layer}": made_communication(coupler, layer) for layer in range(2)},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record_json(**{**known, **changes})))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made_history(steps)))
    sampled = np.array([0, *range(EVAL_EVERY, steps + 1, EVAL_EVERY)])
    ramp = np.linspace(1, 2, len(sampled), dtype=np.float32)[:, None] * np.ones(3, dtype=np.float32)
    arrays: dict[str, Any] = {"step": sampled}
    if coupler == "HGNN":
        arrays |= {f"layer_{layer}.hyperedge_weights": ramp + layer for layer in range(2)}
    np.savez(folder / "communication.npz", **arrays)
    return folder


def made_communication(coupler: str, layer: int) -> dict[str, Any]:
    if coupler == "HGNN":
        weights = {f"{{{i},{j}}}": 0.9 + 0.1 * (i + j) + layer for i, j in PAIRS}
        return {"hyperedge_weights": weights, "mixing": {"0": 0.3, "1": 0.3, "2": 0.4}}
    adjacency = [[0.0, 0.25, 0.5], [0.75, 0.0, 0.125], [0.375, 0.625, 0.0]]
    graph = {"adjacency_0": adjacency, "adjacency_1": adjacency} if coupler == "GNN" else {}
    return {**graph, "mixing": {"0": 0.3, "1": 0.3, "2": 0.4}}


def made_history(steps: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        rows.append({"kind": "train", "step": step, "epoch": 0, "loss": 7 - 0.1 * step + 0.05 * (-1) ** step,
                     "learning_rate": 1e-3 * step, "gradient_norm": 2 / step, "tokens": 64})  # fmt: skip
        if step % EVAL_EVERY == 0 or step == steps:
            rows.append({"kind": "validation", "step": step, "epoch": 0, "nll_sum": 350.0 - step,
                         "tokens": TOKENS})  # fmt: skip
    return rows


def without_history(folder: Path, coupler: str = "HGNN") -> Path:
    """Return a run folder whose drawing takes little time."""
    run = made_run(folder, coupler)
    (run / "history.jsonl").write_text("")
    return run


def training(folder: Path, laid_out: bool = True) -> tuple[Figure, list[dict[str, Any]]]:
    """Return the training figure of a run and its table."""
    with plot_style():
        plot = training_plot(read_run(folder))
        assert plot is not None
        if laid_out:
            plot.figure.draw_without_rendering()
    return plot.figure, [dict(zip(plot.columns, row, strict=True)) for row in plot.rows]


def texts(folder: Path) -> list[str]:
    """Return every text of the training figure of a run."""
    figure, _ = training(folder, laid_out=False)
    legends = [legend for axes in figure.axes if (legend := axes.get_legend()) is not None]
    return [text.get_text() for group in (figure.texts, *(x.get_texts() for x in legends)) for text in group]
