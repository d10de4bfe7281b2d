"""The plots of one run: each as svg and png, with its data as csv beside it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.analysis.adjacency_figure import adjacency_plot
from bench.analysis.hyperedge_figures import trajectories_plot, weights_plot
from bench.analysis.plot_style import BLUE, GREEN, ORANGE, Plot, new_figure, plot_style, write_plots
from bench.analysis.training_figure import training_plot
from bench.record import is_measured
from bench.study.run_files import RunData, read_run

PARTS = {
    "expert": ("experts", BLUE, ""),
    "coupler": ("couplers", ORANGE, "///"),
    "other": ("embeddings and norms", GREEN, "..."),
}
NAMES = ("training", "hyperedge_weights", "hyperedge_weights_over_steps", "adjacency", "parameters")
ENDINGS = ("svg", "png", "csv")


def plot_run(folder: Path) -> list[Path]:
    """Draw what the run in ``folder`` recorded, into ``folder/plots``; return the files written.

    A figure whose quantity is missing is left out, and so is what an earlier call drew of it.

    Raises:
        Refused: ``folder`` holds no record.json that can be read.
        OSError: the disk refuses; nothing half-written stays.
    """
    run = read_run(folder)
    with plot_style():
        figures = [training_plot(run), weights_plot(run), trajectories_plot(run), adjacency_plot(run),
                   parameters_plot(run)]  # fmt: skip
        written = write_plots(folder / "plots", [plot for plot in figures if plot is not None])
    for name in NAMES:
        for ending in ENDINGS:
            path = folder / "plots" / f"{name}.{ending}"
            if path not in written:
                path.unlink(missing_ok=True)
    return written


def parameters_plot(run: RunData) -> Plot | None:
    """Return ``parameters``: a bar a part, or None where the model was not built."""
    counts = run.record.parameters
    if not is_measured(counts):
        return None
    figure = new_figure(run.record, f"Parameters by part: {counts.total:,} in all", 10, 1.7)
    axes = figure.subplots()
    by_part = {part: getattr(counts, part) for part in PARTS}
    for part, count in by_part.items():
        _, colour, hatch = PARTS[part]
        bar = axes.barh(PARTS[part][0], count, color=colour, hatch=hatch, edgecolor="black", linewidth=0.5)
        share = 100 * count / counts.total
        axes.bar_label(bar, [f"{count:,} ({share:.1f} %)"], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("parameters")
    axes.set_xlim(0, 1.3 * max(by_part.values()))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(False, axis="y")
    return Plot("parameters", figure, ("part", "parameters"), list(by_part.items()))
