"""The look of every plot, and its files: a colour per coupler, header, axes, deterministic svg and png."""

from __future__ import annotations

import csv
import hashlib
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
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from bench.files import write_together
from bench.record import Record, is_measured
from bench.report.quantities import share, unknown_words_share

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, LIGHT = "#CC79A7", "#56B4E9", "#666666", "#bbbbbb"
LINE_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "black")
LINE_STYLES = ("-", "--", ":", "-.")
COUPLERS = {
    "mean": ("black", "o"),
    "mean_linear": ("#8a8a8a", "h"),
    "gate": (BLUE, "^"),
    "topk": (SKY, "v"),
    "attention": (PURPLE, "P"),
    "GNN": (GREEN, "D"),
    "HGNN": (VERMILLION, "s"),
    "dense": (ORANGE, "*"),
    "static": ("#8c564b", "p"),
}
"""The colour and the marker of each coupler of the project, in every picture."""
OTHER_COLOURS = ("#882255", "#44AA99", "#999933", "#332288", "#661100", "#AA4499", "#117733")
OTHER_MARKERS = ("X", "d", "<", ">", "H")
"""The colours and markers of couplers from elsewhere, which the name of the coupler chooses."""

ENDINGS = ("svg", "png", "csv")
DPI = 150
MAX_PIXELS = 20_000
"""The most pixels of a side of the png; Agg refuses 65,536."""
MAX_NATS = 25
"""Above this loss, perplexity has no readable scale."""
TITLE_SIZE, NOTE_SIZE, NAME_LENGTH = 11, 8, 54
LABEL_POINTS = 8.5
"""The height of a line of text of 7 points."""
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
class Look:
    """The colour and the marker of a coupler; variants of the coupler differ in line style and filling."""

    colour: str
    marker: str
    line: str = "-"
    fill: Any = "full"

    @classmethod
    def of(cls, coupler: str, variant: int = 0) -> Look:
        """Return the look of the ``variant``-th configuration of a coupler; a class in a file by its name."""
        name = coupler.rpartition(":")[2]
        digest = hashlib.sha256(name.encode()).digest()
        other = OTHER_COLOURS[digest[0] % len(OTHER_COLOURS)], OTHER_MARKERS[digest[1] % len(OTHER_MARKERS)]
        fill = ("full", "none", "left", "top", "right", "bottom")[variant % 6]
        return cls(*COUPLERS.get(name, other), LINE_STYLES[variant % 4], fill)

    def of_line(self) -> dict[str, Any]:
        """Return the settings of a line."""
        return {"color": self.colour, "linestyle": self.line}

    def of_marker(self, size: float = 6) -> dict[str, Any]:
        """Return the settings of the markers of a line."""
        large = {"*": 1.5, "P": 1.15, "X": 1.15}.get(self.marker, 1.0)
        return {
            "marker": self.marker,
            "markersize": size * large,
            "fillstyle": self.fill,
            "markerfacecolor": "white" if self.fill == "none" else self.colour,
            "markerfacecoloralt": "white",
            "markeredgecolor": self.colour,
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
        names = [f"{self.name}.{ending}" for ending in ENDINGS]
        return dict(zip(names, (self.drawing("svg"), self.drawing("png"), self.data()), strict=True))

    def drawing(self, ending: str) -> bytes:
        """Return the contents of the svg or the png; its metadata hold ``mark()``."""
        drawn, about = io.BytesIO(), self.mark()
        FigureCanvasAgg(self.figure)
        with plot_style():
            settle(self.figure)
            if ending == "svg":
                self.figure.savefig(drawn, format="svg", metadata={"Date": None, "Description": about})
            else:
                dpi = min(DPI, MAX_PIXELS / max(self.figure.get_size_inches()))
                self.figure.savefig(drawn, format="png", dpi=dpi, metadata={"Description": about})
        return drawn.getvalue()

    def data(self) -> bytes:
        """Return the contents of the csv, without drawing."""
        table = io.StringIO(newline="")
        csv.writer(table, lineterminator="\n").writerows([self.columns, *self.rows])
        return table.getvalue().encode()

    def mark(self) -> str:
        """Return the text by which a drawing names its data: the sha256 of its rows, to 6 digits."""
        rows = [
            [f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row] for row in self.rows
        ]
        return f"data sha256 {hashlib.sha256(repr([*self.columns, rows]).encode()).hexdigest()}"


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


def headed_figure(
    subject: str, about: str, warnings: Sequence[str], width: float, height: float, note: str = ""
) -> Figure:
    """Return an empty figure of ``width`` × ``height`` inches below a header of these texts.

    ``subject`` is the question or the answer, ``about`` names corpus and n in one line, and ``note`` says how
    to read the picture.
    """
    points = 72 * (width - 0.2)
    lines = [(text, "black", "bold", TITLE_SIZE) for text in wrap(printable(subject), points, "bold")]
    about = fitting(printable(about), points)
    lines += [(about, "black", "normal", NOTE_SIZE)] * bool(about)
    lines += [(text, "#444444", "normal", NOTE_SIZE) for text in wrap(note, points, size=NOTE_SIZE)]
    warned = wrap(" · ".join(warnings), points, "bold", NOTE_SIZE)
    lines += [(text, VERMILLION, "bold", NOTE_SIZE) for text in warned]
    header = sum(size for *_, size in lines) * 1.4 / 72 + 0.14
    total = height + header
    figure = Figure(figsize=(width, total), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, height / total))  # pyright: ignore
    top = 0.06
    for text, colour, weight, size in lines:
        figure.text(
            0.08 / width, 1 - top / total, text, va="top", fontsize=size, color=colour, fontweight=weight
        )
        top += size * 1.4 / 72
    return figure


def shorten(text: str, length: int = NAME_LENGTH) -> str:
    """Return ``text``; if it is longer than ``length``, its end is replaced by "…"."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def fitting(text: str, points: float, size: int = NOTE_SIZE) -> str:
    """Return ``text`` in one line of at most ``points``; a longer text ends with "…"."""
    lines = wrap(text, points, size=size)
    return text if len(lines) < 2 else f"{lines[0][:-2]}…"


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


def corpus_words(record: Record) -> str:
    """Return the corpus and the tokenizer in words: wikitext-2-v1 (bpe:4000)."""
    data = record.data
    return f"{data.config_name or data.name} ({data.tokenizer})" if is_measured(data) else ""


def step_axis(axes: Axes, steps: Sequence[int], margin: float = 0.0) -> None:
    """Label the x axis as steps, from 0 to the last of ``steps`` plus ``margin``, with whole numbers only."""
    axes.set_xlabel("step")
    axes.set_xlim(0, max(steps) * (1 + margin))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def count_axis(axes: Axes, noun: str, last: float) -> None:
    """Label the x axis as a count of ``noun`` from 0 to ``last``, in thousands, millions, ..."""
    units = {1e12: "10¹²", 1e9: "10⁹", 1e6: "millions", 1e3: "thousands"}
    unit = next((unit for unit in units if last >= 2 * unit), 1.0)
    axes.set_xlim(0, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value / unit)))
    axes.set_xlabel(f"{noun} ({units[unit]})" if unit in units else noun)


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


def lay_out(figure: Figure) -> None:
    """Place the panels of a figure now, for labels that need the height of the panels."""
    figure.get_layout_engine().execute(figure)  # pyright: ignore[reportOptionalMemberAccess]


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names beside the ends of lines, moved apart where they would overlap; call ``lay_out`` first.

    ``ends`` are height, name and colour of each line.
    """
    known = sorted(end for end in ends if math.isfinite(end[0]))
    if not known:
        return
    low, high = axes.get_ylim()
    heights = np.clip([(height - low) / (high - low) for height, *_ in known], 0, 1)
    points = axes.get_window_extent().height / axes.figure.dpi * 72
    for height, place, (_, name, colour) in zip(
        heights, spread(heights, LABEL_POINTS / points), known, strict=True
    ):
        look = {"color": colour, "ls": "-", "lw": 0.7, "clip_on": False}
        axes.plot([1.0, 1.03, 1.045], [height, place, place], transform=axes.transAxes, **look)
        axes.text(1.055, place, name, transform=axes.transAxes, va="center", fontsize=7, color=colour)


def spread(wanted: np.ndarray, distance: float) -> np.ndarray:
    """Return places in [0, 1], at least ``distance`` apart and nearest to ``wanted`` (ascending).

    This is a least-squares fit that keeps the order: y_i − i·distance must not fall, which is an isotonic
    regression. If the places do not fit into [0, 1], they stand closer.
    """
    if len(wanted) > 1:
        distance = min(distance, 1 / (len(wanted) - 1))
    offsets = np.arange(len(wanted)) * distance
    return np.clip(isotonic_regression(wanted - offsets).x, 0, 1 - offsets[-1]) + offsets


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
