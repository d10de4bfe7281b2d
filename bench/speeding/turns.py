"""Several things timed in turn in one process; one that fails leaves the others alone."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.device import is_out_of_memory, recover
from bench.measure.timing import TimedStep, time_in_turn

SLOW_SECONDS = 2.0
"""What takes longer than this is timed once, beside the others."""


@dataclass(frozen=True)
class Contender:
    """One of the things to time."""

    name: str
    make: Callable[[], TimedStep]
    """Builds it and returns its step, so that building may fail too."""
    check: Callable[[Any], None] | None = None
    """Looks at what the first call returned; what it raises is a failure."""


@dataclass
class Turn:
    """What came of one contender."""

    step: TimedStep | None = None
    first_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    slow: bool = False


def in_turn(
    contenders: Sequence[Contender], device: torch.device, *, rounds: int, warmup: int
) -> dict[str, Turn]:
    """Build each and call it once; then time all that came through in ``rounds`` rounds of one step each.

    One that takes over two seconds when it is called again is timed in one round only.
    """
    turns = {contender.name: _first(contender, device) for contender in contenders}
    steps = {name: turn.step for name, turn in turns.items() if turn.step is not None}
    slow = [name for name, turn in turns.items() if turn.slow]
    for name, seconds in timed(steps, slow, device, rounds=rounds, warmup=warmup).items():
        turns[name].seconds = seconds
    return turns


def timed(
    steps: Mapping[str, TimedStep], slow: Collection[str], device: torch.device, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Return the seconds of each step, timed in turn; of the ``slow`` ones from one more round alone."""
    quick = {name: step for name, step in steps.items() if name not in slow}
    found = [time_in_turn(quick, device=device, warmup=warmup, rounds=rounds)] if quick else []
    if len(quick) < len(steps):
        found.append(time_in_turn(steps, device=device, warmup=0, rounds=1))
    return {name: [value for times in found if name in times for value in times[name].seconds]
            for name in steps}  # fmt: skip


def _first(contender: Contender, device: torch.device) -> Turn:
    """Build and call once; what that raises becomes text, and what it held is free again."""
    try:
        step = contender.make()
        start = time.perf_counter()
        result = step(0)
        first = again = _since(start, device)
        if contender.check is not None:
            contender.check(result)
        if first > SLOW_SECONDS:  # which may be imports, or a compilation
            start = time.perf_counter()
            step(0)
            again = _since(start, device)
        return Turn(step, first, slow=again > SLOW_SECONDS)
    except Exception as error:
        failure = failure_text(error)
        traceback.clear_frames(error.__traceback__)
    recover()
    return Turn(error=failure)


def _since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def failure_text(error: Exception) -> str:
    """Return one short line for what was raised."""
    lines = str(error).strip().splitlines() or [""]
    kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
    return f"{kind}: {lines[0]}"[:200]
