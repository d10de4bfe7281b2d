"""What a computation allocates and keeps, in elements of float64.

Storages are counted, once each, whatever views there are of them. Temporaries inside one operation of
torch's own are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ELEMENT = 8


class Allocations(TorchDispatchMode):
    """Watches every operation, those of the backward too.

    ``largest`` is the largest single allocation, ``peak`` the most that was alive at once, without
    what was ``known`` before.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.largest = self.peak = self._live = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes() // ELEMENT
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self._live += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self._live)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def saved_elements(call: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Return how much ``call`` keeps for its backward, without what was known before."""
    sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
    kept = []  # so that no storage is freed and its place taken by another

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        sizes.setdefault(storage._cdata, storage.nbytes() // ELEMENT)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(sizes.values())
