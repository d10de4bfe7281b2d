"""A page of a report, parsed."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

CHARTS = re.compile(r'<script type="application/json" id="charts">(.*?)</script>', re.DOTALL)
VOID = set("meta link input br img".split())


class Page(HTMLParser):
    """A page as a flat list of elements, with the text within each."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.feed(html)
        assert not self.open, f"not closed: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs}, list(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag: str, within: Element | None = None) -> list[Element]:
        return [one for one in self.elements if one.tag == tag and (within is None or within in one.parents)]

    def by_id(self, name: str) -> Element:
        [found] = [element for element in self.elements if element.attributes.get("id") == name]
        return found

    def rows(self, table: str) -> list[list[Element]]:
        """The cells of the rows of a table, without those that unfold."""
        head = self.by_id(f"table-{table}")
        rows = [row for row in self.all("tr", head) if row.attributes.get("class") != "more"][1:]
        by_row = {id(row): [] for row in rows}
        for cell in self.elements:
            if cell.tag in ("td", "th") and cell.parents and id(cell.parents[-1]) in by_row:
                by_row[id(cell.parents[-1])].append(cell)
        return list(by_row.values())


@dataclasses.dataclass(eq=False)
class Element:
    tag: str
    attributes: dict[str, str]
    parents: list[Element]
    text: str = ""

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def charts_of_page(html: str) -> list[Any]:
    """Return the data of the charts that a page holds, by section."""
    found = CHARTS.search(html)
    assert found
    return json.loads(found[1])


def table_of_page(page: Page, name: str) -> list[dict[str, str]]:
    """Return the rows of the csv that a page offers for a table."""
    [link] = [a for a in page.all("a") if a.attributes.get("download") == f"{name}.csv"]
    kind, data = link.attributes["href"].split(";base64,")
    assert kind == "data:text/csv"
    return list(csv.DictReader(io.StringIO(base64.b64decode(data).decode())))
