"""The forms of a coupler, built on shared inputs: one step is forward + backward.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.speeding.machine import DTYPES, products_in
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import build_coupler, resolved_options
from gnnmoe.hypergraph.backends import BACKENDS, missing_backends
from gnnmoe.hypergraph.propagation import FORMULAS
from gnnmoe.seeds import RandomStreams

DEFAULT, REFERENCE = "vectorized", "reference()"
Result = tuple[Tensor, tuple[Tensor | None, ...]]
"""The output, and the gradients of expert outputs, layer input and parameters (None: it plays no part)."""
INPUT_SETS = 3  # used in turn: one that was just read may still lie in a cache


@dataclass(frozen=True)
class Form:
    """One way to compute a coupler: ``forward`` with these options, ``reference()``, or compiled."""

    subject: str
    name: str
    config: GNNMoEConfig
    reference: bool = False
    compile_mode: str | None = None

    @property
    def key(self) -> str:
        """What tells it from the others of its case."""
        return f"{self.subject} {self.name}"


def forms_of(subject: str, config: GNNMoEConfig, compile_modes: Sequence[str] = ()) -> list[Form]:
    """Return the forms of a coupler that can be built here: the default first, then what it replaces."""
    backend = resolved_options(config).get("backend")
    backends = [DEFAULT if backend is None else backend]
    if backend is not None and config.hgnn_conv_type in FORMULAS:
        backends += [name for name in BACKENDS if name != backend and name not in missing_backends()]
    forms = [Form(subject, name, config if backend is None else _with_backend(config, name))
             for name in backends]  # fmt: skip
    compiled = [replace(forms[0], name=compiled_name(mode), compile_mode=mode) for mode in compile_modes]
    return [forms[0], *compiled, *forms[1:], Form(subject, REFERENCE, config, reference=True)]


def compiled_name(mode: str) -> str:
    """Return how a compiled form is called."""
    return "compiled" if mode == "default" else f"compiled, {mode}"


def _with_backend(config: GNNMoEConfig, backend: str) -> GNNMoEConfig:
    return replace(config, coupler_options={**config.coupler_options, "backend": backend})


def experts_given(config: GNNMoEConfig) -> int:
    """Return how many experts a layer of a model has with this coupler: with ``dense`` one block."""
    with torch.random.fork_rng(devices=[]):  # a coupler draws its parameters
        return build_coupler(config).expert_shape()[0]


class FormInputs:
    """Random expert outputs, layer inputs and cotangents, in sets, as a model has them.

    Expert outputs lie expert by expert, in bf16 where that is the precision; the layer's input is of the
    residual stream, which stays float32. There are as many experts as a layer with the coupler has.
    """

    def __init__(self, config: GNNMoEConfig, batch: int, precision: str, device: torch.device) -> None:
        self.device = device
        L, E, D = config.max_seq_length, experts_given(config), config.embed_dim
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.sets = [
            (normal(E, batch, L, D).to(DTYPES[precision]).permute(1, 2, 0, 3).requires_grad_(True),
             normal(batch, L, D).requires_grad_(True))
            for _ in range(INPUT_SETS)
        ]  # fmt: skip
        self._cotangents = [normal(batch, L, D) for _ in range(INPUT_SETS)]
        self._cast: dict[torch.dtype, list[Tensor]] = {torch.float32: self._cotangents}

    def cotangent(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return a gradient of the output in the output's own type."""
        if dtype not in self._cast:
            self._cast[dtype] = [one.to(dtype) for one in self._cotangents]
        return self._cast[dtype][number % INPUT_SETS]


class Naive(nn.Module):
    """A coupler's ``reference()`` as a module, which the tracker of memory asks for."""

    def __init__(self, coupler: Coupler) -> None:
        super().__init__()
        self.coupler = coupler

    def forward(self, expert_outputs: Tensor, layer_input: Tensor) -> Tensor:
        """Return (B, L, D)."""
        return self.coupler.reference(expert_outputs, layer_input)


class Runner:
    """One form, built, on shared inputs."""

    def __init__(self, form: Form, inputs: FormInputs, precision: str) -> None:
        self.form, self.inputs, self.precision = form, inputs, precision
        self.device = device = inputs.device
        with RandomStreams(0)("init.coupler"):
            self.coupler: Coupler = build_coupler(form.config).to(device)
        self.parameters = [p for p in self.coupler.parameters() if p.requires_grad]
        self.module = Naive(self.coupler) if form.reference else self.coupler
        if form.compile_mode is not None:
            mode = None if form.compile_mode == "default" else form.compile_mode
            self.module.compile(mode=mode, dynamic=False)

    def forward(self, number: int) -> Tensor:
        """Return the output (B, L, D) for one of the sets of inputs."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.module(*self.inputs.sets[number % INPUT_SETS])

    def step(self, number: int) -> Result:
        """Do forward and backward; return the output and all gradients."""
        output = self.forward(number)
        leaves = [*self.inputs.sets[number % INPUT_SETS], *self.parameters]
        cotangent = self.inputs.cotangent(number, output.dtype)
        return output, torch.autograd.grad(output, leaves, cotangent, allow_unused=True)

    def accumulate(self) -> None:
        """Do forward and backward as a training does, into the gradients of all leaves, and drop these."""
        output = self.forward(0)
        output.backward(self.inputs.cotangent(0, output.dtype))
        for leaf in (*self.inputs.sets[0], *self.parameters):
            leaf.grad = None

    def reference_in_float32(self) -> Result:
        """Return what ``step(0)`` should give, by ``reference()`` in float32."""
        x, u = (tensor.detach().float().requires_grad_(True) for tensor in self.inputs.sets[0])
        with products_in("fp32"):
            output = self.coupler.reference(x, u)
            cotangent = self.inputs.cotangent(0, output.dtype)
            gradients = torch.autograd.grad(output, [x, u, *self.parameters], cotangent, allow_unused=True)
        return output.detach(), gradients

    def known(self) -> list[Tensor]:
        """Return what is there before a step."""
        return [*self.parameters, *self.coupler.buffers(), *(x for one in self.inputs.sets for x in one)]
