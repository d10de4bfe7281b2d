"""``python -m bench.tune``: the largest batch that fits into a memory budget, and the knee in its speed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import MemoryConfig, RunConfig, TuneConfig
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from bench.tune.find import Request, Say
    from bench.tune.search import Trial

OF_A_RUN = ("control_memory", "micro_batch_size", "tune_fallback")  # flags that say how to train


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
    from bench.tune.budget import refuse_wrong_flags

    given = [f"--{name.replace('_', '-')}" for name in OF_A_RUN if getattr(memory, name)]
    if given:
        raise Refused(f"bench.tune trains nothing, so that it has no use for {' and '.join(given)}; "
                         "keep that for bench.run, and drop it here.")  # fmt: skip
    memory = replace(memory, tune_batch_size=memory.tune_batch_size or not memory.fit_shape)
    refuse_wrong_flags(memory)
    return memory


def _search(config: RunConfig, start: int | None) -> int:
    from rich.console import Console

    from bench.device import keep_freed_memory
    from bench.training.ranks import ALONE
    from bench.tune.find import find, words_of
    from bench.tune.search import SearchFailed
    from bench.tune.table import print_fit, print_sizes

    keep_freed_memory()
    console = Console(highlight=False)
    progress = Console(stderr=True, highlight=False, markup=False, quiet=config.places.quiet)

    def shown(trial: Trial) -> None:
        progress.print(f"  {trial.shape.rows} at once: {trial.failure or 'fits'} ({trial.seconds:.1f} s)")

    fits = config.memory.fit_shape
    try:
        request = request_of(config, start, progress.print)
        found = find(request, ALONE, progress.print, None if fits else shown)
    except SearchFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    if fits:
        progress.print(words_of(found))
        print_fit(found, console)
    else:
        print_sizes(found, config.training.batch_size, console)
    return 0


def request_of(config: RunConfig, start: int | None, say: Say) -> Request:
    """Return the search, after everything that a run with this config would be refused for."""
    from bench.data.corpus import say_unknown_words
    from bench.gate import refuse_wrong_names
    from bench.training.loaders import load_text, make_loaders, model_for, refuse_curriculum_without_epochs
    from bench.training.ranks import ALONE
    from bench.training.step import Execution
    from bench.tune.budget import refuse_wrong_sizes
    from bench.tune.find import request_for

    say("loading the data …")
    device = Execution.of(config).device
    refuse_wrong_names(config.model.resolved(1))  # before the data are read
    refuse_curriculum_without_epochs(config.training)
    corpus = load_text(config)
    say_unknown_words(corpus.splits)
    model = model_for(config, corpus)
    refuse_wrong_sizes(config, model, device, ALONE)
    loaders = make_loaders(config, corpus, device)
    say("trying batch sizes …")
    return request_for(
        config, model, corpus, device, ALONE, say=say, any_size=not config.memory.fit_shape, start=start,
        epoch_samples=loaders["train"].sampler_obj.samples_in(0),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
