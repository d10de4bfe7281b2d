"""``python -m bench.check --coupler NAME``: test a coupler for leaks, and describe what it computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import ModelConfig, Seed, flags
from bench.help import Help
from bench.interruption import interruptible
from bench.screen import guard_screen
from gnnmoe.config import Refused

if TYPE_CHECKING:
    from rich.console import Console

    from bench.check.show import CheckedCoupler
    from gnnmoe.config import GNNMoEConfig

ANY_VOCABULARY = 64  # the models of the leak check are small, and no coupler sees the vocabulary
ABOUT = Help(
    usual=(
        "coupler_type coupler_option all num_experts embed_dim hgnn_conv_type static_hyperedge_strategy seed"
    ).split(),
    examples=("--coupler HGNN", "--coupler examples/twenty_line_coupler.py:NormCoupler", "--all"),
)


@flags
class CheckConfig:
    """Check on small tensors that a coupler leaks nothing and computes what it says, and describe it.

    Exit status: 0 passed, 1 a check failed or flops() is wrong, 2 wrong input.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    seed: Seed = 0
    """Seed of the numbers that the checks draw."""
    all: bool = False
    """Check every coupler: HGNN with each conv type (on all_pairs) and each strategy (in HypergraphConv),
    whatever the flags for these two say. The coupler that --coupler names is checked too."""
    list: bool = False
    """List couplers, hypergraph layers and hyperedge strategies, one line each, and stop."""


@interruptible("a check keeps nothing.")
def main(argv: Sequence[str] | None = None) -> int:
    """Check the coupler that the flags name, or all couplers; print the verdicts, return the exit status."""
    guard_screen()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--list" in arguments:
        from bench.check.listing import print_list

        return print_list()
    config = parse(CheckConfig, arguments, prog="python -m bench.check", presets=True, about=ABOUT)
    show_warnings_plainly()
    from rich.console import Console

    model, console = config.model.resolved(ANY_VOCABULARY), Console(highlight=False)
    try:
        return (check_all if config.all else check_one)(model, config.seed, console)
    except Refused as error:
        fail(str(error))


def check_one(model: GNNMoEConfig, seed: int, console: Console) -> int:
    """Check the coupler that ``model`` names; print its checks and portrait, and return the exit status.

    Raises:
        Refused: there is no such coupler, strategy or option.
    """
    from bench.check.leak_check import refuse_wrong_names
    from bench.check.show import show_one
    from bench.device import is_out_of_memory

    refuse_wrong_names(model)
    refuse_too_large_to_check(model)
    try:
        row = checked(model.coupler_type, model, seed)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fail("memory ran out, so nothing is known of the coupler; check it at a smaller width or length.")
    show_one(row, model, console)
    return 0 if row.passed else 1


def check_all(model: GNNMoEConfig, seed: int, console: Console) -> int:
    """Check every coupler at the sizes of ``model``; print one table and return the exit status.

    Raises:
        Refused: ``model`` names a coupler, strategy or option that does not exist.
    """
    from rich.console import Console

    from bench.check.leak_check import list_couplers, refuse_wrong_hypergraph
    from bench.check.show import show_all

    refuse_too_large_to_check(model)
    refuse_wrong_hypergraph(model)  # names that the flags give and no entry has
    entries, left_out = list_couplers(model)
    rows: list[CheckedCoupler] = []
    with Console(stderr=True).status("checking …") as status:
        for number, entry in enumerate(entries, start=1):
            status.update(f"checking {entry.name} ({number} of {len(entries)}) …")
            rows.append(checked(entry.name, entry.config, seed))
    show_all(rows, left_out, console)
    return 0 if all(row.passed for row in rows) else 1


def refuse_too_large_to_check(model: GNNMoEConfig) -> None:
    """Refuse a coupler whose parameters fill the memory, with the layer of float64 experts that is checked.

    Raises:
        Refused: naming what it needs and what there is.
    """
    import torch

    from bench.device import refuse_too_large
    from gnnmoe.cost import least_training_bytes

    built = replace(model, num_layers=1, max_seq_length=1, vocab_size=ANY_VOCABULARY)
    needed = least_training_bytes(built) // 2  # float64, without gradients: half of a training step
    refuse_too_large(needed, torch.device("cpu"), "a check of this model", lower=("embed_dim", "num_experts"))


def checked(name: str, model: GNNMoEConfig, seed: int) -> CheckedCoupler:
    """Return the report and the portrait of a coupler, or the reason why there is no portrait."""
    from bench.check.leak_check import run_leak_check
    from bench.check.mixing import NoMixing
    from bench.check.portrait import draw_portrait
    from bench.check.show import CheckedCoupler
    from bench.check.subject import CheckFailed

    report = run_leak_check(model, seed=seed)
    try:
        portrait = draw_portrait(model, seed=seed)
    except (CheckFailed, NoMixing) as reason:
        portrait = str(reason)
    except Exception as error:  # the coupler may be anybody's
        portrait = f"it raised {type(error).__name__}: {error}"
    return CheckedCoupler(name, report, portrait)


if __name__ == "__main__":
    sys.exit(main())
