"""The plots of a whole study: each configuration as the mean over its seeds, with how far they scatter."""

from __future__ import annotations

from bench.analysis.comparison import Comparison
from bench.analysis.plot_style import Plot, plot_style
from bench.analysis.study_plots.coupler_cost import coupler_cost_plot
from bench.analysis.study_plots.experts import experts_plot
from bench.analysis.study_plots.frame import Frame
from bench.analysis.study_plots.loss_curves import loss_curves_plot
from bench.analysis.study_plots.pareto import pareto_plot
from bench.analysis.study_plots.perplexity import perplexity_plot
from bench.analysis.study_plots.training import training_plot

__all__ = ["NAMES", "study_plots"]

NAMES = ("loss_curves", "perplexity", "pareto", "experts", "coupler_cost", "training")
"""Every name that a plot of ``study_plots`` can have."""


def study_plots(study_name: str, comparison: Comparison) -> list[Plot]:
    """Return the plots of a comparison, in the order of ``NAMES``.

    A figure whose quantities nothing measured is left out: all of them where no run counts.
    """
    frame = Frame(study_name, comparison)
    if not frame.measured:
        return []
    with plot_style():
        plots = [loss_curves_plot(frame), perplexity_plot(frame), pareto_plot(frame), experts_plot(frame),
                 coupler_cost_plot(frame), training_plot(frame)]  # fmt: skip
    return [plot for plot in plots if plot is not None]
