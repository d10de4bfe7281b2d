"""What is said about experts, on experts of which the answer is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import special_ortho_group

from bench.measure.experts import Experts, cosines, effective_rank, without
from bench.measure.similarity import (
    debiased_cka,
    feature_shape,
    hsic,
    matched,
    projection,
)
from bench.record import FEATURE_BYTES, Communication, Diagnostics, NotMeasured, is_measured
from bench.run.__main__ import main
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.experts import ExpertLoop
from tests.bench._runs import only_folder
from tests.bench.conftest import TINY

E, D, L, ROWS = 4, 16, 16, 8


def model_of(coupler: str = "mean", layers: int = 2) -> GNNMoEModel:
    config = GNNMoEConfig(
        vocab_size=50, embed_dim=D, num_experts=E, num_layers=layers, num_heads=2, max_seq_length=L,
        coupler_type=coupler, dropout_rate=0.1,
    )  # fmt: skip
    model = GNNMoEModel(config, seed=3)
    with torch.no_grad():  # weights large enough that the experts and the gate do something
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(50, (ROWS, L + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}


def concluded(model: GNNMoEModel, rows: int | None = None) -> tuple[Diagnostics, dict[str, np.ndarray]]:
    mixing: Communication = {
        f"layer_{number}": {"mixing": dict.fromkeys("0123", 0.25)} for number in range(2)
    }
    found, arrays = Experts(batch_of(), rows).conclude(model, mixing, 0.0)
    assert is_measured(found)
    return found, arrays


def naive_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The definition: the mean of a kernel over all ordered quadruples of different tokens."""
    K, L_, n = x @ x.T, y @ y.T, len(x)
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L_, 0)
    one = np.ones(n)
    return (
        np.trace(K @ L_)
        + (one @ K @ one) * (one @ L_ @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L_ @ one)
    ) / (n * (n - 3))


def test_hsic_is_the_mean_over_all_quadruples_of_different_tokens():
    """Song et al. 2012, theorem 5: the U-statistic, whatever is added to all features."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 3)), random.normal(size=(7, 2))
    K, M, n = x @ x.T, y @ y.T, range(7)
    quadruples = [(i, j, q, r) for i in n for j in n for q in n for r in n if len({i, j, q, r}) == 4]
    mean = np.mean([K[i, j] * (M[i, j] + M[q, r] - 2 * M[i, q]) for i, j, q, r in quadruples])
    assert hsic(x, y) == pytest.approx(mean, rel=1e-10)
    assert hsic(x, y) == pytest.approx(naive_hsic(x, y), rel=1e-10)
    assert hsic(x + 3.0, y - 5.0) == pytest.approx(mean, rel=1e-9)


def test_cka_is_independent_of_rotation_and_scale_and_agrees_with_gram_matrices():
    random = np.random.default_rng(1)
    x, y = random.normal(size=(60, 8)), random.normal(size=(60, 8))
    y[:, :4] += x[:, :4]
    x, y = x - x.mean(0), y - y.mean(0)
    ((found,),) = debiased_cka([x], [y])
    expected = naive_hsic(x, y) / math.sqrt(naive_hsic(x, x) * naive_hsic(y, y))
    assert found == pytest.approx(expected, rel=1e-10)
    turned = 7.0 * y @ special_ortho_group.rvs(8, random_state=2)
    assert debiased_cka([x], [turned])[0][0] == pytest.approx(expected, rel=1e-10)
    assert debiased_cka([y], [turned])[0][0] == pytest.approx(1, rel=1e-10)
    in_torch = debiased_cka([torch.from_numpy(x)], [torch.from_numpy(y)])
    assert in_torch[0][0] == pytest.approx(expected, rel=1e-10)


def test_cka_of_independent_updates_is_zero_where_plain_cka_is_a_half():
    random = np.random.default_rng(3)
    experts = [random.normal(size=(256, 256)) for _ in range(4)]
    experts = [one - one.mean(0) for one in experts]
    found = np.array(debiased_cka(experts, experts))
    assert np.abs(found[~np.eye(4, dtype=bool)]).max() < 0.02
    assert np.diag(found) == pytest.approx(1)
    K, M = experts[0] @ experts[0].T, experts[1] @ experts[1].T
    assert (K * M).sum() / math.sqrt((K * K).sum() * (M * M).sum()) == pytest.approx(0.51, abs=0.02)


def test_copies_are_alike_and_none_matters():
    model = model_of()
    for layer in model.layers:
        assert isinstance(layer.experts, ExpertLoop)
        for expert in layer.experts:
            expert.load_state_dict(layer.experts[0].state_dict())
    found, _ = concluded(model)
    for layer in found.layers:
        assert np.allclose(layer.cosine, 1, atol=1e-5)
        assert np.allclose(layer.cka, 1, atol=1e-5)
        assert layer.effective_rank == pytest.approx(1, abs=1e-4)
        assert np.allclose(layer.ablation_nats, 0, atol=1e-6)
    assert found.expert_cosine == pytest.approx(1, abs=1e-5)
    assert found.effective_experts == pytest.approx(4)


def test_orthogonal_updates_have_cosine_zero_and_full_rank():
    updates_NED = torch.randn(50, E, D, generator=torch.Generator().manual_seed(0)).double()
    basis = torch.linalg.qr(updates_NED.mT).Q.mT * 3.0  # (N, E, D): equal lengths, orthogonal
    assert torch.allclose(cosines(basis), torch.eye(E).double(), atol=1e-12)
    assert effective_rank(basis) == pytest.approx(E, rel=1e-5)
    assert effective_rank(torch.zeros(5, E, D).double()) == pytest.approx(1)
    unequal = torch.diag(torch.tensor([3.0, 1.0])).double().expand(5, 2, 2)  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(unequal) == pytest.approx(math.exp(entropy), rel=1e-6)


def test_ablation_is_the_rise_of_the_loss_of_a_model_whose_expert_is_replaced(monkeypatch):
    model, batch = model_of("gate").eval(), batch_of()
    found, _ = concluded(model)
    before = model.token_nll(batch["input_ids"], batch["targets"])
    for number, layer in enumerate(model.layers):
        for expert in range(E):
            with monkeypatch.context() as patch:
                of_layer = layer.experts.forward
                patch.setattr(layer.experts, "forward", lambda x, e=expert, f=of_layer: without(f(x), e))
                rise = (model.token_nll(batch["input_ids"], batch["targets"]) - before).double().flatten()
            assert found.layers[number].ablation_nats[expert] == pytest.approx(float(rise.mean()), abs=1e-6)
            error = float(rise.std()) / math.sqrt(len(rise))
            assert found.layers[number].ablation_standard_error[expert] == pytest.approx(error, rel=1e-3)
    outputs = torch.randn(1, 1, 3, 2)
    assert torch.allclose(without(outputs, 1)[:, :, 1], (outputs[:, :, 0] + outputs[:, :, 2]) / 2)


def test_a_gate_that_depends_on_nothing_has_no_mutual_information():
    model = model_of("gate")
    with torch.no_grad():
        for layer in model.layers:
            layer.coupler.get_parameter("router.weight").zero_()
    found, _ = concluded(model)
    assert found.mutual_information == pytest.approx(0, abs=1e-12)
    assert found.layers[0].load == pytest.approx([1 / E] * E)


def test_a_one_hot_gate_has_the_entropy_of_its_choices(monkeypatch):
    """Of 128 tokens, the id modulo 4 chooses the expert."""
    model, batch = model_of("gate"), batch_of()
    chosen = batch["input_ids"] % E
    for layer in model.layers:
        one_hot = torch.nn.functional.one_hot(chosen, E).float()
        monkeypatch.setattr(layer.coupler, "token_weights", lambda x, u=None, w=one_hot: w)
    found, _ = concluded(model)
    shares = np.bincount(chosen.flatten().numpy(), minlength=E) / chosen.numel()
    assert found.mutual_information == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-9)
    assert found.layers[1].load == pytest.approx(shares)


def test_pieces_change_nothing_and_the_mode_and_the_random_state_stay():
    model = model_of("topk").train()
    state = torch.get_rng_state()
    whole, features = concluded(model)
    parts, _ = concluded(model, rows=3)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert parts.expert_cka == pytest.approx(whole.expert_cka, abs=1e-5)
    assert parts.layers[1].ablation_nats == pytest.approx(whole.layers[1].ablation_nats, abs=1e-6)
    sampled = Experts(batch_of(), None).sample(model)
    assert np.allclose(sampled["layer_1.cka"], whole.layers[1].cka, atol=1e-6)
    for number, layer in enumerate(whole.layers):
        kept = features[f"layer_{number}.features"].astype(float)
        assert kept.shape == (E, ROWS * L, D)
        assert (kept**2).mean((1, 2)) == pytest.approx(1, abs=1e-3)
        of_kept = debiased_cka(list(kept - kept.mean(1, keepdims=True)), list(kept))
        assert np.allclose(of_kept, layer.cka, atol=1e-3)  # the features are those of the experts, in order


def test_similarity_is_not_rounded_to_the_precision_of_the_model():
    """In bf16 the cosines of near copies would be multiples of 1/256, and their CKA could exceed 1."""
    model = model_of("gate")
    rough = GNNMoEModel(model.config, seed=3, precision="bf16")
    rough.load_state_dict(model.state_dict())
    for layer in rough.layers:
        assert isinstance(layer.experts, ExpertLoop)
        for number, expert in enumerate(layer.experts):
            expert.load_state_dict(layer.experts[0].state_dict())
            with torch.no_grad():
                noise = torch.Generator().manual_seed(number)
                for parameter in expert.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    found, _ = concluded(rough)
    between = [layer.cosine[i][j] for layer in found.layers for i in range(E) for j in range(i)]
    assert all(256 * value % 1 for value in between)
    assert max(value for layer in found.layers for row in layer.cka for value in row) <= 1 + 1e-9


@pytest.mark.parametrize("wrong", [-0.1, math.nan])
def test_weights_that_are_no_weights_are_not_measured_and_end_no_run(monkeypatch, wrong):
    model = model_of("GNN")
    for layer, weight in zip(model.layers, (0.25, wrong), strict=True):
        weights = torch.full((ROWS, L, E), 0.25)
        weights[0, 0, 0] = weight
        monkeypatch.setattr(layer.coupler, "token_weights", lambda x, u=None, w=weights: w)
    found, _ = concluded(model)
    assert is_measured(found.layers[0].load)
    assert isinstance(found.layers[1].load, NotMeasured)
    assert isinstance(found.mutual_information, NotMeasured)
    assert "gave a weight below 0 or not finite" in found.mutual_information.reason
    assert Experts(batch_of(), None).sample(model)["layer_1.load"].isnan().all()


def test_without_weights_by_token_and_with_one_expert_the_reason_is_stated():
    found, _ = concluded(model_of("GNN"))
    assert isinstance(found.mutual_information, NotMeasured)
    assert found.mutual_information.reason == "the coupler has no weights that depend on the token"
    dense = model_of("dense")
    found, arrays = Experts(batch_of(), None).conclude(dense, {}, 0.0)
    assert isinstance(found, NotMeasured)
    assert (found.reason, arrays) == ("a layer has one expert", {})
    assert Experts(batch_of(), None).sample(dense) == {}


@pytest.mark.parametrize("shape", [(8, 2048, 64), (16, 2048, 256), (64, 2048, 512), (768, 2048, 1024)])
def test_the_features_of_a_run_take_at_most_300_kilobytes_and_show_the_permutation(shape):
    experts, _, width = shape
    n, d = feature_shape(*shape)
    assert experts * n * d * 2 <= FEATURE_BYTES <= 300_000
    assert n >= 30
    if experts > 64:
        return
    random = np.random.default_rng(5)
    updates = random.normal(size=(8, n, 4)) @ random.normal(size=(8, 4, width))  # each in its own directions
    noisy = updates + 0.3 * random.normal(size=updates.shape)
    onto = projection(width, d)
    onto = np.eye(width) if onto is None else onto
    order = random.permutation(8)
    kept = [(found @ onto).astype(np.float16).astype(float) for found in (updates, noisy[order])]
    ours, theirs = (list(found - found.mean(1, keepdims=True)) for found in kept)
    assert matched(np.array(debiased_cka(ours, theirs))) == tuple(np.argsort(order))


def test_a_run_without_diagnostics_has_the_same_losses_and_run_id(tmp_path, small_data_dir):
    words = [*TINY, "--coupler", "gate", "--no-speed", "--data-dir", str(small_data_dir)]
    folders = []
    for place, more in ((tmp_path / "with", []), (tmp_path / "without", ["--no-diagnostics"])):
        assert main([*words, *more, "--results-dir", str(place)]) == 0
        folders.append(only_folder(place))
    ours, without_it = (json.loads((folder / "record.json").read_text()) for folder in folders)
    assert ours["run_id"] == without_it["run_id"]
    assert ours["quality"] == without_it["quality"]
    assert (folders[0] / "history.jsonl").read_text() == (folders[1] / "history.jsonl").read_text()
    assert without_it["diagnostics"] == {"value": None, "reason": "left out by --no-diagnostics"}
    assert not (folders[1] / "experts.npz").exists()
    found, total = ours["diagnostics"], ours["time"]["seconds"]["total"]
    assert found["share_of_run"] == pytest.approx(found["seconds"] / total)
    assert 0 < found["seconds"] < total
    sampled = np.load(folders[0] / "communication.npz")
    assert len(sampled["layer_0.effective_rank"]) == len(sampled["step"])
    ranks = sampled["layer_0.effective_rank"]
    assert ranks[-1] == pytest.approx(found["layers"][0]["effective_rank"], rel=0.2)
    assert np.load(folders[0] / "experts.npz")["layer_0.features"].dtype == np.float16
