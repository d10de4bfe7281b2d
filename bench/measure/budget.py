"""How much memory a run may use: an explicit number, or a part of what the device has.

The budget is a number of this project's own. ``set_per_process_memory_fraction`` makes a small card
out of a large one, but the total that the device reports stays the large one's.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from gnnmoe.config import Refused
from gnnmoe.naming import unknown_name

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    import torch

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


def parameters_fit(budget_bytes: int, needed_bytes: int) -> None:
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
