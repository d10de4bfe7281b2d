"""What a user can get wrong about batch, length and memory, refused before anything is done."""

from __future__ import annotations

import torch

from bench.config import MemoryConfig, RunConfig
from bench.measure.budget import MemoryBudget, parameters_fit, training_state_bytes
from bench.training.micro_batches import accumulations
from bench.training.ranks import ALONE, Ranks
from bench.tuning import batch_sizes
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.model import GNNMoEModel

TUNE, FIT, CONTROL = "tune_batch_size", "fit_shape", "control_memory"  # the switches
USED_BY = {
    "memory_budget": (TUNE, FIT, CONTROL), "memory_target": (TUNE, FIT, CONTROL),
    "tune_mode": (TUNE,), "tune_init": (TUNE,), "tune_max_batch_size": (TUNE, FIT, CONTROL),
    "tune_max_trials": (TUNE, FIT), "tune_max_seconds": (TUNE, FIT), "tune_fallback": (TUNE, FIT),
    "shape_min_length": (FIT, CONTROL), "shape_max_length": (FIT,), "shape_length_step": (FIT,),
}  # fmt: skip


def refuse_wrong_flags(memory: MemoryConfig) -> None:
    """Refuse a budget that is none, a flag that no switch given uses, and sizes above their maximum.

    A flag is given where it differs from its default.

    Raises:
        Refused: naming the flag, and what to add or drop.
    """
    if memory.memory_budget is not None:
        MemoryBudget.parse(memory.memory_budget)  # a wrong value is wrong whatever the switch
    default, unused = MemoryConfig(), []
    for name, switches in USED_BY.items():
        given = getattr(memory, name) != getattr(default, name)
        if given and not any(getattr(memory, switch) for switch in switches):
            *others, last = (f"--{switch.replace('_', '-')}" for switch in switches)
            unused.append(f"{name} is for {', '.join(others)}{' or ' if others else ''}{last}")
    if unused:
        raise Refused(f"{'; '.join(unused)}; add a switch, or drop what would do nothing without it.")
    most = memory.tune_max_batch_size
    for name in ("micro_batch_size", "tune_init"):
        if most is not None and (getattr(memory, name) or 0) > most:
            raise Refused(
                f"{name} is {getattr(memory, name)}, above the tune_max_batch_size of {most}; change one."
            )


def refuse_wrong_sizes(
    config: RunConfig, model: GNNMoEConfig, device: torch.device, ranks: Ranks = ALONE
) -> None:
    """Refuse what cannot be done about batch, length and memory, before anything is.

    Raises:
        Refused: saying what was wrong and what would do.
    """
    memory, full = config.memory, config.model.max_seq_length
    refuse_wrong_flags(memory)
    sizes, world = batch_sizes(config.training), ranks.world_size
    accumulations(sizes, 1, world)
    for name in ("micro_batch_size", "tune_init"):
        if getattr(memory, name) is not None:
            accumulations(sizes, getattr(memory, name), world, name=name)
    if not (memory.tune_batch_size or memory.fit_shape or memory.control_memory):
        return
    if memory.control_memory and config.execution.compile:
        raise Refused("control_memory changes the shape of the steps, and each would be compiled anew: "
                         "drop --compile, or --control-memory.")  # fmt: skip
    if memory.fit_shape and (memory.tune_batch_size or memory.micro_batch_size is not None):
        raise Refused("fit_shape finds the micro-batch: drop tune_batch_size and micro_batch_size, or it.")
    if memory.fit_shape and config.training.curriculum is not None:
        raise Refused("a curriculum orders blocks of one length: drop --fit-shape or --curriculum.")
    shortest, longest = bounds(config)
    if not 1 <= shortest <= full <= longest:
        raise Refused(
            f"shape_min_length {shortest}, max_seq_length {full} and shape_max_length {longest} must rise."
        )
    with torch.device("meta"):
        needed = training_state_bytes(GNNMoEModel(model, seed=0))
    budget = MemoryBudget.parse(memory.memory_budget or "device")
    parameters_fit(budget.resolve(device, ranks.sharing(device)), needed)


def bounds(config: RunConfig) -> tuple[int, int]:
    """Return the shortest and the longest length of a run that may change it."""
    memory, full = config.memory, config.model.max_seq_length
    shortest = max(1, full // 4) if memory.shape_min_length is None else memory.shape_min_length
    return shortest, full if memory.shape_max_length is None else memory.shape_max_length
