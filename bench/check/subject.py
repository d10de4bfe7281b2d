"""What every check uses: its verdict, the coupler under test with its inputs, and the random state.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.device import is_out_of_memory
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.process_state import ProcessStateChanged, unchanged_state
from gnnmoe.seeds import stream_seed

TOLERANCE = 1e-10  # float64, relative to the largest value
STREAM = "gate"  # name of the random stream of all checks; another name would change their numbers
Module = TypeVar("Module", bound=nn.Module)
Inputs = tuple[Tensor, Tensor]
"""Expert outputs (B, L, E, D) and layer input (B, L, D)."""


# --- verdicts ----------------------------------------------------------------------------------------


class CheckFailed(Exception):
    """Raised by a check that found a fault; the text describes the fault."""


@dataclass(frozen=True)
class Check:
    """The verdict of one check."""

    name: str
    passed: bool
    detail: str
    """One or two sentences: what the check tried, or which fault it found."""
    seconds: float
    reused_from: str | None = None
    """The run that did this check, where this run reuses its verdict (``bench.run.resume``)."""


@dataclass(frozen=True)
class CheckReport:
    """The verdicts of all checks, in the order in which the checks ran."""

    checks: list[Check]

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether there was a check and every check passed."""
        return bool(self.checks) and not self.failures

    def to_record(self) -> dict[str, Any]:
        """Return ``{"passed": …, "checks": {name: {"passed", "detail", "seconds"}}}`` for JSON.

        A reused check has 0 seconds, and ``reused_from`` names the run that did it.
        """
        entries = {check.name: asdict(check) for check in self.checks}
        for entry in entries.values():
            del entry["name"]
            if entry["reused_from"] is None:
                del entry["reused_from"]
        return {"passed": self.passed, "checks": entries}


def run_check(name: str, body: Callable[[], str]) -> Check:
    """Run ``body``, which returns the detail of a pass and raises if the check fails.

    The code under test may be anybody's, so any exception is a failed check and not a crash. The only
    exception that this function raises again is running out of memory: it says nothing about the coupler.
    """
    start = time.perf_counter()
    try:
        with unchanged_state("the coupler"):
            passed, detail = True, body()
    except (CheckFailed, ProcessStateChanged) as failure:
        passed, detail = False, str(failure)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        passed, detail = False, f"it raised {type(error).__name__}: {error}"
    return Check(name, passed, detail, time.perf_counter() - start)


# --- the coupler under test --------------------------------------------------------------------------


class Subject:
    """A configuration under test, without dropout, and the generator of its checks."""

    def __init__(self, config: GNNMoEConfig, seed: int, device: torch.device) -> None:
        self.config = replace(config, dropout_rate=0.0)
        self.seed, self.device = stream_seed(seed, STREAM), device
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def inputs(self, batch: int, length: int, num_experts: int | None = None) -> Inputs:
        """Return inputs for a coupler; the expert outputs are a view of expert-major memory."""
        E, D = num_experts or self.config.num_experts, self.config.embed_dim
        return self.normal(E, batch, length, D).permute(1, 2, 0, 3), self.normal(batch, length, D)

    def coupler(self, num_experts: int | None = None) -> Coupler:
        """Build the coupler in float64 with the weights of a run's start, in train mode."""
        seed_global_generator(self.seed, self.device)
        coupler = build_coupler(replace(self.config, num_experts=num_experts or self.config.num_experts))
        without_dropout(coupler)
        return coupler.to(self.device, torch.float64)

    def perturbed_coupler(self, num_experts: int | None = None) -> Coupler:
        """Build the coupler and move every parameter, so that no leak hides behind a zero."""
        return self.perturb(self.coupler(num_experts))

    @torch.no_grad()
    def perturb(self, module: Module) -> Module:
        """Add noise to every parameter of ``module``: a tenth of the parameter's size plus 0.05."""
        for parameter in module.parameters():
            size = parameter.square().mean().sqrt()
            parameter += self.normal(*parameter.shape) * (0.1 * size + 0.05)
        return module


def without_dropout(module: nn.Module) -> None:
    """Switch off every dropout layer, also the layers that do not follow ``dropout_rate``."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0


def call(coupler: Coupler, inputs: Inputs, *, reference: bool = False) -> Tensor:
    """Return the coupler's output; every call starts from the same random state.

    Raises:
        CheckFailed: the output is not a finite tensor of the layer input's shape.
    """
    seed_global_generator(0, inputs[1].device)
    output = (coupler.reference if reference else coupler)(*inputs)
    if not isinstance(output, Tensor) or output.shape != inputs[1].shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CheckFailed(f"the output is {got}; it must be (B, L, D) = {tuple(inputs[1].shape)}")
    if not output.isfinite().all():
        raise CheckFailed("the output is not finite")
    return output


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value of ``b``."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))


# --- modes and random state --------------------------------------------------------------------------


def modes(module: nn.Module) -> Iterator[str]:
    """Put ``module`` into eval mode and then into train mode; yield the name of each mode."""
    for name in ("eval", "train"):
        module.train(name == "train")
        yield name


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode inside the block, and restore its mode after the block."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def is_random(run: Callable[[], object], mode: str, device: torch.device) -> bool:
    """Return whether ``run`` draws from torch's global generator; then two batch shapes cannot be compared.

    Raises:
        CheckFailed: ``run`` draws random numbers in eval mode, where nothing may be random.
    """
    state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    seed_global_generator(0, device)
    before = state()
    run()
    random = not torch.equal(state(), before)
    if random and mode == "eval":
        raise CheckFailed("it draws random numbers in eval mode, so its perplexity is not defined")
    return random


def seed_global_generator(seed: int, device: torch.device) -> None:
    """Seed only the generators that ``global_random_state_kept`` restores."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def global_random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators (CPU and ``device``) after the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic kernels inside the block: on a GPU, a scatter adds in any order otherwise."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
