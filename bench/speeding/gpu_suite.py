"""The jobs of ``--suite gpu``: S7 to S10, what S4 says of GPUs, and a coupler's cost by E and by N.

In order of worth, since the time on a GPU may end: first whether it is right there, then whole steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from bench.speeding.coupler_rows import Timing, coupler_rows
from bench.speeding.curve import VOCABULARY, alone, curve_jobs
from bench.speeding.forms import Form, compiled_name, forms_of
from bench.speeding.jobs import Job
from bench.speeding.machine import Machine
from bench.speeding.parity import parity_rows
from bench.speeding.rows import SpeedRow
from bench.speeding.sizes import subjects
from bench.speeding.step_rows import Variant, executed, step_rows
from bench.speeding.targets import (
    ALONE,
    AUTO,
    CHUNKED,
    EAGER,
    EXPERTS,
    EXPERTS_16,
    LOOP,
    PARITY,
    PLAIN,
    STEP_32,
    STEP_64_EXPERTS,
    STEP_256,
    STEP_LARGE,
)
from gnnmoe.config import GNNMoEConfig

PRECISION = "bf16"
MOST_LOOP_SECONDS = 20.0
"""Of one step of the loop over all tokens, which is done three times."""


@dataclass(frozen=True)
class GpuScale:
    """The sizes of the suite; the tests take small ones."""

    baseline: GNNMoEConfig = field(default_factory=lambda: GNNMoEConfig(
        embed_dim=256, num_layers=4, num_heads=4, max_seq_length=128, vocab_size=VOCABULARY,
    ))  # fmt: skip
    large: GNNMoEConfig = field(default_factory=lambda: GNNMoEConfig(
        num_experts=8, embed_dim=512, num_layers=4, num_heads=8, max_seq_length=256, vocab_size=VOCABULARY,
    ))  # fmt: skip
    batch: int = 32
    large_batch: int = 64
    many_batch: int = 256
    alone_batch: int = 1024
    loop_batch: int = 4
    """For the first look at the loop, which goes token by token."""
    many_experts: int = 64
    rounds: int = 20
    curve_experts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    curve_batch: int = 64
    curve_batches: tuple[int, ...] = (8, 32, 128, 512, 1024)


def gpu_jobs(scale: GpuScale | None = None) -> list[Job]:
    """Return the jobs in order of worth."""
    scale = scale or GpuScale()
    baseline = scale.baseline

    def steps(
        name: str, case: str, config: GNNMoEConfig, batch: int, modes: tuple[str, ...], seconds: float
    ) -> Job:
        variants = [Variant(EAGER, executed("auto", PRECISION))]
        variants += [Variant(compiled_name(mode), executed("auto", PRECISION, mode)) for mode in modes]
        return Job(name, partial(_steps, case, variants, config, batch, scale.rounds), seconds)

    def experts(name: str, case: str, number: int, mode: str | None, seconds: float) -> Job:
        config = replace(baseline, num_experts=number)
        variants = [Variant(kind, executed(kind, PRECISION, mode)) for kind in ("loop", AUTO)]
        return Job(name, partial(_steps, case, variants, config, scale.batch, scale.rounds), seconds)

    couplers = alone(replace(baseline, num_layers=1))
    many = replace(baseline, num_experts=scale.many_experts)
    return [
        Job("parity", partial(_parity, baseline), 15),
        steps("S8, S10: step B 32", STEP_32, baseline, scale.batch, ("default", "reduce-overhead"), 65),
        steps("S10: step E 64", STEP_64_EXPERTS, many, scale.batch, (), 12),
        experts("S4: experts", EXPERTS, baseline.num_experts, None, 6),
        experts("S4: experts, E 16", EXPERTS_16, 4 * baseline.num_experts, None, 9),
        steps("S8: step B 256", STEP_256, baseline, scale.many_batch, ("default",), 35),
        steps("S8: step D 512", STEP_LARGE, scale.large, scale.large_batch, ("default",), 40),
        *(Job(f"S7: {name}", partial(_alone, scale, name, couplers[name]), 12) for name in ALONE),
        Job("S9: token by token", partial(_token_by_token, scale), 50),
        Job("head", partial(_heads, scale), 6),
        *curve_jobs(scale.curve_experts, scale.curve_batch, scale.curve_batches, baseline.max_seq_length,
                    baseline.embed_dim, PRECISION, scale.rounds),
        experts("S4: experts, compiled", "experts, compiled", baseline.num_experts, "default", 70),
    ]  # fmt: skip


def _parity(config: GNNMoEConfig, machine: Machine) -> list[SpeedRow]:
    """Hold every coupler against its reference, and the batched experts against the loop, in small."""
    small = replace(config, embed_dim=64, max_seq_length=32)
    forms = [form for name, one in subjects("all", small) for form in forms_of(name, one)[:1]]
    rows = parity_rows(forms, 4, machine, ("fp32", "bf16"))
    for precision in ("fp32", "bf16"):
        variants = [Variant(kind, executed(kind, precision)) for kind in ("loop", "batched")]
        rows += step_rows(
            PARITY, variants, replace(small, vocab_size=640), 4, machine, rounds=1, memory=False
        )
    return rows


def _steps(case: str, variants: list[Variant], config: GNNMoEConfig, batch: int, rounds: int,
           machine: Machine) -> list[SpeedRow]:  # fmt: skip
    return step_rows(case, variants, config, batch, machine, rounds=rounds, warmup=5)


def _heads(scale: GpuScale, machine: Machine) -> list[SpeedRow]:
    execution = executed("auto", PRECISION)
    variants = [Variant(CHUNKED, execution), Variant(PLAIN, execution, plain_head=True)]
    return _steps("head", variants, scale.baseline, scale.batch, scale.rounds, machine)


def _alone(scale: GpuScale, name: str, config: GNNMoEConfig, machine: Machine) -> list[SpeedRow]:
    forms = [form for form in forms_of(name, config, ("default",)) if form.name in ("vectorized", "compiled")]
    timing = Timing(rounds=scale.rounds, warmup=5)
    return coupler_rows(f"{name} alone", forms, scale.alone_batch, machine, PRECISION, timing)


def _token_by_token(scale: GpuScale, machine: Machine) -> list[SpeedRow]:
    """Time the loop over tokens once: all of them, or a few and as many times that as there are more."""
    forms = forms_of("HGNN", replace(scale.baseline, num_layers=1))
    default, loop = (next(form for form in forms if form.name == name) for name in ("vectorized", "loop"))

    def timed(*which: Form, batch: int, rounds: int = scale.rounds) -> list[SpeedRow]:
        timing = Timing(rounds=rounds, memory=False, forward=False)
        return coupler_rows(LOOP, which, batch, machine, "fp32", timing)

    few = timed(loop, batch=scale.loop_batch, rounds=1)[0]
    times = scale.batch / scale.loop_batch
    if few.median is None or few.median * times <= MOST_LOOP_SECONDS:
        return timed(default, loop, batch=scale.batch)
    rows = timed(default, batch=scale.batch)
    few.remark = f"{few.tokens:,} tokens timed, and the time multiplied by {times:.0f}"
    few.batch, few.seconds = scale.batch, [times * value for value in few.seconds]
    return [*rows, few]
