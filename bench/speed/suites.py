"""What is measured: the jobs of the command's own flags, of ``--suite cpu`` and of ``--suite gpu``."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from time import perf_counter

import torch

from bench.check.leak_check import refuse_wrong_hypergraph, refuse_wrong_names
from bench.config import DataConfig, ExecutionConfig, ModelConfig, PlacesConfig, RunConfig, TrainingConfig
from bench.device import SIZES, recover, refuse_too_large
from bench.speed.forms import Form, Timing, compiled_name, coupler_rows, forms_of, parity_rows
from bench.speed.machine import Machine, failure_text
from bench.speed.record import CURVE, PARITY, STEPS, SpeedRecord, SpeedRow
from bench.speed.steps import Variant, executed, harness_rows, step_rows
from gnnmoe.config import GNNMoEConfig, Refused, brief, unknown_name
from gnnmoe.cost import least_coupler_parameters, least_training_bytes
from gnnmoe.couplers.registry import coupler_names
from gnnmoe.layers.base import LAYERS

VOCABULARY = 33_278  # WikiText-2's
GPU_PRECISION = "bf16"
MOST_LOOP_SECONDS = 20.0
"""The longest step of the loop over all tokens that is run; it is run three times."""
LETTERS = {"E": "num_experts", "D": "embed_dim", "B": "batch", "L": "max_seq_length"}
FOLDED = {"activation": "none", "residual": "false"}

# The cases of both suites, and forms of whole steps.
HGNN, LINEAR, GNN, GNN_SAVED = "HGNN", "HGNN linear", "GNN", "GNN, E 16"
EXPERTS, EXPERTS_16 = "experts", "experts, E 16"
STEP_32, STEP_256, STEP_LARGE, STEP_64_EXPERTS = "step B 32", "step B 256", "step D 512", "step E 64"
LOOP = "HGNN, token by token"
ALONE = ("static", "gate", "HGNN", "HNHN", "GNN")
EAGER, AUTO, CHUNKED, PLAIN = "eager", "auto", "chunked head", "plain head"


# --- jobs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Rows that belong together; ``seconds`` is about how long they take on the intended machine."""

    name: str
    rows: Callable[[Machine], list[SpeedRow]]
    seconds: float = 0.0


def run_jobs(
    jobs: Sequence[Job],
    machine: Machine,
    record: SpeedRecord,
    *,
    budget: float | None,
    on_job: Callable[[str], None],
    on_row: Callable[[SpeedRow], None],
) -> None:
    """Run jobs in order into the record, which is complete after each; a failing job becomes a row.

    A job that would likely end after ``budget`` seconds is left out by name; a smaller job may follow.
    """
    start = perf_counter()
    for job in jobs:
        spent = perf_counter() - start
        if budget is not None and (spent >= budget or spent + job.seconds > budget):
            record.leave_out(job.name + (f" (about {job.seconds:.0f} s)" if job.seconds else ""))
            continue
        on_job(job.name)
        rows = _rows(job, machine)
        record.add(rows, machine.to_record())
        for row in rows:
            on_row(row)
        _forget()


def _rows(job: Job, machine: Machine) -> list[SpeedRow]:
    try:
        return job.rows(machine)
    except Exception as error:
        failure = failure_text(error)
    recover()
    kind, name = machine.device.type, job.name
    return [SpeedRow(case=name, subject=name, form="", device=kind, precision="fp32", error=failure)]


def _forget() -> None:
    """Free what one job leaves behind: memory, and code that was compiled for its sizes."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else a second batch size would be compiled for all sizes
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# --- --couplers and --sizes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A model's config at one size, and the number of sequences in a batch."""

    config: GNNMoEConfig
    batch: int

    def __str__(self) -> str:
        values = {name: getattr(self.config, field, self.batch) for name, field in LETTERS.items()}
        return ", ".join(f"{name} {value}" for name, value in values.items())


def sizes(text: str | None, config: GNNMoEConfig, batch: int) -> list[Size]:
    """Return the sizes of ``E=4,D=256,B=32,L=128;E=8``; ``config`` and ``batch`` give what is not named.

    Raises:
        Refused: the message says which part is wrong and what is allowed.
    """
    if text is None:
        return [Size(config, batch)]
    return [_size(part.strip(), config, batch) for part in text.split(";")]


def _size(part: str, config: GNNMoEConfig, batch: int) -> Size:
    how = "write sizes as E=4,D=256,B=32,L=128, several with ; between them"
    values: dict[str, int] = {}
    for one in part.split(","):
        letter, equals, number = (piece.strip() for piece in one.partition("="))
        if not equals:
            raise Refused(f"--sizes: {brief(one.strip() or part)} is no size; {how}.")
        if letter not in LETTERS:
            raise Refused(f"--sizes: {unknown_name('size', letter, LETTERS)}")
        if letter in values:
            raise Refused(f"--sizes: {letter} stands twice in {brief(part)}.")
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) < 1:
            raise Refused(f"--sizes: {letter} is {brief(number)}; it must be a whole number of at least 1.")
        values[letter] = int(number)
    named = {LETTERS[letter]: value for letter, value in values.items()}
    batch = named.pop("batch", batch)
    return Size(replace(config, **named), batch)


def subjects(text: str | None, config: GNNMoEConfig) -> list[tuple[str, GNNMoEConfig]]:
    """Return the couplers of ``a,b,c``, or of ``all``, under their names; None means the config's own.

    A name is one that ``--coupler`` takes, or the name of a hypergraph layer of HGNN.

    Raises:
        Refused: the message names the unknown coupler and the known ones.
    """
    if text is None:
        return [(subject_name(config), config)]
    known = {name: replace(config, coupler_type=name) for name in coupler_names()}
    known |= {layer: replace(config, coupler_type="HGNN", hgnn_conv_type=layer) for layer in LAYERS}
    if text.strip() == "all":
        asked = list(known.values())
    else:
        asked = []
        for name in (part.strip() for part in text.split(",")):
            if name not in known and ":" not in name:
                raise Refused(f"--couplers: {unknown_name('coupler', name, [*known, 'all'])}")
            asked.append(known[name] if name in known else replace(config, coupler_type=name))
    return list({subject_name(one): one for one in asked}.items())


def subject_name(config: GNNMoEConfig) -> str:
    """Return the name of a coupler; for the hypergraph coupler with its layer and its hyperedges."""
    options = [f"{name}={value}" for name, value in config.coupler_options.items() if name != "backend"]
    if config.coupler_type != "HGNN":
        return " ".join([config.coupler_type, *options])
    layer = [] if config.hgnn_conv_type == "HypergraphConv" else [config.hgnn_conv_type]
    return " ".join(["HGNN", *layer, config.static_hyperedge_strategy, *options])


def form_jobs(
    config: GNNMoEConfig,
    couplers: str | None,
    sizes_text: str | None,
    batch: int,
    precision: str,
    rounds: int,
    compile_mode: str | None,
    device: torch.device,
    *,
    whole_steps: bool = False,
) -> list[Job]:
    """Return one job per coupler and size; for whole steps one job per size, with the couplers alternating.

    Raises:
        Refused: an unknown coupler, option, strategy or size, or a size for which the memory is too small.
    """
    refuse_wrong_hypergraph(config)
    modes = () if compile_mode is None else (compile_mode,)
    by_coupler = [
        [(name, size) for size in sizes(sizes_text, subject, batch)]
        for name, subject in subjects(couplers, config)
    ]
    for _, size in chain(*by_coupler):
        refuse_wrong_names(size.config)
        refuse_too_large_to_time(size, device, whole_steps)
    if whole_steps:
        by_size = zip(*by_coupler, strict=True)
        return [_job_of_steps(of_one_size, precision, rounds, modes) for of_one_size in by_size]
    timing, jobs = Timing(rounds=rounds), []
    for name, size in chain(*by_coupler):
        forms = forms_of(name, size.config, modes)
        rows = partial(_of_forms, name, forms, size.batch, precision, timing)
        jobs.append(Job(f"{name}, {size}", rows))
    return jobs


def refuse_too_large_to_time(size: Size, device: torch.device, whole_steps: bool) -> None:
    """Refuse a size of which neither a whole step nor a coupler with its inputs fits into the memory.

    Raises:
        Refused: naming what it needs and what there is.
    """
    config = size.config
    lower: tuple[str, ...] = ("embed_dim", "num_experts", "max_seq_length", "batch_size")
    if whole_steps:
        needed, what = least_training_bytes(config, rows=size.batch, number_bytes=2), "a step of this size"
        lower = (*SIZES, "batch_size")
    else:
        inputs = size.batch * config.max_seq_length * config.num_experts * config.embed_dim
        needed, what = 8 * least_coupler_parameters(config) + 2 * inputs, "a coupler of this size"
    refuse_too_large(needed, device, what, lower=lower)


def _of_forms(
    case: str, forms: Sequence[Form], batch: int, precision: str, timing: Timing, machine: Machine
) -> list[SpeedRow]:
    return coupler_rows(case, forms, batch, machine, precision, timing)


def _job_of_steps(
    models: Sequence[tuple[str, Size]], precision: str, rounds: int, modes: Sequence[str]
) -> Job:
    size = models[0][1]
    kinds = [("", None), *((f", {compiled_name(mode)}", mode) for mode in modes)]
    variants = [
        Variant(f"{name}{how}", executed("auto", precision, mode), config=one.config)
        for how, mode in kinds
        for name, one in models
    ]

    def rows(machine: Machine) -> list[SpeedRow]:
        return step_rows(STEPS, variants, size.config, size.batch, machine, rounds=rounds)

    return Job(f"steps, {size}", rows)


# --- what both suites measure ----------------------------------------------------------------------


def curve_jobs(scale: CpuScale | GpuScale, length: int, width: int, precision: str) -> list[Job]:
    """Return the jobs of the plot: the couplers ``ALONE`` by number of experts, and by number of tokens."""
    plain = GNNMoEConfig(max_seq_length=length, embed_dim=width, vocab_size=1)
    places = [(replace(plain, num_experts=number), scale.curve_batch) for number in scale.curve_experts]
    places += [(plain, number) for number in scale.curve_batches if (plain, number) not in places]
    timing, jobs = Timing(rounds=scale.rounds, memory=False, forward=False, check=False), []
    for config, number in places:
        forms = [forms_of(name, one)[0] for name, one in couplers_alone(config).items()]
        rows = partial(_of_forms, CURVE, forms, number, precision, timing)
        jobs.append(Job(f"curve: E {config.num_experts}, N {number * length:,}", rows, 3))
    return jobs


def couplers_alone(config: GNNMoEConfig) -> dict[str, GNNMoEConfig]:
    """Return the couplers that are timed alone, by name."""
    couplers = {name: replace(config, coupler_type=name) for name in ALONE if name != "HNHN"}
    return couplers | {"HNHN": replace(config, coupler_type="HGNN", hgnn_conv_type="HNHN")}


# --- --suite cpu -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CpuScale:
    """The sizes of the suite; the tests take small sizes."""

    batch: int = 32
    length: int = 128
    width: int = 256
    saved_experts: int = 16
    saved_batch: int = 2
    """For the saved bytes alone: their ratio does not depend on the batch."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model of the whole steps: that of the preset quick."""
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
    """Return the jobs in order; ``places`` says where the text of the harness is."""
    scale = scale or CpuScale()
    plain = GNNMoEConfig(max_seq_length=scale.length, embed_dim=scale.width, vocab_size=1)
    graph, timing = replace(plain, coupler_type="GNN"), Timing(rounds=scale.rounds)

    def hypergraph(case: str, options: dict[str, str]) -> Callable[[Machine], list[SpeedRow]]:
        forms = forms_of(case, replace(plain, coupler_options=options))
        forms = [form for form in forms if form.name in ("vectorized", "pyg", "loop")]
        return partial(_of_forms, case, forms, scale.batch, "fp32", timing)

    pairwise = partial(_of_forms, GNN, forms_of("GNN", graph), scale.batch, "fp32", timing)
    many = forms_of("GNN", replace(graph, num_experts=scale.saved_experts))
    once = Timing(rounds=1, forward=False)
    saved = partial(_of_forms, GNN_SAVED, many, scale.saved_batch, "fp32", once)
    return [
        Job("HGNN", hypergraph(HGNN, {}), 60),
        Job("HGNN linear", hypergraph(LINEAR, FOLDED), 50),
        Job("GNN", pairwise, 15),
        Job("GNN, saved bytes", saved, 10),
        Job("experts and head", partial(_cpu_steps, scale, compile_mode), 30),
        Job("harness", partial(_harness, scale, places), 30),
        *curve_jobs(scale, scale.length, scale.width, "fp32"),
    ]


def _cpu_steps(scale: CpuScale, compile_mode: str | None, machine: Machine) -> list[SpeedRow]:
    config, loop = scale.model.resolved(scale.vocabulary), ExecutionConfig(experts="loop")
    batched = ExecutionConfig(experts="batched")

    def timed(case: str, *variants: Variant) -> list[SpeedRow]:
        return step_rows(case, variants, config, scale.step_batch, machine, rounds=scale.step_rounds)

    rows = timed(
        EXPERTS, Variant("loop", loop), Variant(AUTO, ExecutionConfig()), Variant("batched", batched)
    )
    rows += timed("head", Variant(CHUNKED, loop), Variant(PLAIN, loop, plain_head=True))
    if compile_mode is not None:
        compiled = executed("loop", "fp32", compile_mode)
        rows += timed("compile", Variant(EAGER, loop), Variant(compiled_name(compile_mode), compiled))
    return rows


def _harness(scale: CpuScale, places: PlacesConfig, machine: Machine) -> list[SpeedRow]:
    training = TrainingConfig(batch_size=scale.step_batch, max_steps=scale.steps, min_steps_per_epoch=1)
    config = RunConfig(model=scale.model, data=DataConfig(), training=training, places=places)
    return harness_rows(config, machine)


# --- --suite gpu -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuScale:
    """The sizes of the suite; the tests take small sizes."""

    baseline: GNNMoEConfig = field(
        default_factory=lambda: GNNMoEConfig(
            embed_dim=256, num_layers=4, num_heads=4, max_seq_length=128, vocab_size=VOCABULARY
        )
    )
    large: GNNMoEConfig = field(
        default_factory=lambda: GNNMoEConfig(
            num_experts=8,
            embed_dim=512,
            num_layers=4,
            num_heads=8,
            max_seq_length=256,
            vocab_size=VOCABULARY,
        )
    )
    batch: int = 32
    large_batch: int = 64
    many_batch: int = 256
    alone_batch: int = 1024
    loop_batch: int = 4
    """For the first look at the loop, which takes one token after the other."""
    many_experts: int = 64
    rounds: int = 20
    curve_experts: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    curve_batch: int = 64
    curve_batches: tuple[int, ...] = (8, 32, 128, 512, 1024)


def gpu_jobs(scale: GpuScale | None = None) -> list[Job]:
    """Return the jobs, the most important first, since the time on a GPU may end.

    Correctness comes first, then whole steps, then couplers alone and their cost by E and by N.
    """
    scale = scale or GpuScale()
    baseline = scale.baseline

    def steps(name: str, config: GNNMoEConfig, batch: int, modes: tuple[str, ...], seconds: float) -> Job:
        variants = [Variant(EAGER, executed("auto", GPU_PRECISION))]
        variants += [Variant(compiled_name(mode), executed("auto", GPU_PRECISION, mode)) for mode in modes]
        return Job(name, partial(_gpu_steps, name, variants, config, batch, scale.rounds), seconds)

    def experts(case: str, number: int, mode: str | None, seconds: float) -> Job:
        config = replace(baseline, num_experts=number)
        variants = [Variant(kind, executed(kind, GPU_PRECISION, mode)) for kind in ("loop", AUTO)]
        return Job(case, partial(_gpu_steps, case, variants, config, scale.batch, scale.rounds), seconds)

    couplers = couplers_alone(replace(baseline, num_layers=1))
    many = replace(baseline, num_experts=scale.many_experts)
    return [
        Job("parity", partial(_parity, baseline), 15),
        steps(STEP_32, baseline, scale.batch, ("default", "reduce-overhead"), 65),
        steps(STEP_64_EXPERTS, many, scale.batch, (), 12),
        experts(EXPERTS, baseline.num_experts, None, 6),
        experts(EXPERTS_16, 4 * baseline.num_experts, None, 9),
        steps(STEP_256, baseline, scale.many_batch, ("default",), 35),
        steps(STEP_LARGE, scale.large, scale.large_batch, ("default",), 40),
        *(Job(f"{name} alone", partial(_alone, scale, name, couplers[name]), 12) for name in ALONE),
        Job("token by token", partial(_token_by_token, scale), 50),
        Job("head", partial(_heads, scale), 6),
        *curve_jobs(scale, baseline.max_seq_length, baseline.embed_dim, GPU_PRECISION),
        experts("experts, compiled", baseline.num_experts, "default", 70),
    ]


def _parity(config: GNNMoEConfig, machine: Machine) -> list[SpeedRow]:
    """Compare every coupler with its reference, and the batched experts with the loop, at small sizes."""
    small = replace(config, embed_dim=64, max_seq_length=32)
    forms = [forms_of(name, one)[0] for name, one in subjects("all", small)]
    rows = parity_rows(forms, 4, machine, ("fp32", "bf16"))
    words = replace(small, vocab_size=640)
    for precision in ("fp32", "bf16"):
        variants = [Variant(kind, executed(kind, precision)) for kind in ("loop", "batched")]
        rows += step_rows(PARITY, variants, words, 4, machine, rounds=1, memory=False)
    return rows


def _gpu_steps(
    case: str, variants: list[Variant], config: GNNMoEConfig, batch: int, rounds: int, machine: Machine
) -> list[SpeedRow]:
    return step_rows(case, variants, config, batch, machine, rounds=rounds, warmup=5)


def _heads(scale: GpuScale, machine: Machine) -> list[SpeedRow]:
    execution = executed("auto", GPU_PRECISION)
    variants = [Variant(CHUNKED, execution), Variant(PLAIN, execution, plain_head=True)]
    return _gpu_steps("head", variants, scale.baseline, scale.batch, scale.rounds, machine)


def _alone(scale: GpuScale, name: str, config: GNNMoEConfig, machine: Machine) -> list[SpeedRow]:
    forms = [form for form in forms_of(name, config, ("default",)) if form.name in ("vectorized", "compiled")]
    timing = Timing(rounds=scale.rounds, warmup=5)
    return coupler_rows(f"{name} alone", forms, scale.alone_batch, machine, GPU_PRECISION, timing)


def _token_by_token(scale: GpuScale, machine: Machine) -> list[SpeedRow]:
    """Time the loop over all tokens once; a loop that is too slow is timed on a few tokens, and scaled up."""
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
