"""``python -m bench.tune``: the largest batch that fits into a memory budget, and the knee in its speed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import DataConfig, MemoryConfig, ModelConfig, PlacesConfig, RunConfig, TrainingConfig

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(kw_only=True)
class TuneConfig:
    """Try batch sizes with full training steps; print each trial, the largest that fits and the knee.

    Nothing is trained or written but the answer, which is kept for the next time. Exit status: 0 found,
    1 nothing fits, 2 wrong input.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    places: PlacesConfig = field(default_factory=PlacesConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Search for the config that the flags name; return the exit status."""
    config = parse(TuneConfig, argv, prog="python -m bench.tune", presets=True)
    show_warnings_plainly()
    from rich.console import Console

    console = Console(highlight=False)
    try:
        memory = replace(
            config.memory, tune_batch_size=not config.memory.fit_shape, micro_batch_size=None, tune_init=None
        )  # any size may be the first here
        run = RunConfig(model=config.model, data=config.data, training=config.training, memory=memory,
                        places=config.places)  # fmt: skip
        return _search(run, config.memory.tune_init, console)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _search(config: RunConfig, init: int | None, console: Console) -> int:
    from rich.console import Console

    from bench.analysis.fit_table import print_fit
    from bench.analysis.search_table import print_search
    from bench.device import keep_freed_memory
    from bench.fitting import find_shape
    from bench.prepare import prepare
    from bench.training.batch_size import Trial
    from bench.tuning import FAILURES, tune

    keep_freed_memory()
    progress = Console(stderr=True, highlight=False, markup=False)

    def shown(trial: Trial) -> None:
        if not config.places.quiet:
            progress.print(f"  {trial.size} at once: {trial.failure or 'fits'} ({trial.seconds:.1f} s)")

    if not config.places.quiet:
        progress.print("loading the data …")
    prepared = prepare(config)
    if not config.places.quiet:
        progress.print("trying batch sizes …")
    if config.memory.fit_shape:
        found, failure = find_shape(prepared, None, progress.print)
        if failure is not None:
            print(f"error: {failure}", file=sys.stderr)
            return 1
        print_fit(found, console)
        return 0
    try:
        found = tune(prepared, on_trial=shown, say=progress.print, any_size=True, init=init)
    except FAILURES as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    print_search(found, config.training.batch_size, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
