"""Honest couplers of unusual kinds: a check that refuses one of them cries wolf. ``ALL`` names them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnnmoe import Coupler


class Unusual(Coupler):
    """A mean that a subclass makes in its own way.

    .. math:: y = f(mix(x))

    Shapes: those of the mean. Source: this test.
    """

    config_fields = ()

    def mix(self, x, layer_input):
        return x.mean(2)

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(self.mix(expert_outputs, layer_input).to(expert_outputs.dtype))

    def reference(self, expert_outputs, layer_input=None):
        return self.combiner(self.mix(expert_outputs, layer_input).to(expert_outputs.dtype))


def unusual(doc: str):
    def documented(cls):
        cls.__doc__ = f"{doc}\n\n.. math:: y = f(mix(x))\n\nShapes: those of the mean. Source: this test."
        return cls

    return documented


@unusual("Draws noise on the gate in training.")
class NoisyInTraining(Unusual):
    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.embed_dim, config.num_experts)

    def mix(self, x, layer_input):
        scores = self.gate(layer_input)
        if self.training:
            scores = scores + 0.1 * torch.randn_like(scores)
        return (scores.softmax(-1)[..., None] * x).sum(2)


@unusual("Sorts the experts of each token by their first feature.")
class Sorts(Unusual):
    def mix(self, x, layer_input):
        order = x[..., 0].argsort(dim=2)
        weights = torch.linspace(0.1, 0.4, x.shape[2], dtype=x.dtype, device=x.device)
        return (x.gather(2, order[..., None].expand_as(x)) * weights[:, None]).sum(2)


@unusual("Computes in float64.")
class InDoublePrecision(Unusual):
    def mix(self, x, layer_input):
        return x.double().softmax(2).mul(x.double()).sum(2)


@unusual("Solves a small system for each token.")
class Solves(Unusual):
    def mix(self, x, layer_input):
        x = x if x.dtype == torch.float64 else x.float()
        gram = x @ x.mT / x.shape[-1] + torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        weights = torch.linalg.solve(gram, torch.ones_like(gram[..., :1]))
        return (weights / weights.sum(2, keepdim=True) * x).sum(2)


@unusual("Keeps a table by the length that it met, which it makes when it needs it.")
class KeepsATable(Unusual):
    def __init__(self, config):
        super().__init__(config)
        self.tables: dict[tuple[int, torch.dtype], Tensor] = {}

    def mix(self, x, layer_input):
        key = x.shape[1], x.dtype
        if key not in self.tables:
            table = torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device)
            self.tables[key] = table.cos()[:, None]
        return x.mean(2) * self.tables[key]


@unusual("Counts its forwards in a buffer that nothing reads.")
class Counts(Unusual):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: Tensor

    def mix(self, x, layer_input):
        self.calls += 1
        return x.mean(2)


@unusual("Has random features that no state dict holds; at one seed they are the same.")
class RandomFeatures(Unusual):
    def __init__(self, config):
        super().__init__(config)
        self.features = torch.randn(config.embed_dim, config.embed_dim) / config.embed_dim**0.5

    def mix(self, x, layer_input):
        return x.mean(2) @ self.features.to(x.dtype)


@unusual("Writes in place into its own copy, seen through other strides.")
class InPlace(Unusual):
    def mix(self, x, layer_input):
        own = x.transpose(2, 3).contiguous()
        own.mul_(0.5).add_(layer_input[..., None])
        return own.transpose(2, 3).sum(2)


ALL = (NoisyInTraining, Sorts, InDoublePrecision, Solves, KeepsATable, Counts, RandomFeatures, InPlace)
