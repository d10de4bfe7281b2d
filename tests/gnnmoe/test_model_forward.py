"""The model: what ``forward`` takes, gives and refuses (DESIGN, "Names", "The leak check")."""

import pytest
import torch
import torch.nn.functional as F

from gnnmoe.experts import ExpertBlock, ExpertLoop
from gnnmoe.model import GNNMoELayer
from tests.gnnmoe._support import (
    assert_near,
    make_model,
    normal,
    perturbed,
    small_config,
    token_ids,
)

pytestmark = pytest.mark.core("layer")
IDS = token_ids(3, 8)


def test_forward_gives_loss_logits_and_auxiliary_loss():
    model = make_model()
    output = model(IDS, targets=IDS)
    assert set(output) == {"loss", "logits", "auxiliary_loss"}
    assert output["logits"].shape == (3, 8, 50)
    assert output["loss"].shape == output["auxiliary_loss"].shape == ()
    assert output["auxiliary_loss"] == 0
    assert model(IDS)["loss"] is None
    short = model(IDS, targets=IDS, return_logits=False)
    assert short["logits"] is None
    assert torch.equal(short["loss"], output["loss"])


def test_loss_is_the_plain_cross_entropy_of_the_logits():
    model = make_model()
    targets = token_ids(3, 8, seed=5)
    targets[1, 3:6] = -100
    output = model(IDS, targets=targets)
    kept = targets != -100
    expected = -output["logits"].log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).mean()
    assert_near(output["loss"], expected)
    nll = model.token_nll(IDS, targets)
    assert nll.shape == targets.shape
    assert not nll.requires_grad
    assert torch.count_nonzero(nll[~kept]) == 0
    assert_near(nll.double().sum() / kept.sum(), expected, torch.float32)


def test_labels_are_shifted_inside_and_targets_are_not():
    model = make_model()
    labels = IDS.clone()
    labels[0, 4] = -100
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    assert torch.equal(model(IDS, labels=labels)["loss"], model(IDS, targets=targets)["loss"])
    logits = model(IDS)["logits"]
    assert_near(
        model(IDS, labels=IDS)["loss"], F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    )
    with pytest.raises(ValueError, match=r"labels .* or targets .*, not both"):
        model(IDS, labels=labels, targets=targets)


def test_right_padding_is_inert():
    model = make_model()
    lengths = torch.tensor([8, 5, 1])
    mask = (torch.arange(8) < lengths[:, None]).long()
    other = torch.where(mask.bool(), IDS, (IDS + 11) % 50)
    one, two = (model(ids, attention_mask=mask, labels=ids) for ids in (IDS, other))
    assert_near(one["loss"], two["loss"])
    assert_near(one["logits"][mask.bool()], two["logits"][mask.bool()])
    by_hand = IDS.masked_fill(~mask.bool(), -100)
    assert_near(one["loss"], model(IDS, labels=by_hand)["loss"])
    assert_near(one["logits"][1, :5], model(IDS[1:2, :5])["logits"][0])
    targets = token_ids(3, 8, seed=5)
    masked = model(IDS, attention_mask=mask, targets=targets)["loss"]
    assert_near(masked, model(IDS, targets=targets.masked_fill(~mask.bool(), -100))["loss"])
    assert (masked - model(IDS, targets=targets)["loss"]).abs() > 1e-6


@pytest.mark.parametrize("row", [[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]])
def test_masks_with_padding_elsewhere_are_refused(row):
    mask = torch.ones(3, 8, dtype=torch.int64)
    mask[1, :4] = torch.tensor(row)
    with pytest.raises(ValueError, match="only padding on the right is supported"):
        make_model()(IDS, attention_mask=mask)


def test_too_long_input_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="input_ids has length 9; max_seq_length is 8"):
        model(token_ids(1, 9))
    with pytest.raises(ValueError, match="length 9"):
        model.token_nll(token_ids(1, 9), token_ids(1, 9))


def test_auxiliary_losses_of_all_layers_are_added_up_apart_from_the_loss():
    fields = {"coupler_type": "tests.gnnmoe._support:WithAuxiliaryLoss", "num_layers": 2}
    model, plain = make_model(**fields), make_model(coupler_type="mean", num_layers=2)
    squares = []
    for layer in model.layers:
        layer.coupler.register_forward_pre_hook(lambda _, args: squares.append(args[0].square().mean()))
    output, expected = model.train()(IDS, targets=IDS), plain(IDS, targets=IDS)
    assert_near(output["auxiliary_loss"], sum(squares) + 2)
    assert_near(output["loss"], expected["loss"])
    assert model.eval()(IDS, targets=IDS)["auxiliary_loss"] == 0  # never in an evaluation


def test_expert_is_a_pre_norm_transformer_block():
    """Attention written out, head by head."""
    block = perturbed(ExpertBlock(small_config())).double()
    x = normal(2, 5, 6)
    y = F.layer_norm(x, (6,), block.norm1.weight, block.norm1.bias)
    q, k, v = (y @ block.qkv.weight.T + block.qkv.bias).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        scores = q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    middle = x + torch.cat(heads, -1) @ block.proj.weight.T + block.proj.bias
    y = F.layer_norm(middle, (6,), block.norm2.weight, block.norm2.bias)
    hidden = F.gelu(y @ block.up.weight.T + block.up.bias)
    assert block.up.weight.shape == (24, 6)
    assert_near(block(x), middle + hidden @ block.down.weight.T + block.down.bias)


def test_layer_adds_the_coupled_experts_to_its_input():
    layer = perturbed(GNNMoELayer(small_config())).double()
    x = normal(2, 5, 6)
    outputs = layer.expert_outputs(x)
    assert isinstance(layer.experts, ExpertLoop)
    for e, expert in enumerate(layer.experts):
        assert_near(outputs[:, :, e], expert(x))
    assert_near(layer(x), x + layer.coupler(outputs, x))


def test_model_is_embeddings_layers_norm_and_tied_head():
    model = make_model()
    x = model.token_embedding.weight[IDS] + model.position_embedding.weight[:8]
    for layer in model.layers:
        x = layer(x)
    logits = model.output_norm(x) @ model.token_embedding.weight[:50].T + model.head.bias
    assert_near(model(IDS)["logits"], logits)
    assert [name for name, _ in model.head.named_parameters()] == ["bias"]


def test_dropout_acts_in_training_only():
    model = make_model(dropout_rate=0.5)
    assert torch.equal(model(IDS)["logits"], model(IDS)["logits"])
    model.train()
    assert not torch.equal(model(IDS)["logits"], model(IDS)["logits"])
