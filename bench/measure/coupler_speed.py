"""Forward + backward of one coupler in each of its forms, in turn, in one process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers import Coupler, build_coupler, resolved_options
from gnnmoe.hypergraph import FORMULAS
from gnnmoe.hypergraph_backends import BACKENDS, missing_backends
from gnnmoe.seeds import RandomStreams

REFERENCE = "reference()"
Form = Callable[[Tensor, Tensor], Tensor]
"""From expert outputs (B, L, E, D) and layer input (B, L, D) to (B, L, D)."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One form of the coupler: how far it is from the default form, and how long it takes."""

    form: str
    seconds: list[float]
    largest_difference: float
    """Largest difference of the output from the default form's, over its largest value."""

    @property
    def median_seconds(self) -> float:
        """Return the median of the measured rounds."""
        return statistics.median(self.seconds)


def time_forms(config: GNNMoEConfig, batch_size: int, rounds: int, device: torch.device) -> Iterator[Timing]:
    """Yield a timing for each form: the default first, then the other backends and ``reference()``.

    Backends whose package is missing are left out.

    Inputs are random, (batch_size, max_seq_length, E, D) in float32. Each form warms up once and
    is then timed ``rounds`` times; one whose warm-up takes over two seconds is timed once.
    """
    with RandomStreams(0)("speed.inputs"):
        shape = (batch_size, config.max_seq_length, config.num_experts, config.embed_dim)
        inputs, layer_input = torch.randn(shape).to(device), torch.randn(shape[:2] + shape[3:]).to(device)
        cotangent = torch.randn(shape[:2] + shape[3:]).to(device)
    expected: Tensor | None = None
    for form, call in _forms(config, device):
        leaves = inputs.clone().requires_grad_(True), layer_input.clone().requires_grad_(True)
        warmup, output = _timed(call, leaves, cotangent, device)
        seconds = [_timed(call, leaves, cotangent, device)[0] for _ in range(rounds if warmup < 2.0 else 1)]
        expected = output if expected is None else expected
        difference = float((output - expected).abs().max() / expected.abs().max())
        yield Timing(form, seconds, difference)


def _forms(config: GNNMoEConfig, device: torch.device) -> Iterator[tuple[str, Form]]:
    default = resolved_options(config).get("backend")
    has_backends = default is not None and config.hgnn_conv_type in FORMULAS
    backends = [default, *(name for name in BACKENDS if name != default)] if has_backends else []
    for missing in set(missing_backends()) - {default}:  # the default's own absence is refused by build
        backends = [name for name in backends if name != missing]
    for backend in backends:
        yield backend, _build(config, {"backend": backend}, device)
    plain = _build(config, {}, device)
    if not backends:
        yield "vectorized", plain
    yield REFERENCE, plain.reference


def _build(config: GNNMoEConfig, options: dict[str, str], device: torch.device) -> Coupler:
    options = {**config.coupler_options, **options}
    with RandomStreams(0)("init.coupler"):
        return build_coupler(dataclasses.replace(config, coupler_options=options)).to(device)


def _timed(
    call: Form, inputs: tuple[Tensor, Tensor], cotangent: Tensor, device: torch.device
) -> tuple[float, Tensor]:
    for leaf in inputs:
        leaf.grad = None
    _synchronize(device)
    start = time.perf_counter()
    output = call(*inputs)
    output.backward(cotangent)
    _synchronize(device)
    return time.perf_counter() - start, output.detach()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
