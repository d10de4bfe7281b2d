"""The user's settings of matplotlib never keep a picture from being drawn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = "import bench.report.plots.style; from matplotlib import rcParams; print(rcParams['font.size'])"


def test_a_matplotlibrc_that_is_not_utf_8_is_left_out_with_a_note(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"font.size: 7\nfont.family: caf\xe9\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MPLBACKEND": "nonsense"}
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.stdout == "10.0\n", said.stderr
    assert "your settings of matplotlib are left out: 'utf-8' codec can't decode" in said.stderr
