"""What the checks work on: a copy of the coupler, inputs, and one source of random numbers.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from bench.gate.report import CheckFailed
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.seeds import stream_seed

TOLERANCE = 1e-10  # float64, relative to the largest value
Module = TypeVar("Module", bound=nn.Module)
Inputs = tuple[Tensor, Tensor]
"""Expert outputs (B, L, E, D) and layer input (B, L, D)."""


class Subject:
    """A configuration under test, without dropout, and the generator that its checks draw from."""

    def __init__(self, config: GNNMoEConfig, seed: int, device: torch.device) -> None:
        self.config = replace(config, dropout_rate=0.0)
        self.seed, self.device = stream_seed(seed, "gate"), device
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def inputs(self, batch: int, length: int, num_experts: int | None = None) -> Inputs:
        """Return inputs for a coupler; expert outputs are a view of expert-major memory."""
        E, D = num_experts or self.config.num_experts, self.config.embed_dim
        return self.normal(E, batch, length, D).permute(1, 2, 0, 3), self.normal(batch, length, D)

    def coupler(self, num_experts: int | None = None) -> Coupler:
        """Build the coupler in float64 as a run would start it, in train mode."""
        seed_global_generator(self.seed, self.device)
        coupler = build_coupler(replace(self.config, num_experts=num_experts or self.config.num_experts))
        without_dropout(coupler)
        return coupler.to(self.device, torch.float64)

    def perturbed_coupler(self, num_experts: int | None = None) -> Coupler:
        """Build the coupler and move every parameter, so that nothing hides behind a zero."""
        return self.perturb(self.coupler(num_experts))

    @torch.no_grad()
    def perturb(self, module: Module) -> Module:
        """Add noise to every parameter of ``module``: a tenth of its size, and at least 0.05."""
        for parameter in module.parameters():
            size = parameter.square().mean().sqrt()
            parameter += self.normal(*parameter.shape) * (0.1 * size + 0.05)
        return module


def without_dropout(module: nn.Module) -> None:
    """Switch off every dropout layer, also those that do not follow ``dropout_rate``."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0


def call(coupler: Coupler, inputs: Inputs, *, reference: bool = False) -> Tensor:
    """Return the coupler's output, having seen to it that each call finds the same random state.

    Raises:
        CheckFailed: the output is not a finite tensor of the shape of the layer input.
    """
    seed_global_generator(0, inputs[1].device)
    output = (coupler.reference if reference else coupler)(*inputs)
    if not isinstance(output, Tensor) or output.shape != inputs[1].shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CheckFailed(f"the output is {got}; it must be (B, L, D) = {tuple(inputs[1].shape)}")
    if not output.isfinite().all():
        raise CheckFailed("the output is not finite")
    return output


def modes(module: nn.Module) -> Iterator[str]:
    """Put ``module`` into eval and then into train mode, and name each."""
    for name in ("eval", "train"):
        module.train(name == "train")
        yield name


def is_random(run: Callable[[], object], mode: str, device: torch.device) -> bool:
    """Return whether ``run`` draws random numbers, so that no two batch shapes compare.

    Raises:
        CheckFailed: it does so in eval mode, in which nothing may be random.
    """
    random = draws_random_numbers(run, device)
    if random and mode == "eval":
        raise CheckFailed("it draws random numbers in eval mode, so its perplexity is not defined")
    return random


def draws_random_numbers(run: Callable[[], object], device: torch.device) -> bool:
    """Return whether ``run`` uses torch's global generator."""
    state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    seed_global_generator(0, device)
    before = state()
    run()
    return not torch.equal(state(), before)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value of ``b``."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))


def seed_global_generator(seed: int, device: torch.device) -> None:
    """Seed the generators that ``global_random_state_kept`` restores, and no others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def global_random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators (CPU, and ``device``) as they were before the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        yield
