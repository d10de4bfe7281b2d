"""Hypotheses: stated before the runs, in ``hypotheses.toml``, and answered by the report.

::

    [[hypothesis]]
    statement = "HGNN all_triplets is at least 1 % better than GNN at equal parameters"
    better = { coupler = "HGNN", static_hyperedge_strategy = "all_triplets" }
    than = { coupler = "GNN" }
    by = 0.01

``better`` and ``than`` select runs by their flags. Each must select at least one configuration of the sweep.
``by`` is the share by which the ``quantity`` must be better, 0 by default. The quantity is the perplexity
(lower is better), the tokens_per_second, or the peak_memory of a training step (lower is better).

For a quantity of the experts (``OF_EXPERTS``) ``higher`` stands in place of ``better``: the runs in which the
quantity is higher by the hypothesis, by at least ``by`` in its own unit. Before its first run, a sweep writes
the hypotheses and the time into ``hypotheses.json`` in the study's folder.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.config import FlagTable, by_field, complete, run_flags
from bench.files import (
    DAMAGE_LETTERS,
    cannot_write,
    kind_of,
    not_linked_out,
    read_json,
    read_toml,
    refusals_name,
    utc_now,
    write_whole,
)
from gnnmoe.config import Refused, brief, unknown_name

RATIOS = ("perplexity", "tokens_per_second", "peak_memory")
"""Quantities of which one direction is better; two runs are compared by their ratio."""
OF_EXPERTS = (
    "expert_cosine", "expert_cka", "effective_rank", "ablation_nats", "mutual_information",
    "effective_experts",
)  # fmt: skip
"""Quantities of which no direction is better; two runs are compared by their difference."""
QUANTITIES = (*RATIOS, *OF_EXPERTS)
STATED = "hypotheses.json"
ALPHA = 0.05
"""The rate at which a family of comparisons may find a difference where there is none."""


@dataclass(frozen=True)
class Hypothesis:
    """One statement about a study that its records can support or refute."""

    statement: str
    better: FlagTable
    """Flags, by field, of the runs that are better by the hypothesis; for ``OF_EXPERTS``, that are higher."""
    than: FlagTable
    """Flags, by field, of the runs with which they are compared."""
    by: float = 0.0
    """The least difference: a share for ``RATIOS``, else in the quantity's unit."""
    quantity: str = "perplexity"

    @property
    def first_key(self) -> str:
        """The key of the first side in a file: better, or higher."""
        return _first_key(self.quantity)

    def to_table(self) -> dict[str, Any]:
        """Return the hypothesis as a file states it."""
        return {(self.first_key if key == "better" else key): value for key, value in asdict(self).items()}


def load_hypotheses(path: Path) -> list[Hypothesis]:
    """Return the hypotheses of a TOML file.

    Raises:
        Refused: naming the file, the hypothesis and the key, what is wrong and what is allowed.
    """
    entries = read_toml("hypotheses", path)
    with refusals_name(f"hypotheses {path}"):
        unknown = set(entries) - {"hypothesis"}
        if unknown:
            raise Refused(unknown_name("key", min(unknown), ["hypothesis"]))
        return read_hypotheses(entries.get("hypothesis"))


def hypotheses_of(entry: Any, folder: Path) -> list[Hypothesis]:
    """Return the hypotheses of a sweep file, which states them or names a file (from its own folder).

    Raises:
        Refused: as ``load_hypotheses``.
    """
    if entry is None:
        return []
    return load_hypotheses(folder / entry) if isinstance(entry, str) else read_hypotheses(entry)


def read_hypotheses(tables: Any) -> list[Hypothesis]:
    """Return the hypotheses that a list of tables states.

    Raises:
        Refused: as ``load_hypotheses``.
    """
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise Refused("there are none; each begins with the heading [[hypothesis]].")
    found = []
    for number, table in enumerate(tables, 1):
        with refusals_name(f"hypothesis {number}"):
            found.append(_hypothesis(table))
    return found


def check_against(hypotheses: Sequence[Hypothesis], configurations: Sequence[FlagTable]) -> None:
    """Refuse hypotheses that a study with these configurations (plain flags by field) cannot answer.

    Raises:
        Refused: naming the hypothesis and the side that selects no run, or the run on both sides.
    """
    values = [complete(flags) for flags in configurations]
    for number, hypothesis in enumerate(hypotheses, 1):
        sides = {hypothesis.first_key: hypothesis.better, "than": hypothesis.than}
        chosen = {side: [v for v in values if selects(flags, v)] for side, flags in sides.items()}
        for side, some in chosen.items():
            if not some:
                raise Refused(f"hypothesis {number}: {side} = {sides[side]} selects no run of the sweep.")
        if any(value in chosen["than"] for value in chosen[hypothesis.first_key]):
            raise Refused(f"hypothesis {number}: a run is on both sides; select more closely.")


def state(hypotheses: Sequence[Hypothesis], study: Path) -> None:
    """Write the hypotheses with the time into the study's folder; unchanged hypotheses keep their time.

    If the hypotheses have changed, the old file is kept as ``hypotheses.1.json``.

    Raises:
        Refused: the folder cannot be written.
    """
    path = study / STATED
    try:
        if not hypotheses or (kind_of(path) and stated(study)[0] == list(hypotheses)):
            return
        if kind_of(path):
            number = next(n for n in itertools.count(1) if not kind_of(path.with_suffix(f".{n}.json")))
            path.rename(path.with_suffix(f".{number}.json"))
        now = utc_now()
        text = json.dumps({"stated": now, "hypotheses": [found.to_table() for found in hypotheses]}, indent=2)
        write_whole(path, f"{text}\n".encode())
    except OSError as error:
        raise Refused(cannot_write(path, error)) from error


def stated(study: Path) -> tuple[list[Hypothesis], str | None]:
    """Return the hypotheses in the study's folder, and the time at which they were stated.

    Raises:
        Refused: the file cannot be read.
    """
    path = not_linked_out(study, STATED)
    if kind_of(path) is None:
        return [], None
    kept = read_json(path)
    with refusals_name(f"{path} is damaged; a sweep writes it anew if you delete it", DAMAGE_LETTERS):
        if not isinstance(kept, dict) or not isinstance(kept.get("stated"), str):
            raise Refused("it does not say when the hypotheses were stated.")
        return read_hypotheses(kept.get("hypotheses")), kept["stated"]


def selects(flags: FlagTable, values: FlagTable) -> bool:
    """Return whether ``flags`` select a run that has these values of all flags."""
    return all(values[name] == value for name, value in flags.items())


def _first_key(quantity: str) -> str:
    return "higher" if quantity in OF_EXPERTS else "better"


def _hypothesis(table: FlagTable) -> Hypothesis:
    quantity = table.get("quantity", QUANTITIES[0])
    if quantity not in QUANTITIES:
        raise Refused(unknown_name("quantity", quantity, QUANTITIES))
    first = _first_key(quantity)
    needed = ("statement", first, "than")
    for key in table:
        if key not in (*needed, "by", "quantity"):
            raise Refused(unknown_name("key", key, (*needed, "by", "quantity")))
    missing = [key for key in needed if key not in table]
    if missing:
        raise Refused(f"{' and '.join(missing)} missing; it needs {', '.join(needed)}.")
    statement, by = table["statement"], table.get("by", 0.0)
    if not isinstance(statement, str) or not statement.strip():
        raise Refused(f"statement is {brief(statement)}; it must be a sentence.")
    most = 1 if quantity in RATIOS else math.inf
    if isinstance(by, bool) or not isinstance(by, int | float) or not 0 <= by < most:
        what = "a share, from 0 to less than 1 (0.01 is one percent)" if most == 1 else "a number, 0 or more"
        raise Refused(f"by is {brief(by)}; it must be {what}.")
    sides = {side: _selection(side, table[side]) for side in (first, "than")}
    return Hypothesis(statement.strip(), sides[first], sides["than"], float(by), quantity)


def _selection(side: str, table: Any) -> FlagTable:
    if not isinstance(table, dict) or not table:
        raise Refused(
            f'{side} is {brief(table)}; it must be a table of flags, such as {{ coupler = "GNN" }}.'
        )
    with refusals_name(side):
        values, names = by_field(table, run_flags())
        return {name: run_flags()[name].plain(value, names[name]) for name, value in values.items()}


def seeds_needed(comparisons: int) -> int:
    """Return the number of paired seeds with which a sign-flip test can find a difference at all.

    The two-sided p of n paired seeds is at least 2 / 2ⁿ. By Holm or Bonferroni the smallest p of m
    comparisons must be at most 0.05 / m. So n is the smallest whole number with
    n ≥ 1 + log₂(m / 0.05): 6 seeds for one comparison, 7 for 3, 10 for 13 to 25.
    """
    return math.ceil(1 + math.log2(comparisons / ALPHA))
