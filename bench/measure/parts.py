"""What the peak of a step is made of: model, gradients, optimizer, activations."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.record import NotMeasured, is_measured

if TYPE_CHECKING:
    from bench.measure.tracked import Owner

BLOCK_BYTES = 512  # in which the CUDA allocator hands out
OF = {"model": ("parameter", "buffer"), "gradients": ("gradient",), "optimizer": ("optstate",)}


def by_part(peak_by_part_bytes: dict[str, int] | NotMeasured) -> dict[str, int] | NotMeasured:
    """Return the bytes at the moment of the peak by four parts, whose sum is the peak.

    Activations are all that is not of the other three: what the forward keeps for the backward, the
    temporaries of both, and the batches. A peak at the end of the forward has no gradients yet.
    """
    if not is_measured(peak_by_part_bytes):
        return peak_by_part_bytes
    parts = {name: sum(peak_by_part_bytes.get(key, 0) for key in keys) for name, keys in OF.items()}
    return {**parts, "activations": sum(peak_by_part_bytes.values()) - sum(parts.values())}


def held_bytes(owners: tuple[Owner, ...], block: int = BLOCK_BYTES) -> dict[str, int]:
    """Return the bytes that stay allocated through a whole step, by part, each storage once.

    Parts are parameter, buffer, optstate (what there is of it before the step) and other (batches).
    Each storage is rounded up to whole blocks.
    """
    found: dict[str, dict[int, int]] = {"parameter": {}, "buffer": {}, "optstate": {}, "other": {}}

    def add(part: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        found[part][storage.data_ptr()] = _in_blocks(storage.nbytes(), block)

    for owner in owners:
        if isinstance(owner, nn.Module):
            for parameter in owner.parameters():
                add("parameter", parameter)
            for buffer in owner.buffers():
                add("buffer", buffer)
        elif isinstance(owner, list):
            for batch in owner:
                for tensor in batch.values():
                    add("other", tensor)
        else:
            for state in owner.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        add("optstate", value)
    return {part: sum(sizes.values()) for part, sizes in found.items()}


class GradientsAtPeak:
    """Watches a step on CUDA: how many bytes of gradients the owners' parameters hold at its peak.

    The allocator does not say what a block is for. But its peak is known at any moment without a wait,
    and gradients are handed over one by one: the peak moved before or after each of them.
    """

    def __init__(self, owners: tuple[Owner, ...], device: torch.device) -> None:
        self.at_peak_bytes = 0
        self._device, self._peak, self._held = device, 0, 0
        self._seen: set[Tensor] = set()
        modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        self._parameters = {p for module in modules for p in module.parameters() if p.requires_grad}

    def __enter__(self) -> GradientsAtPeak:
        self._handles = [p.register_post_accumulate_grad_hook(self._handed_over) for p in self._parameters]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self._look()
        for handle in self._handles:
            handle.remove()

    def _handed_over(self, parameter: Tensor) -> None:
        self._look()
        if parameter not in self._seen and parameter.grad is not None:  # later pieces add to the same
            self._seen.add(parameter)
            self._held += _in_blocks(parameter.grad.untyped_storage().nbytes(), BLOCK_BYTES)

    def _look(self) -> None:
        peak = torch.cuda.max_memory_allocated(self._device)
        if peak > self._peak:
            self._peak, self.at_peak_bytes = peak, self._held


def _in_blocks(size: int, block: int) -> int:
    return -(-size // block) * block
