"""How much memory a run may use, and what a user can get wrong about batch, length and memory.

The budget is a number of this project's own. ``set_per_process_memory_fraction`` makes a small card
out of a large one, but the total that the device reports stays the large one's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import gcd
from pathlib import Path

import torch
from torch import nn

from bench.config import MemoryConfig, RunConfig
from bench.record import Requested
from bench.training.ranks import ALONE, Ranks
from bench.tune.shape import divisors
from gnnmoe.config import GNNMoEConfig, Refused, unknown_name
from gnnmoe.model import GNNMoEModel

TUNE, FIT, CONTROL = "tune_batch_size", "fit_shape", "control_memory"  # the switches
USED_BY = {
    "memory_budget": (TUNE, FIT, CONTROL), "memory_target": (TUNE, FIT, CONTROL),
    "tune_mode": (TUNE,), "tune_init": (TUNE,), "tune_max_batch_size": (TUNE, FIT, CONTROL),
    "tune_max_trials": (TUNE, FIT), "tune_max_seconds": (TUNE, FIT), "tune_fallback": (TUNE, FIT),
    "shape_min_length": (FIT, CONTROL), "shape_max_length": (FIT,), "shape_length_step": (FIT,),
}  # fmt: skip

UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
WHOLE_DEVICE = "device"
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
ALLOWED = (
    "write an amount with its unit (16GiB, 512MiB, 2.5GB), 'device' for all the memory of the device, "
    "or a share of it in (0, 1], such as 0.5."
)
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class MemoryBudget:
    """An amount of memory in bytes, or (where that is None) a share of the device's."""

    text: str
    """As the user wrote it."""
    explicit_bytes: int | None = None
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> MemoryBudget:
        """Read ``16GiB``, ``512MiB``, ``2.5GB``, ``device`` or a share of it such as ``0.5``.

        Units are read whatever their case; kB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

        Raises:
            Refused: it is none of these, an unknown unit, less than a byte, or a share outside
                (0, 1].
        """
        found = _AMOUNT.fullmatch(text.strip())
        if text.strip().lower() == WHOLE_DEVICE:
            return cls(text)
        if found is None:
            raise Refused(f"memory budget {text!r} is no amount of memory; {ALLOWED}")
        number, unit = Decimal(found[1]), found[2]
        if not unit:
            if not 0 < number <= 1:
                raise Refused(f"memory budget {text!r} has no unit and is no share in (0, 1]; {ALLOWED}")
            return cls(text, share=float(number))
        factor = {name.lower(): factor for name, factor in UNITS.items()}.get(unit.lower())
        if factor is None:
            raise Refused(f"memory budget {text!r}: {unknown_name('unit', unit, UNITS)}")
        if number * factor < 1:
            raise Refused(f"memory budget {text!r} is less than a byte; {ALLOWED}")
        return cls(text, explicit_bytes=int(number * factor))

    def resolve(self, device: torch.device, sharing: int = 1) -> int:
        """Return the budget of a process in bytes; an amount larger than there is for it is refused.

        ``sharing``: the processes that have the device's memory together, in equal parts.

        Raises:
            Refused: the device has less, or does not say what it has.
        """
        total = device_memory_bytes(device) // sharing
        if self.explicit_bytes is None:
            return int(total * self.share)
        if self.explicit_bytes > total:
            raise Refused(
                f"memory budget {self.text} is more than the {format_bytes(total)} of device "
                f"{device.type}; lower it, or write 'device' for all of it."
            )
        return self.explicit_bytes


def device_memory_bytes(device: torch.device) -> int:
    """Return all the memory of the device, in bytes: on a CPU the host's, or its control group's limit.

    What other processes use of it is not taken off.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return host_memory_bytes()


def host_memory_bytes() -> int:
    """Return the host's physical memory in bytes, or the lowest limit of the control groups over us.

    Source: cgroups(7); ``memory.max`` of version 2, ``memory.limit_in_bytes`` of version 1.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        while group != mount.parent:  # the path may be the host's, of which a container sees the end only
            limit = group / name
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                limits.append(int(text))
            group = group.parent
    return min(limits)


def training_state_bytes(model: nn.Module) -> int:
    """Return the bytes that a model takes in training before any batch, under AdamW.

    Parameters and buffers; for each parameter that is trained also a gradient and two moments of its
    own size, and a step counter of 4 bytes. The model may be on the device ``meta``.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in [*held, *trained, *trained, *trained]) + 4 * len(trained)


def refuse_small_budget(budget_bytes: int, needed_bytes: int) -> None:
    """Refuse a budget in which not even the model fits; ``needed_bytes`` as ``training_state_bytes``.

    Raises:
        Refused: the budget is smaller; both sizes are named.
    """
    if budget_bytes < needed_bytes:
        raise Refused(
            f"the memory budget of {format_bytes(budget_bytes)} is smaller than the "
            f"{format_bytes(needed_bytes)} of parameters, gradients and optimizer state, before any batch; "
            "raise it, or lower embed_dim, num_layers, num_experts or vocab_size."
        )


def format_bytes(count: int) -> str:
    """Return ``1.5 GiB``, ``160.5 MiB`` or ``812 B`` for people to read."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:,.1f} {unit}"
    return f"{count} B"


def limit_of(memory: MemoryConfig, device: torch.device, ranks: Ranks) -> tuple[int, int]:
    """Return a process's memory budget, and the share of it that a step may reach, both in bytes.

    The target enters here and nowhere else: it is the one safety factor.
    """
    budget = MemoryBudget.parse(memory.memory_budget or WHOLE_DEVICE)
    total = budget.resolve(device, ranks.sharing(device))
    return total, int(total * memory.memory_target)


def length_bounds(config: RunConfig) -> tuple[int, int]:
    """Return the shortest and the longest length of a run that may change it."""
    memory, full = config.memory, config.model.max_seq_length
    shortest = max(1, full // 4) if memory.shape_min_length is None else memory.shape_min_length
    return shortest, full if memory.shape_max_length is None else memory.shape_max_length


def requested(config: RunConfig) -> Requested:
    """Return the sizes asked for; what a search may change stands beside it, in ``tuned`` and ``used``."""
    memory = config.memory
    asked = Requested(batch_size=config.training.batch_size, max_seq_length=config.model.max_seq_length,
                      micro_batch_size=memory.micro_batch_size)  # fmt: skip
    if memory.tune_batch_size or memory.fit_shape or memory.control_memory:
        asked.memory_budget, asked.memory_target = memory.memory_budget, memory.memory_target
    return asked


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
    sizes, world = config.training.batch_sizes, ranks.world_size
    refuse_uneven_pieces(sizes, 1, world)
    for name in ("micro_batch_size", "tune_init"):
        if getattr(memory, name) is not None:
            refuse_uneven_pieces(sizes, getattr(memory, name), world, name=name)
    if not (memory.tune_batch_size or memory.fit_shape or memory.control_memory):
        return
    if memory.control_memory and config.execution.compile:
        raise Refused("control_memory changes the shape of the steps, and each would be compiled anew: "
                         "drop --compile, or --control-memory.")  # fmt: skip
    if memory.fit_shape and (memory.tune_batch_size or memory.micro_batch_size is not None):
        raise Refused("fit_shape finds the micro-batch: drop tune_batch_size and micro_batch_size, or it.")
    if memory.fit_shape and config.training.curriculum is not None:
        raise Refused("a curriculum orders blocks of one length: drop --fit-shape or --curriculum.")
    shortest, longest = length_bounds(config)
    if not 1 <= shortest <= full <= longest:
        raise Refused(
            f"shape_min_length {shortest}, max_seq_length {full} and shape_max_length {longest} must rise."
        )
    with torch.device("meta"):
        needed = training_state_bytes(GNNMoEModel(model, seed=0))
    refuse_small_budget(limit_of(memory, device, ranks)[0], needed)


def refuse_uneven_pieces(
    batch_sizes: Sequence[int], micro_batch_size: int, world_size: int = 1, name: str = "micro_batch_size"
) -> None:
    """Refuse a micro-batch in which the ranks cannot run each of these global batches evenly.

    Raises:
        Refused: naming the nearest micro-batch that divides them.
    """
    named = " and ".join(map(str, dict.fromkeys(batch_sizes)))
    share, rest = divmod(gcd(*batch_sizes), world_size)
    if rest:
        raise Refused(f"a batch of {named} cannot be shared evenly by {world_size} ranks.")
    if micro_batch_size < 1 or share % micro_batch_size:
        nearest = min(divisors(share), key=lambda size: abs(size - micro_batch_size))
        ranks = f" on {world_size} ranks" if world_size > 1 else ""
        raise Refused(
            f"{name} is {micro_batch_size}, which does not divide the batch of {named}{ranks}; "
            f"the nearest that does is {nearest}."
        )
