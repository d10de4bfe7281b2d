"""The harness: trains, measures and compares couplers.

``bench.load(study)`` and ``bench.history(study)`` return a study as pandas data frames.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

if sys.argv[:1] == ["-m"]:  # Python is about to import a command, which takes seconds
    from bench.interruption import guard

    guard()

# Threads that wait for each other sleep instead of spinning: on a machine that has other work too a
# training step is then 2.4 times faster, on an idle one 3 % slower. Set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(study: str | Path, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return one row per run of a study: see ``bench.report.frames.load``."""
    return importlib.import_module("bench.report.frames").load(study, results_dir)


def history(study: str | Path, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return one row per step and evaluation of a study: see ``bench.report.frames.history``."""
    return importlib.import_module("bench.report.frames").history(study, results_dir)
