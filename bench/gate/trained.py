"""Token isolation once more, on the trained weights and the tensors of the run itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from bench.gate.dependence import explain
from bench.gate.isolation import repeats, value_leak
from bench.gate.report import Check, CheckFailed, run_check
from bench.gate.subject import Inputs, global_random_state_kept
from gnnmoe.couplers.base import Coupler
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed


def rows_to_judge(batches: Iterable[dict[str, Tensor]], at_once: int | None) -> Tensor:
    """Return the input ids (B, L) to check on: B rows as they are run at once, None being a whole batch.

    B is 2 or more, from a second batch where need be: one row alone cannot see another.
    """
    first, *second = (batch["input_ids"] for batch in islice(batches, 2))
    return torch.cat([first, *second])[: max(2, at_once or len(first))]


def check_trained_isolation(
    model: GNNMoEModel, input_ids: Tensor, *, autocast_dtype: torch.dtype | None = None
) -> Check:
    """Check that no layer's coupler lets a token see another, at the run's own B, L and precision.

    The model runs once on ``input_ids`` (B, L) in eval mode; each coupler is then tried in place
    on the inputs it got, with 2·⌈log₂ B·L⌉ + 3 forwards a layer and no gradients. Weights, gradients,
    training flags and torch's global random state are left as they were.
    """
    device = input_ids.device
    with ExitStack() as stack:
        stack.enter_context(global_random_state_kept(device))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None))
        return run_check("trained_isolation", lambda: _every_layer(model, input_ids))


def _every_layer(model: GNNMoEModel, input_ids: Tensor) -> str:
    captured = _coupler_inputs(model, input_ids)
    generator = torch.Generator().manual_seed(stream_seed(0, "gate"))
    for number, (coupler, inputs) in enumerate(captured):
        moved = inputs[0].clone(), inputs[1].clone()
        for x in moved:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            x += (noise * x.float().std()).to(x.dtype)
        with ExitStack() as stack:
            if not repeats(coupler, inputs):
                stack.enter_context(deterministic())
                if not repeats(coupler, inputs):
                    raise CheckFailed(f"layer {number}: the same input gives different outputs")
            if value_leak(coupler, inputs, moved, [0, 1]):
                raise CheckFailed(f"layer {number}: {explain(coupler, inputs, moved)}")
    shape = tuple(input_ids.shape)
    return f"{len(captured)} layers on the trained weights, (B, L) = {shape}: no token sees another"


@torch.no_grad()
def _coupler_inputs(model: GNNMoEModel, input_ids: Tensor) -> list[tuple[Coupler, Inputs]]:
    """Return each layer's coupler and what it is called with; a compiled model runs uncompiled."""
    captured: list[tuple[Coupler, Inputs]] = []

    def capture(coupler: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(coupler, Coupler)
        captured.append((coupler, (args[0].detach(), args[1].detach())))

    plain: GNNMoEModel = getattr(model, "_orig_mod", model)
    couplers = [cast(Coupler, layer.coupler) for layer in plain.layers]
    handles = [coupler.register_forward_pre_hook(capture) for coupler in couplers]
    compiler_loaded = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiler_loaded else nullcontext():
            plain(input_ids, return_logits=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(captured) == len(couplers), "a layer did not call its coupler exactly once"
    return captured


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put every module into eval mode inside the block, and back as it was after it."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic kernels, for couplers whose scatter adds in any order on a GPU."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
