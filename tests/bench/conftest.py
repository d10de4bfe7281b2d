from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m …`` in a child, 80 columns wide, without a data folder from outside."""
    variables = {key: value for key, value in os.environ.items() if key != "GNNMOE_DATA_DIR"}
    variables.update(COLUMNS="80", OMP_NUM_THREADS="1", PYTHONPATH=str(REPOSITORY), **environment)
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=variables, timeout=120
    )


@pytest.fixture(scope="module", autouse=True)
def _garbage_collection_looks_at_new_objects_only():
    """Each trial and each out-of-memory error collects garbage: 0.8 s with all the modules of torch in it."""
    gc.freeze()


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    return command


TINY = (
    "--embed-dim 8 --num-heads 2 --num-layers 1 --max-seq-length 16 --batch-size 4 --max-steps 4"
    " --eval-every 2 --num-eval-samples 8 --warmup-steps 1 --speed-warmup-steps 1 --speed-steps 2 --no-plots"
).split()


@pytest.fixture
def tiny(small_data_dir, tmp_path) -> list[str]:
    """Flags of a run that takes two seconds, on made data, with its results in ``tmp_path``."""
    return [*TINY, "--data-dir", str(small_data_dir), "--results-dir", str(tmp_path / "results")]
