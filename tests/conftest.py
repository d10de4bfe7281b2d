"""What all tests share: the real data where it is, tiny data where it is not, and one rule.

The rule: a core component (a coupler, a strategy, the loader, the record) whose every test was
skipped fails the suite, so that a missing part cannot look like a passing one.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny shapes: a second thread only costs
REPOSITORY = Path(__file__).parents[1]

_outcomes: dict[str, set[str]] = defaultdict(set)


@pytest.fixture(autouse=True)
def _no_data_folder_from_outside(monkeypatch):
    monkeypatch.delenv("GNNMOE_DATA_DIR", raising=False)


@pytest.fixture(autouse=True)
def _no_gpu_but_where_marked(request, monkeypatch):
    """A test says what it needs: unmarked ones do the same where there is a GPU as where there is none."""
    if request.node.get_closest_marker("gpu") is None:
        if "torch" in sys.modules:  # importing it here would take two seconds
            monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def _no_cache_from_outside(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNNMOE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def wikitext_dir() -> Path:
    folder = Path(os.environ.get("GNNMOE_TEST_WIKITEXT") or REPOSITORY.parent / "shared" / "wikitext-2")
    if not (folder / "wiki.train.tokens").is_file():
        pytest.skip(f"WikiText-2 is not in {folder}; set GNNMOE_TEST_WIKITEXT to its folder")
    return folder


@pytest.fixture(scope="session")
def small_data_dir(tmp_path_factory) -> Path:
    """A folder of three token files with 40 words: about 2,100, 700 and 700 tokens."""
    folder = tmp_path_factory.mktemp("data")
    for name, articles in (("train", 30), ("valid", 10), ("test", 10)):
        lines = []
        for article in range(articles):
            words = [f"w{(article * 7 + k * k) % 40}" for k in range(60)]
            lines += [" \n", f" = Title w{article % 40} = \n", " \n", " " + " ".join(words) + " <unk> \n"]
        (folder / f"wiki.{name}.tokens").write_text("".join(lines), encoding="utf-8")
    return folder


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is imported stays, and need not be looked through again in each test


def pytest_configure(config: pytest.Config) -> None:
    _outcomes.clear()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    report.core = [mark.args[0] for mark in item.iter_markers("core")]  # travels from a worker of xdist


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome == "skipped":
        for name in getattr(report, "core", []):
            _outcomes[name].add(report.outcome)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workerinput"):
        return  # one of several workers saw a part only
    skipped = sorted(name for name, found in _outcomes.items() if found == {"skipped"})
    if skipped and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nevery test of these core components was skipped: {', '.join(skipped)}")
