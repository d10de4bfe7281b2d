"""The audit of the losses that are reported, and of one batch in training mode."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.check.audit import Scored, audit_evaluation, audit_training, chosen_batches
from bench.check.behaviour import causality, replaced, starts
from bench.check.subject import Subject, run_check
from bench.data.corpus import Corpus, load_corpus
from bench.data.loader import create_loader
from bench.run.__main__ import main
from bench.training.evaluation import evaluate
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.registry import executed_again
from gnnmoe.model import GNNMoEModel
from tests.check import cheating_couplers, unusual_couplers

BATCH, LENGTH = 8, 32
HERE = Path(__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus(small_data_dir) -> Corpus:
    return load_corpus(data_dir=small_data_dir, source="folder")


class Case:
    """A small model with a coupler, scored as a run scores it, and audited."""

    def __init__(self, corpus: Corpus, coupler: str, precision: str = "fp32") -> None:
        self.corpus, self.coupler, self.precision = corpus, coupler, precision
        self.config = GNNMoEConfig(
            coupler_type=coupler, num_experts=3, embed_dim=8, num_layers=2, max_seq_length=LENGTH,
            dropout_rate=0.1, vocab_size=corpus.vocabulary.size,
        )  # fmt: skip
        self.model = self.build()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        self.loader = create_loader(
            corpus, "val", BATCH, max_seq_length=LENGTH, stride=LENGTH // 2, num_samples=16
        )
        self.batch = next(iter(create_loader(corpus, "train", BATCH, max_seq_length=LENGTH)))

    def build(self) -> GNNMoEModel:
        return GNNMoEModel(self.config, seed=0, precision=self.precision)

    def fresh(self) -> GNNMoEModel:
        with executed_again(self.coupler):
            model = self.build()
        model.load_state_dict(self.model.state_dict())
        return model

    def evaluation(self, rows: int | None = None, full: bool = False, fresh: bool = True):
        nll = evaluate(self.model, self.loader, CPU, rows).nll
        scored = [Scored("validation", self.loader, nll, seconds=1.0)]
        make = self.fresh if fresh else None
        return audit_evaluation(self.model, scored, rows=rows, seed=0, full=full, fresh=make)

    def training(self, rows: int | None = None):
        words = self.corpus.vocabulary.size
        return audit_training(self.model, self.batch, rows=rows, seed=0, words=words)


@pytest.fixture
def case(corpus) -> Callable[..., Case]:
    return lambda coupler, **options: Case(corpus, coupler, **options)


def names(classes) -> list[str]:
    return [cls.__name__ for cls in classes]


@pytest.mark.parametrize("name", cheating_couplers.IN_EVALUATION)
def test_a_leak_in_evaluation_is_caught_and_its_token_named(case, name):
    precision = "bf16" if name == "UnderAutocast" else "fp32"
    cheat = case(f"{HERE / 'cheating_couplers.py'}:{name}", precision=precision)
    if name == "AfterTraining":
        assert cheat.evaluation()[0].passed
        for _ in range(3):
            cheat.model.train()(cheat.batch["input_ids"])
    if name == "Remembers":
        evaluate(cheat.model, cheat.loader, CPU)  # as a run does while it trains
    check, about = cheat.evaluation(full=name == "AtFewTokens")  # too few windows for a sample of those
    assert not check.passed
    assert check.detail.startswith("validation window ")
    how = "sees another sequence" if name in ("FromTheNextSequence", "OverTheEnd") else "sees its future"
    assert ("the coupler keeps something" if name == "Remembers" else how) in check.detail
    assert 0 < about["windows"] <= about["all_windows"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "Compiled" else name
             for name in cheating_couplers.IN_TRAINING],
)  # fmt: skip
def test_a_leak_in_training_alone_is_caught_there(case, name):
    cheat = case(f"{HERE / 'cheating_couplers.py'}:{name}")
    assert cheat.evaluation()[0].passed
    if name == "Compiled":
        assert cheat.training().passed
        cheat.model.compile(backend="eager")
    check = cheat.training()
    assert not check.passed
    assert "in training mode, the loss of sequence" in check.detail
    assert "it sees its future; so the model has trained with a leak" in check.detail


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", names(unusual_couplers.ALL))
def test_an_unusual_honest_coupler_passes_both(case, name, precision):
    check_honest(case, name, precision)


@pytest.mark.parametrize(("name", "precision"), [("mean", "fp32"), ("topk", "bf16"), ("HGNN", "bf16")])
def test_an_honest_coupler_passes_both(case, name, precision):
    check_honest(case, name, precision)


def check_honest(case, name, precision):
    outside = name in names(unusual_couplers.ALL)
    honest = case(f"{HERE / 'unusual_couplers.py'}:{name}" if outside else name, precision=precision)
    for rows in (None, 3, 1):
        check, about = honest.evaluation(rows)
        assert check.passed, check.detail
        assert about["tolerance_nats"] == 0.0
        assert not about["deterministic_kernels"]
    check = honest.training()
    assert check.passed, check.detail


@pytest.mark.parametrize("rows", [1, 3])
def test_the_micro_batch_of_the_run_is_tried(case, rows):
    cheat = case(f"{HERE / 'cheating_couplers.py'}:InEvaluation")
    assert not cheat.evaluation(rows)[0].passed
    across = case(f"{HERE / 'cheating_couplers.py'}:FromTheNextSequence")
    assert across.evaluation(rows)[0].passed == (rows == 1)  # a row alone sees no other


def test_it_looks_at_a_tenth_or_at_all_and_says_at_how_much(case):
    honest = case("mean")
    check, about = honest.evaluation()
    batches, windows = len(honest.loader), len(honest.loader.dataset_obj)
    assert (about["batches"], about["all_batches"]) == (max(1, batches // 10), batches)
    assert (about["windows"], about["all_windows"], about["mode"]) == (BATCH, windows, "sample")
    assert windows % BATCH, "there is a smaller batch, which is not the one"
    assert check.detail.endswith("none moves with a later token or another window, bit for bit")
    assert about["share_of_evaluation"] == about["seconds"]  # the evaluation was said to take a second
    _, about = honest.evaluation(full=True)
    assert (about["windows"], about["batches"], about["mode"]) == (windows, batches, "full")


def noisy(model: GNNMoEModel, size: float, always: bool) -> None:
    """Let the model's hidden states differ from call to call, as kernels that add in any order do."""

    def add_noise(module, args, output):
        if always or not torch.are_deterministic_algorithms_enabled():
            return output + size * torch.rand_like(output)
        return output

    model.output_norm.register_forward_hook(add_noise)


@pytest.mark.parametrize("coupler", ["mean", "cheat"])
def test_bits_that_differ_by_themselves_are_allowed_for_and_a_leak_is_not(case, coupler):
    name = f"{HERE / 'cheating_couplers.py'}:InEvaluation" if coupler == "cheat" else "mean"
    honest = coupler == "mean"
    one = case(name)
    noisy(one.model, 1e-6, always=False)
    check, about = one.evaluation(fresh=False)
    assert check.passed == honest
    assert about["deterministic_kernels"] == honest
    assert about["tolerance_nats"] == 0.0

    other = case(name)
    torch.manual_seed(0)
    noisy(other.model, 1e-6, always=True)
    check, about = other.evaluation(fresh=False)
    assert check.passed == honest, check.detail
    if honest:
        assert 0 < about["tolerance_nats"] < 1e-3
        assert "four times the difference of two scorings" in check.detail


def test_losses_that_another_call_does_not_give_again_are_refused(case):
    one = case("mean")
    noisy(one.model, 0.1, always=True)
    check, _ = one.evaluation(fresh=False)
    assert not check.passed
    assert "the reported loss is" in check.detail


@pytest.mark.parametrize("name", ["CrossLayer", "InFloat32", "FromTheNextSequence", "FarAhead", "InTraining"])
def test_the_check_before_training_finds_what_shows_at_the_run_s_length(name):
    caught = _causality(f"{HERE / 'cheating_couplers.py'}:{name}")
    if name == "InTraining":  # where gradients are taken, which no check before training does
        assert caught.passed
    else:
        assert f"of a sequence of {LENGTH} moves when" in caught.detail
    assert _causality("topk").passed


def _causality(coupler: str):
    config = GNNMoEConfig(coupler_type=coupler, embed_dim=8, num_layers=2, max_seq_length=LENGTH)
    return run_check("causality", lambda: causality(Subject(config, 0, CPU)))


@pytest.mark.slow
def test_nothing_is_left_behind(case):
    one = case(f"{HERE / 'unusual_couplers.py'}:Counts")
    one.model.train()
    one.model.layers[0].eval()
    before = copy.deepcopy(one.model.state_dict())
    flags = [module.training for module in one.model.modules()]
    state = torch.get_rng_state()
    one.training()
    one.model.compile(backend="eager")
    one.training()
    assert [module.training for module in one.model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    after = one.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in one.model.parameters())


def test_cuts_lie_within_what_is_scored_and_prefer_what_the_model_is_sure_of():
    scored = torch.zeros(9, 12, dtype=torch.bool)
    scored[:, 6:] = True
    scored[4] = False  # a window past the end of the text
    reported = torch.full((9, 12), 5.0)
    reported[:, 8] = 0.01
    draw = np.random.default_rng(0)
    sure, seen = 0, set()
    for _ in range(200):
        [start] = starts(scored, reported, draw)
        [whole] = (start == 0).nonzero().flatten().tolist()
        assert start[whole - 1] == 12
        cuts = {row: int(cut) for row, cut in enumerate(start) if row not in (whole, whole - 1)}
        assert cuts.pop(4, 12) == 12
        assert all(7 <= cut <= 11 for cut in cuts.values())
        seen |= set(cuts.values())
        sure += sum(cut == 9 for row, cut in cuts.items() if row % 2)
    assert seen == {7, 8, 9, 10, 11}
    assert sure > 200 * 2 * 0.8  # of about 2.7 odd rows that are cut
    first, second = starts(scored[:2], reported[:2], draw)
    assert all(7 <= cut <= 11 for cut in first)
    assert second.tolist() == [12, 0]
    [alone] = starts(scored[:1], reported[:1], draw)
    assert 7 <= int(alone[0]) <= 11


def test_every_input_from_the_cut_on_is_another():
    ids = torch.arange(12).view(2, 6) % 5
    changed = replaced(ids, ids.clone(), torch.tensor([2, 6]), words=5)
    assert torch.equal(changed[0, :2], ids[0, :2])
    assert (changed[0, 2:] != ids[0, 2:]).all()
    assert torch.equal(changed[1], ids[1])
    assert changed.max() < 5


@pytest.mark.parametrize(("sizes", "number"), [([8], 1), ([8] * 9, 1), ([8] * 19, 1), ([8] * 64, 6)])
def test_one_batch_in_ten_is_drawn_from_all_over_the_text(sizes, number):
    for seed in range(20):
        found = chosen_batches(sizes, False, np.random.default_rng(seed))
        assert len(set(found)) == len(found) == number
        stretch = len(sizes) / number
        assert all(abs(place - (part + 0.5) * stretch) <= stretch for part, place in enumerate(found))
    assert chosen_batches(sizes, True, np.random.default_rng(0)) == list(range(len(sizes)))
    assert chosen_batches([8] * 29 + [3], False, np.random.default_rng(0))[-1] == 29  # of another size


@pytest.fixture(scope="module")
def run_flags(small_data_dir) -> list[str]:
    """Flags of a run of a second or two that is audited whole."""
    return (
        "--embed-dim 8 --num-layers 2 --max-seq-length 32 --batch-size 4 --max-steps 4 --eval-every 4"
        " --num-eval-samples 8 --warmup-steps 1 --speed-warmup-steps 1 --speed-steps 1 --no-plots"
        f" --min-steps-per-epoch 1 --audit full --quiet --data-dir {small_data_dir}"
    ).split()


@pytest.fixture(scope="module")
def leaking(run_flags, tmp_path_factory):
    """Runs of a coupler that leaks once it has trained: refused, and allowed all the same."""
    results = tmp_path_factory.mktemp("leaking")
    coupler = f"{HERE / 'cheating_couplers.py'}:AfterTraining"
    found = {}
    for study, more in (("refused", []), ("allowed", ["--allow-failed-check"])):
        status = main([*run_flags, "--results-dir", str(results),
                       "--coupler", coupler, "--study", study, *more])  # fmt: skip
        [path] = (results / study).glob("*/record.json")
        found[study] = status, json.loads(path.read_text()), path.parent
    return found


def test_a_run_that_leaks_after_training_fails_and_has_no_perplexity(leaking):
    status, record, folder = leaking["refused"]
    assert (status, record["status"]) == (1, "check_failed")
    assert record["quality"] == {"value": None, "reason": "the run did not get this far"}
    assert not (folder / "nll.npz").exists()
    failed = [name for name, check in record["check"]["checks"].items() if not check["passed"]]
    assert failed == ["evaluation_audit"]
    assert "evaluation_audit: validation window" in record["error"]
    assert record["check"]["audit"]["mode"] == "full"


def test_allowed_it_keeps_its_perplexity_under_the_status(leaking):
    status, record, folder = leaking["allowed"]
    assert (status, record["status"]) == (1, "check_failed")
    assert record["quality"]["validation"]["tokens"] == 256
    assert (folder / "nll.npz").exists()
    audit = record["check"]["audit"]
    assert audit["share_of_evaluation"] == audit["seconds"] / audit["evaluation_seconds"]


LATE = '''
import torch
from examples.twenty_line_coupler import NormCoupler

class Late(NormCoupler):
    """Changes a setting while it trains, at the batch of the run.

    .. math:: y = f(m)

    Shapes: those of the mean. Source: this test.
    """

    config_fields = ()

    def forward(self, expert_outputs, layer_input=None):
        training = self.training and torch.is_grad_enabled()
        if training and len(expert_outputs) == 4 and expert_outputs.shape[1] == 32:
            torch.set_flush_denormal(True)
        return super().forward(expert_outputs, layer_input)
'''


def test_a_coupler_that_changes_a_setting_while_it_trains_fails(small_data_dir, tmp_path, run_flags):
    path = tmp_path / "late.py"
    path.write_text(LATE)
    try:
        assert main([*run_flags, "--results-dir", str(tmp_path / "r"), "--coupler", f"{path}:Late"]) == 1
    finally:
        torch.set_flush_denormal(False)
    [found] = (tmp_path / "r").glob("*/*/record.json")
    record = json.loads(found.read_text())
    assert record["status"] == "check_failed"
    assert "flushing of denormal numbers: False → True" in record["check"]["checks"]["settings"]["detail"]
