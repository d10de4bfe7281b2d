"""A core component whose every test was skipped fails the suite, in one process and over workers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.core("loader")
def test_one(): pytest.skip("no data")

@pytest.mark.core("loader")
def test_two(): {two}
"""


@pytest.mark.parametrize(
    ("two", "workers", "status"),
    [
        pytest.param(
            "pytest.skip('no data')",
            ["-p", "xdist", "-n", "2", "--dist", "loadfile"],
            1,
            marks=pytest.mark.slow,
        ),
        ("pytest.skip('no data')", [], 1),
        ("pass", [], 0),
    ],
    ids=["all skipped by workers", "all skipped", "one skipped"],
)
def test_a_component_whose_every_test_was_skipped_fails_the_suite(tmp_path, two, workers, status):
    (tmp_path / "tests").mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = core(name): x\n    gpu: x\n")
    for name, text in (("test_a", TESTS.format(two=two)), ("test_b", "def test_three(): pass")):
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # no plugin but those named here
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=alone)
    assert found.returncode == status, found.stdout
    assert ("every test of these core components was skipped: loader" in found.stdout) == bool(status)
