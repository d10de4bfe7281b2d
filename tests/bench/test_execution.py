"""Form, precision and compilation: flags, identity, what is refused, and steps that are the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from bench.config import ExecutionConfig, RunConfig, TrainingConfig
from bench.measure.memory import meter_for, predict_peak
from bench.measure.timing import training_flops_per_token
from bench.run.__main__ import main
from bench.run.prepare import identity, run_id
from bench.training.step import Execution, make_optimizer, training_step
from bench.tune.control import witnessed
from gnnmoe import GNNMoEConfig, GNNMoEModel, coupler_names
from tests.bench._runs import only_run, refusal, results_of

CPU = torch.device("cpu")
VOCABULARY = 300


def config(**fields) -> GNNMoEConfig:
    shape = {"embed_dim": 16, "num_layers": 1, "max_seq_length": 8, "vocab_size": VOCABULARY}
    return GNNMoEConfig(**{**shape, **fields})


def batch(rows: int = 4, length: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    return {"input_ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def execution(**flags) -> Execution:
    return Execution(ExecutionConfig(**flags), CPU)


def test_auto_takes_what_is_faster_on_the_device():
    assert [ExecutionConfig().experts_on(kind) for kind in ("cpu", "mps", "cuda")] == [
        "loop", "loop", "batched",
    ]  # fmt: skip
    assert ExecutionConfig(experts="loop").experts_on("cuda") == "loop"
    for experts in ("loop", "batched"):
        made = execution(experts=experts)
        assert made.experts == experts
        built = type(made.build(config(), 0).layers[0].experts).__name__.lower()
        assert built.startswith("batch") is (experts == "batched")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--precision tf32", "tf32 is for NVIDIA GPUs from the A100 on"),
        ("--compile --compile-mode reduce-overhead", "CUDA graphs"),
        ("--compile-mode reduce-overhead", "does nothing without --compile"),
        ("--compile --control-memory", "drop --compile, or --control-memory"),
    ],
)
def test_what_means_nothing_is_refused(tiny, flags, said, capsys):
    assert said in refusal(capsys, [*tiny, *flags.split()])


def test_identity_holds_only_what_differs_from_a_plain_run():
    def known(device: str = "cpu", **flags):
        return identity(RunConfig(execution=ExecutionConfig(**flags)), {}, "0" * 64, device)

    assert "execution" not in known()
    assert known() == known(experts="loop")
    assert known("cuda")["execution"] == {"experts": "batched"}
    assert known("cuda", experts="loop").get("execution") is None
    forms = [{}, {"experts": "batched"}, {"precision": "bf16"}, {"precision": "tf32"}, {"compile": True},
             {"compile": True, "compile_mode": "reduce-overhead"}]  # fmt: skip
    assert len({run_id(known(**flags)) for flags in forms}) == len(forms)
    assert known(precision="bf16", compile=True)["execution"] == {"precision": "bf16", "compile": "default"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("coupler", ["HGNN", "dense"])
def test_trained_steps_of_both_forms_are_the_same(coupler, precision):
    """Loss, norm of the gradient, clipping, decay and update: the parameters stay together; equal FLOPs."""
    settings = TrainingConfig(learning_rate=1e-2, weight_decay=0.5, max_grad_norm=0.1)
    models = [
        execution(experts=experts, precision=precision).build(config(coupler_type=coupler), 0)
        for experts in ("loop", "batched")
    ]
    assert training_flops_per_token(models[0]) == training_flops_per_token(models[1])
    optimizers = [make_optimizer(model, settings) for model in models]
    start = copy.deepcopy(models[0].state_dict())
    close = 1e-5 if precision == "fp32" else 3e-2
    for step in range(2):
        found = [
            training_step(model, batch(seed=step), optimizer, settings.max_grad_norm)
            for model, optimizer in zip(models, optimizers, strict=True)
        ]
        for ours, theirs in zip(*found, strict=True):
            assert float(theirs) == pytest.approx(float(ours), rel=close)
    one, other = (model.state_dict() for model in models)
    assert list(one) == list(other)
    if precision == "fp32":  # Adam's first steps have the size of the rate whatever the gradient's
        moved = max(float((one[name] - start[name]).abs().max()) for name in one)
        for name, value in one.items():
            assert float((other[name] - value).abs().max()) < 1e-2 * moved, name


def test_memory_is_predicted_in_the_form_and_precision_that_run():
    flags, small = ExecutionConfig(experts="batched", precision="bf16"), config(coupler_type="mean")
    model = Execution(flags, CPU).build(small, 0).train()
    optimizer = make_optimizer(model, TrainingConfig())
    data = batch()

    def step():
        training_step(model, data, optimizer, 1.0)

    step()
    measured = meter_for(CPU).measure(step, (model, optimizer, [data])).peak_allocated_bytes
    predicted = predict_peak(small, 4, 8, TrainingConfig(), execution=flags)
    assert predicted == pytest.approx(measured, rel=1e-3)
    assert predicted != predict_peak(small, 4, 8, TrainingConfig())


@pytest.fixture
def fresh_dynamo():
    """No compiled code from before; a second compilation of anything is an error."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("coupler", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("HGNN", "topk"))) for name in coupler_names()
])  # fmt: skip
def test_a_compiled_step_has_no_graph_break_and_is_compiled_once(coupler, fresh_dynamo):
    """``fullgraph`` refuses a break; the second batch, an evaluation between, and no further graph."""
    model = (
        execution(experts="batched", precision="bf16")
        .build(config(coupler_type=coupler, num_experts=3, gnn_layers=1), 0)
        .train()
    )
    optimizer = make_optimizer(model, TrainingConfig())
    model.compile(backend="eager", fullgraph=True)
    for seed in range(3):
        data = batch(seed=seed)
        training_step(model, data, optimizer, 1.0)
        model.eval().token_nll(data["input_ids"], data["targets"])
        model.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_step_is_the_step(fresh_dynamo):
    """Through the compiler's autograd, with the head's chunks recomputed in the backward."""
    plain = execution(experts="batched").build(config(coupler_type="mean", num_experts=2), 0).train()
    model = copy.deepcopy(plain)
    model.compile(backend="aot_eager", fullgraph=True)
    assert (model.is_compiled, plain.is_compiled, copy.deepcopy(model).is_compiled) == (True, False, False)
    optimizers = [make_optimizer(each, TrainingConfig()) for each in (plain, model)]
    for seed in range(2):
        with witnessed(model) as seen:
            found = [
                training_step(each, batch(seed=seed), optimizer, 1.0, 2)
                for each, optimizer in zip((plain, model), optimizers, strict=True)
            ]
        assert seen == [(2, 8)] * 2
        for ours, theirs in zip(*found, strict=True):
            assert float(theirs) == pytest.approx(float(ours), rel=1e-5)
    for ours, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_compiled_run_in_another_form_and_precision_says_so_and_passes_the_leak_check(tiny, monkeypatch):
    """The compiler itself is replaced: only that it is called, before the first step, and timed."""
    compiled = []
    monkeypatch.setattr(GNNMoEModel, "compile", lambda self, **options: compiled.append(options))
    assert main([*tiny, "--experts", "batched", "--precision", "bf16", "--compile"]) == 0
    _, record = only_run(results_of(tiny))
    execution = {"experts": "batched", "precision": "bf16", "compile": "default"}
    assert record["used"]["execution"] == execution
    assert record["used"]["precision"] == "bf16"
    assert record["check"]["checks"]["trained_isolation"]["passed"]
    assert record["time"]["seconds"]["compile"] > 0
    assert compiled[0] == {"mode": "default"}
    assert len(compiled) >= 2, "the speed pass compiles its copy"


def test_compiling_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(GNNMoEModel, "compile", lambda self, **_: None)
    made = execution(compile=True)
    model = made.build(config(), 0)
    before = copy.deepcopy(model.state_dict())
    made.compile_now(model, batch(), 2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
