"""Couplers alone: forward, and forward + backward, of each form in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.floors import TRAINING, floor_bytes, roofline_seconds
from bench.measure.timing import TimedStep
from bench.speeding.forms import Form, FormInputs, Result, Runner, experts_given
from bench.speeding.machine import Machine, products_in
from bench.speeding.memory import peak_bytes, saved_bytes
from bench.speeding.parity import Parity
from bench.speeding.rows import SpeedRow
from bench.speeding.turns import SLOW_SECONDS, Contender, Turn, failure_text, in_turn, timed

ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}


@dataclass(frozen=True)
class Timing:
    """How often to time, and what to measure beside the time."""

    rounds: int = 5
    warmup: int = 2
    memory: bool = True
    forward: bool = True
    check: bool = True
    """Hold each form against ``reference()`` in float32."""


def coupler_rows(case: str, forms: Sequence[Form], batch: int, machine: Machine, precision: str,
                 timing: Timing) -> list[SpeedRow]:  # fmt: skip
    """Time forms of one E, D and L in turn; one that fails becomes a row with its error."""
    with products_in(precision):
        return _coupler_rows(case, forms, batch, machine, precision, timing)


def _coupler_rows(case: str, forms: Sequence[Form], batch: int, machine: Machine, precision: str,
                  timing: Timing) -> list[SpeedRow]:  # fmt: skip
    device, inputs = machine.device, FormInputs(forms[0].config, batch, precision, machine.device)
    rates, parity, given = machine.rates(precision), Parity(), experts_given(forms[0].config)
    runners: dict[str, Runner] = {}

    def contender(form: Form) -> Contender:
        def make() -> TimedStep:
            runners[form.key] = Runner(form, inputs, precision)
            return runners[form.key].step

        def check(found: Result) -> None:
            parity.look(runners[form.key], found)

        return Contender(form.key, make, check if timing.check else None)

    turns = in_turn([contender(form) for form in forms], device, rounds=timing.rounds, warmup=timing.warmup)
    alive = {name: runners[name] for name, turn in turns.items() if turn.error is None}
    slow = [name for name, turn in turns.items() if turn.slow]
    forward: dict[str, list[float]] = {}
    if timing.forward and alive:
        steps = {name: runner.forward for name, runner in alive.items()}
        forward = timed(steps, slow, device, rounds=timing.rounds, warmup=1)
    rows = []
    for form in forms:
        row = _row(case, form, batch, machine, precision, turns[form.key])
        row.floor_bytes = floor_bytes(row.tokens, given, row.width, ELEMENT_BYTES[precision])
        row.forward_seconds = forward.get(form.key, [])
        row.largest_difference = parity.differences.get(form.key)
        if form.key in alive:
            row.flops = _flops(alive[form.key], row.tokens)
            row.roofline_seconds = roofline_seconds(form.config, row.tokens, ELEMENT_BYTES[precision], rates)
            if timing.memory:
                try:
                    _measure_memory(row, alive[form.key], form.key in slow)
                except Exception as error:
                    row.remark = f"memory not measured: {failure_text(error)}"
        rows.append(row)
    for row in rows:  # a form that computes more than another cannot raise the floor
        fewest = min((one.flops for one in rows if one.subject == row.subject and one.flops), default=None)
        if row.flops is not None and row.floor_bytes is not None:
            row.floor_seconds = rates.seconds(fewest or 0, row.floor_bytes)
    return rows


def _row(case: str, form: Form, batch: int, machine: Machine, precision: str, turn: Turn) -> SpeedRow:
    config = form.config
    L, E, D = config.max_seq_length, config.num_experts, config.embed_dim
    return SpeedRow(
        case=case, subject=form.subject, form=form.name, device=machine.device.type, precision=precision,
        batch=batch, length=L, experts=E, width=D, layers=config.gnn_layers, seconds=turn.seconds,
        first_seconds=turn.first_seconds, error=turn.error,
        matrix_flops_per_second=machine.rates(precision).flops_per_second,
        copy_bytes_per_second=machine.rates(precision).bytes_per_second,
    )  # fmt: skip


def _flops(runner: Runner, tokens: int) -> int:
    """Return the FLOPs of forward + backward: three times the formula's, else the counter's."""
    own = runner.coupler.flops(tokens)
    if own is None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            runner.forward(0)
        own = counter.get_total_flops()
    return TRAINING * own


def _measure_memory(row: SpeedRow, runner: Runner, slow: bool) -> None:
    if runner.form.compile_mode is not None and runner.device.type != "cuda":
        return  # the tracker of tensors sees no compiled ones
    row.saved_bytes = saved_bytes(lambda: runner.forward(0), runner.known(), runner.device)
    if slow:
        row.remark = f"peak not measured: a step takes over {SLOW_SECONDS:.0f} s"
        return
    batches = [{str(k): tensor for k, tensor in enumerate(one)} for one in runner.inputs.sets]
    peak = peak_bytes(runner.accumulate, (runner.module, batches), runner.device)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in runner.known()}
    row.peak_bytes = None if peak is None else peak - sum(held.values())
