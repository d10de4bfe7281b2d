"""What tables on a terminal have in common: at most 80 columns, and all of their text on narrower ones."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

WIDTH = 80


class PlainTable(Table):
    """A table without lines, 80 columns wide or as wide as the terminal; what is too long is folded."""

    def __init__(self) -> None:
        super().__init__(box=None, padding=(0, 1, 0, 0), show_edge=False, expand=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table, all columns alike where the terminal is narrow."""
        width = min(WIDTH, options.max_width)
        for column in self.columns:
            column.overflow, column.no_wrap = "fold", False
            if width < WIDTH:
                column.ratio = column.width = None
        yield from super().__rich_console__(console, options.update(width=width))
