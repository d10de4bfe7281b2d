"""The jobs of ``--suite cpu``: S1 to S6, and what a coupler costs by E and by N."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from bench.config import DataConfig, ExecutionConfig, ModelConfig, PlacesConfig, RunConfig, TrainingConfig
from bench.speeding.coupler_rows import Timing, coupler_rows
from bench.speeding.curve import VOCABULARY, curve_jobs
from bench.speeding.forms import compiled_name, forms_of
from bench.speeding.harness_rows import harness_rows
from bench.speeding.jobs import Job
from bench.speeding.machine import Machine
from bench.speeding.rows import SpeedRow
from bench.speeding.step_rows import Variant, step_rows
from bench.speeding.targets import AUTO, CHUNKED, EAGER, EXPERTS, GNN, GNN_SAVED, HGNN, LINEAR, PLAIN
from gnnmoe.config import GNNMoEConfig

FOLDED = {"activation": "none", "residual": "false"}


@dataclass(frozen=True)
class CpuScale:
    """The sizes of the suite; the tests take small ones."""

    batch: int = 32
    length: int = 128
    width: int = 256
    saved_experts: int = 16
    saved_batch: int = 2
    """For the saved bytes alone: a ratio that does not depend on the batch."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Of the whole steps: that of the preset quick."""
    step_batch: int = 16
    vocabulary: int = VOCABULARY
    steps: int = 40
    rounds: int = 7
    step_rounds: int = 15
    curve_experts: tuple[int, ...] = (2, 4, 8, 16)
    curve_batches: tuple[int, ...] = (2, 8, 32)
    curve_batch: int = 8


def cpu_jobs(
    places: PlacesConfig, compile_mode: str | None = None, scale: CpuScale | None = None
) -> list[Job]:
    """Return the jobs in order; ``places`` says where the harness's text is."""
    scale = scale or CpuScale()
    jobs = [
        Job("S1, S2: HGNN", partial(_forms, scale, HGNN, {}), 60),
        Job("S1, S2: HGNN linear", partial(_forms, scale, LINEAR, FOLDED), 50),
        Job("S3: GNN", partial(_pairwise, scale), 15),
        Job("S3: GNN, saved bytes", partial(_saved, scale), 10),
        Job("S4: experts and head", partial(_steps, scale, compile_mode), 30),
        Job("S5, S6: the harness", partial(_harness, scale, places), 30),
    ]
    return jobs + curve_jobs(scale.curve_experts, scale.curve_batch, scale.curve_batches, scale.length,
                             scale.width, "fp32", scale.rounds)  # fmt: skip


def _plain(scale: CpuScale, **changes: object) -> GNNMoEConfig:
    config = GNNMoEConfig(max_seq_length=scale.length, embed_dim=scale.width, vocab_size=1)
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def _forms(scale: CpuScale, case: str, options: dict[str, str], machine: Machine) -> list[SpeedRow]:
    forms = forms_of(case, _plain(scale, coupler_options=options))
    forms = [form for form in forms if form.name in ("vectorized", "pyg", "loop")]
    return coupler_rows(case, forms, scale.batch, machine, "fp32", Timing(rounds=scale.rounds))


def _pairwise(scale: CpuScale, machine: Machine) -> list[SpeedRow]:
    forms = forms_of("GNN", _plain(scale, coupler_type="GNN"))
    return coupler_rows(GNN, forms, scale.batch, machine, "fp32", Timing(rounds=scale.rounds))


def _saved(scale: CpuScale, machine: Machine) -> list[SpeedRow]:
    config = _plain(scale, coupler_type="GNN", num_experts=scale.saved_experts)
    timing = Timing(rounds=1, forward=False)
    return coupler_rows(GNN_SAVED, forms_of("GNN", config), scale.saved_batch, machine, "fp32", timing)


def _steps(scale: CpuScale, compile_mode: str | None, machine: Machine) -> list[SpeedRow]:
    config, loop = scale.model.resolved(scale.vocabulary), ExecutionConfig(experts="loop")

    def timed(case: str, *variants: Variant) -> list[SpeedRow]:
        return step_rows(case, variants, config, scale.step_batch, machine, rounds=scale.step_rounds)

    rows = timed(EXPERTS, Variant("loop", loop), Variant(AUTO, ExecutionConfig()),
                 Variant("batched", ExecutionConfig(experts="batched")))  # fmt: skip
    rows += timed("head", Variant(CHUNKED, loop), Variant(PLAIN, loop, plain_head=True))
    if compile_mode is not None:
        compiled = replace(loop, compile=True, compile_mode=compile_mode)  # pyright: ignore[reportArgumentType]
        rows += timed("compile", Variant(EAGER, loop), Variant(compiled_name(compile_mode), compiled))
    return rows


def _harness(scale: CpuScale, places: PlacesConfig, machine: Machine) -> list[SpeedRow]:
    training = TrainingConfig(batch_size=scale.step_batch, max_steps=scale.steps, min_steps_per_epoch=1)
    config = RunConfig(model=scale.model, data=DataConfig(), training=training, places=places)
    return harness_rows(config, machine)
