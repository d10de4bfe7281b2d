"""Everything that a training stands on, bit for bit as it was before a probe, also where the probe fails.

The probe runs on the training's own model and optimizer, and what it may change is kept on the host.
A probe on a deep copy would need less undone, but the copy beside the original takes as much device memory
as the parameters, gradients and optimizer state again, so that the peak it measures is not the training's.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

Restore = Callable[[], None]


@contextmanager
def preserved(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    loaders: Iterable[DataLoader[Any]] = (),
) -> Iterator[None]:
    """Undo at the end of the block whatever it does to what is named, and to every random state.

    Kept: parameters, buffers, gradients (None stays None), ``requires_grad`` and the modules' modes;
    the optimizer's state (empty stays empty) and its groups' settings; the random states of Python,
    NumPy, torch and all CUDA devices; the loaders' samplers and generators. Parameters and buffers are
    restored in place, gradients and optimizer state as new tensors with the same bits.

    Costs host memory for one copy of all that, and no device memory. Where the probe may run out of
    memory, put ``bench.measure.recovery.attempt`` inside the block, so that what it held is free
    before the state comes back.
    """
    with ExitStack() as stack:  # runs every one of them, also where the block or another one raises
        stack.callback(_random_states())
        for loader in loaders:
            stack.callback(_loader(loader))
        if optimizer is not None:
            stack.callback(_optimizer(optimizer))
        if model is not None:
            stack.callback(_gradients(model))
            stack.callback(_tensors(model))
            stack.callback(_modes(model))
            stack.callback(_drop_gradients, model)
        if optimizer is not None:
            stack.callback(optimizer.state.clear)  # first of all: what the probe made gives its room back
        yield


def _modes(model: nn.Module) -> Restore:
    modes = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    return restore


def _tensors(model: nn.Module) -> Restore:
    """Keep which parameter and which buffer stands under which name, and their bits."""
    tables: list[dict[str, Any]] = [
        table for module in model.modules() for table in (module._parameters, module._buffers)
    ]
    kept = [(table, dict(table)) for table in tables]
    tensors = {id(t): t for _, names in kept for t in names.values() if t is not None}.values()
    bits = [(tensor, tensor.data, _to_host(tensor)) for tensor in tensors]

    def restore() -> None:
        for table, names in kept:
            table.clear()
            table.update(names)
        for tensor, data, host in bits:
            data.copy_(host)
            tensor.data = data  # a probe may have put another one in its place

    return restore


def _gradients(model: nn.Module) -> Restore:
    kept = [(p, None if p.grad is None else _to_host(p.grad)) for p in model.parameters()]

    def restore() -> None:
        for parameter, host in kept:
            parameter.grad = None if host is None else host.to(parameter.device)

    return restore


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _optimizer(optimizer: Optimizer) -> Restore:
    state = {key: {name: _kept(value) for name, value in values.items()}
             for key, values in optimizer.state.items()}  # fmt: skip
    groups = [(group, {k: v if k == "params" else copy.deepcopy(v) for k, v in group.items()})
              for group in optimizer.param_groups]  # fmt: skip
    members = [list(group["params"]) for group, _ in groups]

    def restore() -> None:
        optimizer.state.clear()
        for key, values in state.items():
            optimizer.state[key] = {name: again() for name, again in values.items()}
        optimizer.param_groups[:] = [group for group, _ in groups]
        for (group, settings), parameters in zip(groups, members, strict=True):
            group.clear()
            group.update(settings)
            group["params"][:] = parameters

    return restore


def _kept(value: Any) -> Callable[[], Any]:
    """Return what gives the value again: a tensor on its own device."""
    if isinstance(value, Tensor):
        host, device = _to_host(value), value.device
        return lambda: host.to(device)
    held = copy.deepcopy(value)
    return lambda: held


def _random_states() -> Restore:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)

    return restore


def _loader(loader: DataLoader[Any]) -> Restore:
    """Keep the attributes and generators of a loader and of its samplers; not an iteration under way."""
    parts = [part for part in (loader, loader.sampler, loader.batch_sampler) if part is not None]
    kept = [(part, dict(vars(part))) for part in parts]
    contents = [(value, copy.copy(value)) for part in parts for value in vars(part).values()
                if isinstance(value, dict | list | set)]  # fmt: skip
    generators = [(value, value.get_state()) for part in parts for value in vars(part).values()
                  if isinstance(value, torch.Generator)]  # fmt: skip

    def restore() -> None:
        for part, values in kept:
            vars(part).clear()
            vars(part).update(values)
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)
        for generator, state in generators:
            generator.set_state(state)

    return restore


def _to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU of the same bits and strides."""
    return tensor.detach().to("cpu", copy=True)
