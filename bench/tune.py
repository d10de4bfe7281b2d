"""``python -m bench.tune``: the largest batch that fits into a memory budget, and the knee in its speed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field, replace

import tyro

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import MeasureConfig, MemoryConfig, RunConfig, flags
from gnnmoe.config import Refused

OF_A_RUN = ("control_memory", "micro_batch_size", "tune_fallback")  # flags that say how to train


@flags
class TuneConfig(RunConfig):
    """Try batch sizes with full training steps; print each trial, the largest that fits and the knee.

    Nothing is trained or written but the answer, which is kept for the next time. Exit status: 0 found,
    1 nothing fits, 2 wrong input.
    """

    measure: tyro.conf.Suppress[MeasureConfig] = field(default_factory=MeasureConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Search for the config that the flags name; return the exit status."""
    config = parse(TuneConfig, argv, prog="python -m bench.tune", presets=True)
    show_warnings_plainly()
    try:
        memory = _switched_on(config.memory)
        return _search(replace(config, memory=replace(memory, tune_init=None)), memory.tune_init)
    except Refused as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _switched_on(memory: MemoryConfig) -> MemoryConfig:
    """Return the flags of a search, which the command asks for by itself; any size may be the first.

    Raises:
        Refused: a flag would do nothing here.
    """
    from bench.memory_checks import refuse_wrong_flags

    given = [f"--{name.replace('_', '-')}" for name in OF_A_RUN if getattr(memory, name)]
    if given:
        raise Refused(f"bench.tune trains nothing, so that it has no use for {' and '.join(given)}; "
                         "keep that for bench.run, and drop it here.")  # fmt: skip
    memory = replace(memory, tune_batch_size=memory.tune_batch_size or not memory.fit_shape)
    refuse_wrong_flags(memory)
    return memory


def _search(config: RunConfig, init: int | None) -> int:
    from rich.console import Console

    from bench.analysis.fit_table import print_fit
    from bench.analysis.search_table import print_search
    from bench.device import keep_freed_memory
    from bench.fitting import find_shape
    from bench.prepare import prepare
    from bench.training.batch_size import Trial
    from bench.tuning import FAILURES, tune

    keep_freed_memory()
    console = Console(highlight=False)
    progress = Console(stderr=True, highlight=False, markup=False, quiet=config.places.quiet)

    def shown(trial: Trial) -> None:
        progress.print(f"  {trial.size} at once: {trial.failure or 'fits'} ({trial.seconds:.1f} s)")

    progress.print("loading the data …")
    prepared = prepare(config)
    progress.print("trying batch sizes …")
    try:
        if config.memory.fit_shape:
            found, failure = find_shape(prepared, None, progress.print)
            if failure is not None:
                raise failure
            print_fit(found, console)
        else:
            found = tune(prepared, on_trial=shown, say=progress.print, any_size=True, init=init)
            print_search(found, config.training.batch_size, console)
    except FAILURES as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
