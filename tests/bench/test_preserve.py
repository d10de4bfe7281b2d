"""Whatever a probe does, everything is bit for bit as before (B7)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from bench.config import TrainingConfig
from bench.data.loader import create_loader, set_batch_size, set_epoch
from bench.device import attempt
from bench.measure.meters import meter_for
from bench.measure.preserve import preserved
from bench.training.step import make_optimizer, training_step
from gnnmoe import GNNMoEConfig, GNNMoEModel

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
TRAINING = TrainingConfig()


class Training:
    """A small training on a made corpus, with dropout, so that every random number counts."""

    def __init__(self, data_dir, device: str, steps: int) -> None:
        config = GNNMoEConfig(embed_dim=8, num_layers=1, max_seq_length=8, vocab_size=50, dropout_rate=0.1)
        self.device = torch.device(device)
        self.model = GNNMoEModel(config, seed=0).to(device)
        self.model.register_buffer("mask", torch.tensor([1.0, float("nan"), -0.0], device=device))
        self.optimizer = make_optimizer(self.model, TRAINING)
        self.loader = create_loader(data_dir, "train", 4, max_seq_length=8, pin_memory=False)
        self.model.head.eval()  # an unusual mode, which must stay
        self.model.position_embedding.weight.requires_grad_(False)
        self.train(steps)

    def train(self, steps: int) -> None:
        batches = iter(self.loader)
        for _ in range(steps):
            self.step(next(batches))

    def step(self, batch) -> None:
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        training_step(self.model, batch, self.optimizer, 1.0)

    def probe(self, fail: type[Exception] | None) -> None:
        """Change everything that can be changed, then fail."""
        model, optimizer = self.model, self.optimizer
        model.train()
        model.position_embedding.weight.requires_grad_(True)
        set_epoch(self.loader, 3)
        set_batch_size(self.loader, 2)
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        self.train(2)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.register_buffer("mask", None)
        model.head.bias.data = torch.ones(50, device=self.device)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, device=self.device))]})
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        torch.rand(1, device=self.device)
        if fail is not None:
            raise fail("CUDA error: out of memory")

    def bits(self) -> dict[str, object]:
        """Return all of it as bytes and plain values."""
        model, loader = self.model, self.loader
        assert loader.generator is not None
        found: dict[str, object] = {
            "python": random.getstate(),
            "numpy": [np.asarray(part).tobytes() for part in np.random.get_state()],  # noqa: NPY002
            "torch": as_bytes(torch.get_rng_state()),
            "cuda": [as_bytes(state) for state in torch.cuda.get_rng_state_all()]
            if torch.cuda.is_available()
            else [],
            "modes": [module.training for module in model.modules()],
            "trained": [parameter.requires_grad for parameter in model.parameters()],
            "objects": [(name, id(value)) for name, value in model.named_parameters()],
            "gradients": [p.grad if p.grad is None else as_bytes(p.grad) for p in model.parameters()],
            "groups": [
                {name: list(map(id, value)) if name == "params" else value for name, value in group.items()}
                for group in self.optimizer.param_groups
            ],
            "optimizer": {
                id(key): {name: as_bytes(value) for name, value in values.items()}
                for key, values in self.optimizer.state.items()
            },
            "loader": (loader.state(), list(loader.changes), as_bytes(loader.generator.get_state())),
            "next order": loader.sampler_obj.order().tolist(),
        }
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return found | {name: as_bytes(tensor) for name, tensor in tensors}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", [0, 2], ids=["before training", "in training"])
@pytest.mark.parametrize("fail", [None, ValueError, KeyboardInterrupt])
def test_b7_everything_is_as_before_a_probe(fail, steps, device, small_data_dir):
    """B7: bit for bit, also where the probe fails; empty stays empty and None stays None."""
    training = Training(small_data_dir, device, steps)
    before = training.bits()
    if fail is None:
        with preserved(training.model, training.optimizer, [training.loader]):
            training.probe(None)
            changed = training.bits()
        assert {name for name in before if before[name] != changed.get(name)} >= {
            "python", "numpy", "torch", "modes", "trained", "gradients", "groups", "optimizer", "loader",
            "next order", "head.bias", "mask", "token_embedding.weight",
        }, "the probe must change what is looked at"  # fmt: skip
    else:
        with (
            pytest.raises(fail),
            preserved(training.model, training.optimizer, [training.loader]),
        ):
            training.probe(fail)
    after = training.bits()
    assert {name for name in before if before[name] != after[name]} == set()
    assert set(after) == set(before)
    assert bool(training.optimizer.state) == (steps > 0)
    assert all((p.grad is None) == (steps == 0 or not p.requires_grad) for p in training.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fail", [None, RuntimeError], ids=["ran", "out of memory"])
def test_b7_the_training_after_a_probe_is_the_training_without_one(fail, device, small_data_dir):
    """B7: three more steps give the same bits, dropout and batches included."""
    results = []
    for probed in (False, True):
        torch.manual_seed(5)
        training = Training(small_data_dir, device, 1)
        if probed:
            with preserved(training.model, training.optimizer, [training.loader]):
                outcome = attempt(lambda training=training: training.probe(fail))
            assert outcome.ran == (fail is None)
        training.train(3)
        bits = training.bits()
        results.append([bits[name] for name, _ in training.model.named_parameters()] + [bits["torch"]])
    assert results[0] == results[1]


@pytest.mark.parametrize("device", DEVICES)
def test_b7_the_peak_of_a_preserved_probe_is_that_of_the_training(device, small_data_dir):
    """What is kept lies on the host, so the measurement is not falsified, as one beside a copy would be."""
    training = Training(small_data_dir, device, 2)
    batch = {name: tensor.to(device) for name, tensor in next(iter(training.loader)).items()}
    owners = (training.model, training.optimizer, [batch])

    def peak() -> object:
        meter = meter_for(torch.device(device))
        return meter.measure(lambda: training.step(batch), owners).peak_allocated_bytes

    plain = peak()
    with preserved(training.model, training.optimizer):
        assert peak() == plain


def test_b7_shared_parameters_strides_and_a_tensor_as_learning_rate():
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    first.weight.grad = torch.arange(12.0).view(3, 4).t()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5), momentum=0.9)  # pyright: ignore
    with preserved(model, optimizer):
        optimizer.step()
        optimizer.param_groups[0]["lr"].fill_(9.0)
        second.weight = nn.Parameter(torch.zeros(4, 3))
        first.weight.grad = None
    assert second.weight is first.weight
    assert first.weight.grad is not None
    assert first.weight.grad.stride() == (1, 4)
    assert torch.equal(first.weight.grad, torch.arange(12.0).view(3, 4).t())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state


def test_b7_only_the_random_states_without_a_model():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with preserved():
        torch.rand(7)
    assert torch.equal(torch.rand(2), expected)


def test_b7_one_part_that_cannot_be_restored_does_not_lose_the_rest(monkeypatch):
    def fails(model):
        raise OSError("lost")

    monkeypatch.setattr("bench.measure.preserve._drop_gradients", fails)
    model = nn.Linear(2, 2, bias=False)
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    with pytest.raises(OSError, match="lost"), preserved(model):
        model.weight.data.fill_(float(torch.rand(())))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.weight, before)
