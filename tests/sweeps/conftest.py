from __future__ import annotations

from pathlib import Path

import pytest

from tests.sweeps._clusters import sweep_of_four


@pytest.fixture(scope="session")
def local_four(tmp_path_factory, small_data_dir) -> Path:
    """The study of four tiny runs, on this machine: what every executor must equal."""
    return sweep_of_four(tmp_path_factory.mktemp("local"), small_data_dir)
