"""One run over several devices: torchrun starts a process a device, and its end is told as a run's own.

torchrun ends with status 1 whatever ended its processes, and adds pages of its own to their output, with the
name of the host. A sweep judges a run by its exit status and its last lines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

ITS_LOG = re.compile(r"[IWE]\d{4} [\d:.]+ \d+ \S*torch/distributed/")
ITS_TRACEBACK = re.compile(r'  File ".*torch/distributed/run\.py", line \d+, in <module>')
ROOT_CAUSE, EXIT_CODE = "Root Cause (first observed failure):", re.compile(r"  exitcode  : (-?\d+) ")
SIGNAL = re.compile(r".*\bSignalException: Process \d+ got signal: (\d+)")


def launcher(processes: int) -> tuple[str, ...]:
    """Return the command that starts a run of so many processes, without the run's flags."""
    run = ("-m", "bench.run")
    if processes == 1:
        return (sys.executable, *run)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return (sys.executable, *torchrun, *run)


def as_one_process(exit_status: int, lines: Sequence[str]) -> tuple[int, list[str]]:
    """Return the exit status of the process that ended first, or of torchrun's own signal, and their output.

    What torchrun did not start stays as it is.
    """
    kept = [line for line in lines if not ITS_LOG.match(line)]
    starts = [number for number, line in enumerate(kept) if ITS_TRACEBACK.match(line)]
    if not starts:
        return exit_status, kept
    start = starts[-1]
    while start > 0 and not kept[start].startswith("Traceback (most recent call last):"):
        start -= 1
    kept, report = kept[:start], kept[start:]
    if (ended := [found for line in report if (found := SIGNAL.match(line))]) and exit_status == 1:
        return -int(ended[-1][1]), kept
    if ROOT_CAUSE in report and exit_status == 1:
        codes = [found for line in report[report.index(ROOT_CAUSE) :] if (found := EXIT_CODE.match(line))]
        return (int(codes[0][1]) if codes else exit_status), kept
    return exit_status, kept
