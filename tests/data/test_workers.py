"""Ctrl-C goes to the whole process group: the workers of a loader leave it to the parent."""

from __future__ import annotations

import os
import signal
import time

import pytest

from bench.data.loader import create_loader

pytestmark = pytest.mark.core("loader")


def test_a_worker_survives_ctrl_c(make_corpus):
    """Also between two passes, since it lives on."""
    loader = create_loader(make_corpus(40), "val", 4, max_seq_length=2, num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(2):
        os.kill(worker.pid, signal.SIGINT)
        time.sleep(0.05)
        assert len([*batches]) in (4, 5)
        batches = iter(loader)
    assert worker.is_alive()
