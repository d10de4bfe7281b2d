"""What a check says, and what all of them say together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.device import is_out_of_memory
from gnnmoe.process_state import ProcessStateChanged, unchanged_state


class CheckFailed(Exception):
    """Raised by a check that found something wrong; the text says what."""


@dataclass(frozen=True)
class Check:
    """The verdict of one check."""

    name: str
    passed: bool
    detail: str
    """One sentence or two: what was tried, or what was wrong."""
    seconds: float
    reused_from: str | None = None
    """The run that made this check, where it was not made anew (``bench.run.leak_check``)."""


@dataclass(frozen=True)
class GateReport:
    """The verdicts of all checks, in the order in which they ran."""

    checks: list[Check]

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether every check passed, and there was one."""
        return bool(self.checks) and not self.failures

    def to_record(self) -> dict[str, Any]:
        """Return ``{"passed": …, "checks": {name: {"passed", "detail", "seconds"}}}`` for JSON.

        A check that was not made anew has 0 seconds and ``reused_from``, the run that made it.
        """
        entries = {check.name: asdict(check) for check in self.checks}
        for entry in entries.values():
            del entry["name"]
            if entry["reused_from"] is None:
                del entry["reused_from"]
        return {"passed": self.passed, "checks": entries}


def run_check(name: str, body: Callable[[], str]) -> Check:
    """Run ``body``, which returns the detail of a pass, and raises where the check fails.

    What is under test is a stranger's code, so whatever it raises is a failure, not a crash; but for
    running out of memory, which comes out again.
    """
    start = time.perf_counter()
    try:
        with unchanged_state("the coupler"):
            passed, detail = True, body()
    except (CheckFailed, ProcessStateChanged) as failure:
        passed, detail = False, str(failure)
    except Exception as error:
        if is_out_of_memory(error):
            raise  # that says something about the machine, not about the coupler
        passed, detail = False, f"it raised {type(error).__name__}: {error}"
    return Check(name, passed, detail, time.perf_counter() - start)
