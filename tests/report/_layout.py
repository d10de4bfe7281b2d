"""Checks of a drawn figure: every text inside the picture, and none on another one."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench.report.plots.style import DPI, plot_style, settle


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]  # pyright: ignore[reportAttributeAccessIssue]


def check_layout(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawn text leaves the picture or lies on another one, at the resolution of the png."""
    drawn: dict[Text, None] = {}
    real = Text.draw
    with monkeypatch.context() as patch, plot_style():
        settle(figure)
        figure.set_dpi(DPI)
        patch.setattr(Text, "draw", lambda text, renderer: (drawn.update({text: None}), real(text, renderer)))
        figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text().strip()]
    assert len(boxes) > 5
    for text, box in boxes:
        outside = max(-box.x0, -box.y0, box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1)
        assert outside <= 1, f"{text!r} leaves the picture by {outside:.0f} pixels"
    for (one, a), (other, b) in combinations(boxes, 2):
        over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(over) <= 1, f"{one!r} lies on {other!r}"
