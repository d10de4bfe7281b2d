"""The sum of all live tensors, seen by a tracker of every operation: real ones and fake ones alike.

Imports torch's ``MemTracker``, which takes a second; import this only where something is tracked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

Owner = nn.Module | Optimizer | list[dict[str, Tensor]]
"""What holds memory before a step: a module, an optimizer, or batches."""


def tracked_peaks(step: Callable[[], object], owners: tuple[Owner, ...]) -> tuple[int, dict[str, int]]:
    """Run ``step`` once; return its peak in bytes, and what it is made of by part.

    Counted are storages, once each, of what ``owners`` hold before and of all that operations return.
    Temporaries inside one operation of torch's own are not seen. Parts are parameter, buffer,
    gradient, activation, temp (of the backward), optstate and other (batches).
    """
    modules_and_optimizers = [owner for owner in owners if not isinstance(owner, list)]
    tensors = [t for owner in owners if isinstance(owner, list) for batch in owner for t in batch.values()]
    tracker = _PeakTracker()
    tracker.track_external(*modules_and_optimizers, *tensors)
    with tracker, see_inside_operators():
        step()
    by_part: dict[str, int] = {}
    for parts in tracker.get_tracker_snapshot("peak").values():
        for part, size in parts.items():
            name = str(getattr(part, "value", part)).lower()
            by_part[name] = by_part.get(name, 0) + int(size)
    return by_part.pop("total"), by_part


class _NoHook:
    def remove(self) -> None:
        """Do nothing."""


class _PeakTracker(MemTracker):
    """A tracker of the whole peak only: torch's own also keeps each module's, at every operation.

    It also takes frozen parameters, and models that are called more than once in a step.
    """

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        for parameter in module.parameters():
            if not parameter.requires_grad:  # torch's own would fail to put its hook there
                self._param_to_grad_hook_handles.setdefault(parameter, (_NoHook(), _NoHook()))
        return super()._track_module_params_and_buffers(module, install_grad_hooks)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if not self._mod_tracker.is_bw and len(self._mod_tracker.parents) == 2:  # "Global" and itself
            self.reset_mod_stats()  # a step in pieces calls the model again, which torch's own refuses
        super()._pre_fw_hook(module, inputs)

    def _update_peak_stats(self, peak_state: Any) -> None:
        del peak_state
        for device, parts in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < parts["Total"]:
                self._peak_mem[device] = parts["Total"]
                self._peak_mem_snap[device] = dict(parts)


def see_inside_operators() -> TorchDispatchMode:
    """Return a mode that runs operators written in Python step by step, for modes around it.

    The chunked head of torch 2.13 is one; taken as a whole, its chunks of logits would be missed.
    """

    class SeeInside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            del types
            operator = OPDEFS.get(func._schema.name) if hasattr(func, "_schema") else None
            return (operator._init_fn if operator else func)(*args, **(kwargs or {}))

    return SeeInside()
