"""Couplers alone: their forms, built on shared inputs, checked against ``reference()`` and timed alternating.

One step is forward + backward. Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.timing import TRAINING, TimedStep
from bench.speed.floors import Rates, floor_bytes, roofline_seconds
from bench.speed.machine import (
    DTYPES,
    SLOW_SECONDS,
    Machine,
    failure_text,
    in_turn,
    peak_bytes,
    products_in,
    saved_bytes,
    timed,
)
from bench.speed.record import PARITY, SpeedRow
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import build_coupler, resolved_options
from gnnmoe.hypergraph.backends import BACKENDS, missing_backends
from gnnmoe.hypergraph.propagation import FORMULAS
from gnnmoe.seeds import RandomStreams

DEFAULT, REFERENCE = "vectorized", "reference()"
Result = tuple[Tensor, tuple[Tensor | None, ...]]
"""The output, and the gradients of expert outputs, layer input and parameters (None: not used)."""
INPUT_SETS = 3  # used alternating: a set that was just read may still lie in a cache
INPUTS = 2  # gradients before those of the parameters: of expert outputs and layer input
SLACK = 4.0
ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}
BELOW_FLOOR = (
    "faster than its floor: its tensors stay in a cache, or this machine has a faster product or copy"
)


# --- forms -----------------------------------------------------------------------------------------


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
        """A name that no other form of the same case has."""
        return f"{self.subject} {self.name}"


def forms_of(subject: str, config: GNNMoEConfig, compile_modes: Sequence[str] = ()) -> list[Form]:
    """Return the forms of a coupler that can be built here: the default first, then what it replaces."""
    backend = resolved_options(config).get("backend")
    if backend is None:
        forms = [Form(subject, DEFAULT, config)]
    else:
        backends = [backend]
        if config.hgnn_conv_type in FORMULAS:
            backends += [name for name in BACKENDS if name != backend and name not in missing_backends()]
        options = config.coupler_options
        forms = [
            Form(subject, name, replace(config, coupler_options={**options, "backend": name}))
            for name in backends
        ]
    compiled = [replace(forms[0], name=compiled_name(mode), compile_mode=mode) for mode in compile_modes]
    references = [Form(subject, REFERENCE, config, reference=True)] if _has_reference(config) else []
    return [forms[0], *compiled, *forms[1:], *references]


@torch.no_grad()
def _has_reference(config: GNNMoEConfig) -> bool:
    """Say whether a coupler gives a reference implementation; one token tells."""
    with torch.random.fork_rng(devices=[]):  # a coupler draws its parameters
        coupler = build_coupler(config)
    E, D = coupler.expert_shape()[0], config.embed_dim
    return coupler.reference(torch.zeros(1, 1, E, D), torch.zeros(1, 1, D)) is not None


def compiled_name(mode: str) -> str:
    """Return the name of a compiled form."""
    return "compiled" if mode == "default" else f"compiled, {mode}"


def experts_given(config: GNNMoEConfig) -> int:
    """Return how many experts a layer of a model has with this coupler: with ``dense`` one block."""
    with torch.random.fork_rng(devices=[]):  # a coupler draws its parameters
        return build_coupler(config).expert_shape()[0]


class FormInputs:
    """Random expert outputs, layer inputs and output gradients, in sets, as a model has them.

    Expert outputs are laid out expert by expert, in bf16 if that is the precision. The layer input belongs to
    the residual stream, which stays float32. There are as many experts as a layer with the coupler has.
    """

    def __init__(self, config: GNNMoEConfig, batch: int, precision: str, device: torch.device) -> None:
        self.device, self.experts = device, experts_given(config)
        L, E, D = config.max_seq_length, self.experts, config.embed_dim
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.sets: list[tuple[Tensor, Tensor]] = []
        for _ in range(INPUT_SETS):
            x_EBLD = normal(E, batch, L, D).to(DTYPES[precision])
            layer_input = normal(batch, L, D).requires_grad_(True)
            self.sets.append((x_EBLD.permute(1, 2, 0, 3).requires_grad_(True), layer_input))
        self._cotangents = [normal(batch, L, D) for _ in range(INPUT_SETS)]
        self._cast: dict[torch.dtype, list[Tensor]] = {torch.float32: self._cotangents}

    def cotangent(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return a gradient of the output, in the type of the output."""
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
        output = self.coupler.reference(expert_outputs, layer_input)
        assert output is not None, "a coupler without a reference has no such form"
        return output


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
        """Run forward and backward; return the output and all gradients."""
        output = self.forward(number)
        leaves = [*self.inputs.sets[number % INPUT_SETS], *self.parameters]
        cotangent = self.inputs.cotangent(number, output.dtype)
        return output, torch.autograd.grad(output, leaves, cotangent, allow_unused=True)

    def accumulate(self) -> None:
        """Run forward and backward as a training does, into the gradients of all leaves; then drop these."""
        output = self.forward(0)
        output.backward(self.inputs.cotangent(0, output.dtype))
        for leaf in (*self.inputs.sets[0], *self.parameters):
            leaf.grad = None

    def reference_in_float32(self) -> Result:
        """Return what ``step(0)`` should return: ``reference()`` in float32, or ``forward`` without it."""
        x, u = (tensor.detach().float().requires_grad_(True) for tensor in self.inputs.sets[0])
        with products_in("fp32"):
            output = self.coupler.reference(x, u)
            output = self.coupler(x, u) if output is None else output
            cotangent = self.inputs.cotangent(0, output.dtype)
            gradients = torch.autograd.grad(output, [x, u, *self.parameters], cotangent, allow_unused=True)
        return output.detach(), gradients

    def known(self) -> list[Tensor]:
        """Return the tensors that exist before a step."""
        return [*self.parameters, *self.coupler.buffers(), *(x for one in self.inputs.sets for x in one)]


# --- parity: is a form right before it is fast? ----------------------------------------------------


class Parity:
    """Compares forms with ``reference()`` in float32 on the same numbers."""

    def __init__(self) -> None:
        self._expected: dict[str, Result] = {}
        self.differences: dict[str, float] = {}

    def look(self, runner: Runner, found: Result) -> None:
        """Keep the largest difference of ``found``, over the output and every gradient.

        Gradients of parameters may differ by ``SLACK`` times more, relative to the largest of all parameter
        gradients: a sum over tokens that almost cancels has few correct digits in any form.
        """
        subject = runner.form.subject
        if subject not in self._expected:
            self._expected[subject] = runner.reference_in_float32()
        output, gradients = self._expected[subject]
        parameters = [_values(one, output) for one in gradients[INPUTS:]]
        largest = SLACK * torch.stack([one.abs().max() for one in parameters]).max() if parameters else None
        scales = [None] * (1 + INPUTS) + [largest] * len(parameters)
        self.differences[runner.form.key] = max(
            largest_difference(_values(one, output), _values(other, output), scale)
            for one, other, scale in zip((found[0], *found[1]), (output, *gradients), scales, strict=True)
        )


def _values(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Return a tensor in float32; a missing gradient is 0."""
    return like.new_zeros(()) if tensor is None else tensor.detach().float()


def largest_difference(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Return the largest absolute difference over ``scale``, by default the largest expected value.

    Raises:
        ValueError: the difference is not a finite number.
    """
    scale = expected.abs().max() if scale is None else scale
    difference = float(((found.detach() - expected).abs() / scale.clamp(min=1e-30)).max())
    if not math.isfinite(difference):
        raise ValueError(f"the largest difference from what is expected is {difference}")
    return difference


def parity_rows(
    forms: Sequence[Form], batch: int, machine: Machine, precisions: Sequence[str]
) -> list[SpeedRow]:
    """Run each form once in each precision; nothing is timed."""
    rows = []
    for precision in precisions:
        for form in forms:
            config, parity = form.config, Parity()
            row = machine.row(PARITY, form.subject, form.name, precision, batch, config, config.gnn_layers)
            try:
                runner = Runner(form, FormInputs(config, batch, precision, machine.device), precision)
                with products_in(precision):
                    found = runner.step(0)
                parity.look(runner, found)
                row.largest_difference = parity.differences[form.key]
            except Exception as error:
                row.error = failure_text(error)
            rows.append(row)
    return rows


# --- time and memory -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """How often to time, and what to measure beside the time."""

    rounds: int = 5
    warmup: int = 2
    memory: bool = True
    forward: bool = True
    check: bool = True
    """Compare each form with ``reference()`` in float32."""


def coupler_rows(
    case: str, forms: Sequence[Form], batch: int, machine: Machine, precision: str, timing: Timing
) -> list[SpeedRow]:
    """Time forms of one E, D and L, alternating; a form that fails becomes a row with its error."""
    by_key = {form.key: form for form in forms}
    runners: dict[str, Runner] = {}
    parity, device, rounds = Parity(), machine.device, timing.rounds
    with products_in(precision):
        config = forms[0].config
        inputs = FormInputs(config, batch, precision, device)
        rates = machine.rates(precision, config, batch * config.max_seq_length)

        def make(key: str) -> TimedStep:
            runners[key] = Runner(by_key[key], inputs, precision)
            return runners[key].step

        def check(key: str, found: Result) -> None:
            parity.look(runners[key], found)

        checked = check if timing.check else None
        turns = in_turn(list(by_key), make, checked, machine, rounds=rounds, warmup=timing.warmup)
        alive = {key: runners[key] for key, turn in turns.items() if turn.error is None}
        slow = [key for key, turn in turns.items() if turn.slow]
        forward: dict[str, list[float]] = {}
        if timing.forward and alive:
            steps = {key: runner.forward for key, runner in alive.items()}
            forward = timed(steps, slow, device, rounds=rounds, warmup=1)
        rows = {}
        for key, form in by_key.items():
            layers, turn = form.config.gnn_layers, turns[key]
            row = machine.row(case, form.subject, form.name, precision, batch, form.config, layers, turn)
            row.forward_seconds = forward.get(key, [])
            row.largest_difference = parity.differences.get(key)
            rows[key] = row
        for key, runner in alive.items():
            rows[key].flops = _flops(runner, batch * runner.form.config.max_seq_length)
            if timing.memory:
                _measure_memory(rows[key], runner, key in slow)
    _add_bounds(rows, by_key, inputs.experts, rates)
    return list(rows.values())


def _flops(runner: Runner, tokens: int) -> int:
    """Return the FLOPs of forward + backward: three times those of the formula, or else of the counter."""
    own = runner.coupler.flops(tokens)
    if own is None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            runner.forward(0)
        own = counter.get_total_flops()
    return TRAINING * own


def _measure_memory(row: SpeedRow, runner: Runner, slow: bool) -> None:
    """Add saved and peak bytes to a row; a failure is a remark."""
    if runner.form.compile_mode is not None and runner.device.type != "cuda":
        return  # the tracker of tensors sees no compiled tensors
    try:
        row.saved_bytes = saved_bytes(lambda: runner.forward(0), runner.known(), runner.device)
        if slow:
            row.remark = f"peak not measured: a step takes over {SLOW_SECONDS:.0f} s"
            return
        batches = [{str(k): tensor for k, tensor in enumerate(one)} for one in runner.inputs.sets]
        peak = peak_bytes(runner.accumulate, (runner.module, batches), runner.device)
    except Exception as error:
        row.remark = f"memory not measured: {failure_text(error)}"
        return
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in runner.known()}
    row.peak_bytes = None if peak is None else peak - sum(held.values())


def _add_bounds(rows: dict[str, SpeedRow], forms: dict[str, Form], experts: int, rates: Rates) -> None:
    """Add the rates and bounds; a form that computes more than another form does not raise the floor.

    A form that is faster than its floor gets a remark.
    """
    for key, row in rows.items():
        size = ELEMENT_BYTES[row.precision]
        row.floor_bytes = floor_bytes(row.tokens, experts, row.width, size)
        row.matrix_flops_per_second = rates.flops_per_second
        row.copy_bytes_per_second = rates.bytes_per_second
        if row.flops is not None:
            of_subject = [one.flops for one in rows.values() if one.subject == row.subject and one.flops]
            row.floor_seconds = rates.seconds(min(of_subject, default=0), row.floor_bytes)
            row.roofline_seconds = roofline_seconds(forms[key].config, row.tokens, size, rates)
        if row.median and row.floor_seconds and row.median < row.floor_seconds:
            row.remark = "; ".join(filter(None, [row.remark, BELOW_FLOOR]))
