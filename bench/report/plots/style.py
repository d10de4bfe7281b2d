"""The look of every plot, and its files: colours, header, axes, deterministic svg and png."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from bench.files import write_together
from bench.record import Record
from bench.report.quantities import share, unknown_words_share
from bench.study.labels import name_parts

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#666666"
LINE_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "black")
LINE_STYLES = ("-", "--", ":", "-.")

DPI = 150
MAX_PIXELS = 20_000
"""The most pixels of a side of the png; Agg refuses 65,536."""
MAX_NATS = 25
"""Above this loss, perplexity has no readable scale."""
TITLE_SIZE, NOTE_SIZE, NAME_LENGTH = 10, 8, 60
STYLE = {
    "svg.hashsalt": "gnnmoe",
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "hatch.linewidth": 0.6,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its files without ending, and its data as a table."""

    name: str
    figure: Figure
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def files(self) -> dict[str, bytes]:
        """Return the contents of the svg, the png and the csv, by file name."""
        svg, png = io.BytesIO(), io.BytesIO()
        FigureCanvasAgg(self.figure)
        with plot_style():
            settle(self.figure)
            self.figure.savefig(svg, format="svg", metadata={"Date": None})
            dpi = min(DPI, MAX_PIXELS / max(self.figure.get_size_inches()))
            self.figure.savefig(png, format="png", dpi=dpi)
        contents = (svg.getvalue(), png.getvalue(), self.data())
        return {f"{self.name}.{end}": data for end, data in zip(("svg", "png", "csv"), contents, strict=True)}

    def data(self) -> bytes:
        """Return the contents of the csv, without drawing."""
        table = io.StringIO(newline="")
        csv.writer(table, lineterminator="\n").writerows([self.columns, *self.rows])
        return table.getvalue().encode()


def settle(figure: Figure) -> None:
    """Lay the figure out once; otherwise each drawing does it again, which takes half of its time.

    It is laid out at the png's resolution, since the width of letters depends a little on the resolution.
    """
    engine, own = figure.get_layout_engine(), figure.dpi
    if engine is not None:
        figure.set_dpi(DPI)
        engine.execute(figure)
        figure.set_layout_engine("none")
        figure.set_dpi(own)


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw with the project's settings, and restore the user's own settings afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield


def new_figure(record: Record, subject: str, width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches below a header.

    The header has the ``subject`` and the run, and a warning if the numbers do not count or are not of
    WikiText-2.
    """
    return headed_figure(subject, run_title(record), warnings_of(record), width, height)


def headed_figure(
    subject: str, title: str, warnings: Sequence[str], width: float, height: float, note: str = ""
) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches below a header of these texts.

    ``title`` says which numbers are shown, and ``note`` how to read them; both are wrapped.
    """
    points = 72 * (width - 0.2)
    lines = [(subject, "black", "bold", TITLE_SIZE)]
    lines += [(text, "black", "normal", TITLE_SIZE) for text in wrap(title, points)]
    lines += [(text, VERMILLION, "bold", TITLE_SIZE) for text in wrap(" · ".join(warnings), points, "bold")]
    lines += [(text, "#444444", "normal", NOTE_SIZE) for text in wrap(note, points, size=NOTE_SIZE)]
    header = sum(size for *_, size in lines) * 1.35 / 72 + 0.12
    total = height + header
    figure = Figure(figsize=(width, total), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / total))  # pyright: ignore
    top = 0.06
    for text, colour, weight, size in lines:
        figure.text(
            0.08 / width, 1 - top / total, text, va="top", fontsize=size, color=colour, fontweight=weight
        )
        top += size * 1.35 / 72
    return figure


def run_title(record: Record) -> str:
    """Return coupler, experts, seed and name in one line; a long name is cut in the middle."""
    model = record.config.model
    name = record.run_name or record.run_id
    parts = [*name_parts(record.config), f"E {model['num_experts']}", f"seed {record.seed}", name]
    return printable(" · ".join(shorten(part) for part in parts))


def shorten(text: str, length: int = NAME_LENGTH) -> str:
    """Return ``text``; if it is longer than ``length``, its middle is replaced by "…"."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 1]}…{text[-tail:]}"


def printable(text: str) -> str:
    """Return ``text`` in one line, with "□" for letters that the font cannot draw."""
    font = get_font(findfont("DejaVu Sans"))
    return "".join(
        letter if letter == " " or (letter.isprintable() and font.get_char_index(ord(letter))) else "□"
        for letter in " ".join(text.split())
    )


@lru_cache(64)
def wrap(text: str, points: float, weight: str = "normal", size: int = TITLE_SIZE) -> tuple[str, ...]:
    """Return ``text`` in lines of at most ``points``, by the real width of the letters."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans", weight=weight)))
    font.set_size(size, 72)

    def width(line: str) -> float:
        font.set_text(line)
        return font.get_width_height()[0] / 64

    most = min(len(text), math.ceil(1.3 * points * len(text) / max(width(text), 1)))
    for letters in range(most, 1, -1):
        lines = textwrap.wrap(text, letters)
        if all(width(line) <= points for line in lines):
            return tuple(lines)
    return (text,) * bool(text)


def warnings_of(record: Record) -> list[str]:
    """Return the warnings that every plot of this run shows."""
    notes = []
    if record.embedded:
        notes.append("NOT WIKITEXT-2: embedded text")
    if record.status == "check_failed":
        notes.append("leak check failed: the perplexity does not count")
    elif record.status != "ok":
        notes.append(f"status: {record.status}")
    if unknown := unknown_words_share(record):
        notes.append(f"{share(unknown)} of the scored tokens are unknown words")
    return notes


def step_axis(axes: Axes, steps: Sequence[int], margin: float = 0.0) -> None:
    """Label the x axis as steps, from 0 to the last of ``steps`` plus ``margin``, with whole numbers only."""
    axes.set_xlabel("step")
    axes.set_xlim(0, max(steps) * (1 + margin))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def log_ticks(axes: Axes, low: float, high: float, axis: Literal["x", "y"] = "y") -> None:
    """Make an axis logarithmic from ``low`` to ``high``, with round ticks in plain numbers."""
    (axes.set_yscale if axis == "y" else axes.set_xscale)("log")
    (axes.set_ylim if axis == "y" else axes.set_xlim)(low, high)
    scale = axes.yaxis if axis == "y" else axes.xaxis
    scale.set_major_locator(FixedLocator(round_ticks(low, high)))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def perplexity_axis(axes: Axes) -> None:
    """Add a second, logarithmic axis to an axis of losses in nats: perplexity = exp(loss)."""
    low, high = axes.get_ylim()
    if high > MAX_NATS:
        return
    twin = axes.twinx()
    log_ticks(twin, math.exp(low), math.exp(high))
    twin.set_ylabel("perplexity = exp(loss)")
    twin.grid(False)
    twin.spines["right"].set_visible(True)


def round_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from ``low`` to ``high`` for a logarithmic scale."""
    ticks: list[float] = []
    for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), ()):
        candidates = [m * 10.0**power for power in range(-12, 13) for m in mantissas]
        candidates = candidates or MaxNLocator(6).tick_values(low, high)
        ticks = [tick for tick in candidates if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks


def plain(value: float) -> str:
    """Return a number for a tick, without needless digits: 1,000, 0.05, 1e+09."""
    return f"{value:,.10g}" if value < 1e6 else f"{value:g}"


def write_plots(folder: Path, plots: Sequence[Plot]) -> list[Path]:
    """Write the files of ``plots`` into ``folder`` and return their paths.

    All files are written under temporary names before the first file is renamed.

    Raises:
        OSError: the disk refuses; no half-written file stays.
    """
    contents = {name: data for plot in plots for name, data in plot.files().items()}
    if not contents:
        return []
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / name: data for name, data in contents.items()}
    try:
        write_together(files)
    except BaseException:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return list(files)
