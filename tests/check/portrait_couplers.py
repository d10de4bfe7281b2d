"""Couplers whose portrait is known beforehand; ``D`` is even, and no map depends on a parameter."""

from __future__ import annotations

import torch
from torch import nn

from tests.check.couplers import Wrong

WEIGHTS = (0.5, 0.25, 0.125, 0.125)


class Honest(Wrong):
    """Forward and reference are the same; ``mix`` is what differs."""

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(self.mix(expert_outputs, layer_input))

    def mix(self, x, layer_input):
        return x.mean(2)


def weighted(x, weights):
    return torch.einsum("bled,e->bld", x, torch.tensor(weights, dtype=x.dtype))


class Static(Honest):
    """Weights that sum to 1."""

    def mix(self, x, layer_input):
        return weighted(x, WEIGHTS)


class StaticLinear(Static):
    """The same, then a Linear."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.embed_dim, config.embed_dim)

    def mix(self, x, layer_input):
        return self.linear(super().mix(x, layer_input))


class BothSigns(Honest):
    """Weights of both signs, which sum to 1."""

    def mix(self, x, layer_input):
        return weighted(x, (1.5, -0.5, 0.5, -0.5))


class Sum(Honest):
    """The sum over experts."""

    def mix(self, x, layer_input):
        return x.sum(2)


class PlusConstant(Honest):
    """The mean and a bias."""

    def mix(self, x, layer_input):
        return x.mean(2) + 0.5


class PlusInput(Honest):
    """The mean and the layer input."""

    def mix(self, x, layer_input):
        return x.mean(2) + layer_input


class PlusLargeInput(Honest):
    """The mean, and the layer input where it is large."""

    def mix(self, x, layer_input):
        return x.mean(2) + (layer_input - 50).relu()


class PlusPosition(Honest):
    """The mean and the token's position."""

    def mix(self, x, layer_input):
        return x.mean(2) + torch.arange(x.shape[1], dtype=x.dtype)[:, None]


class Gate(Honest):
    """A softmax of the layer input weighs the experts."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.embed_dim, config.num_experts)

    def mix(self, x, layer_input):
        return (self.gate(layer_input).softmax(-1).unsqueeze(-1) * x).sum(2)


class GateLinear(Gate):
    """The same, then a Linear for all."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.embed_dim, config.embed_dim)

    def mix(self, x, layer_input):
        return self.linear(super().mix(x, layer_input))


class GatePlusInput(Gate):
    """The same as the gate, and the layer input."""

    def mix(self, x, layer_input):
        return super().mix(x, layer_input) + layer_input


class Switch(Gate):
    """The best expert alone, times its probability."""

    def mix(self, x, layer_input):
        share = self.gate(layer_input).softmax(-1)
        return ((share * (share == share.amax(-1, keepdim=True))).unsqueeze(-1) * x).sum(2)


class TokenMaps(Honest):
    """The mean, each feature times the layer input's."""

    def mix(self, x, layer_input):
        return x.mean(2) * layer_input


class TinyNonlinearity(Honest):
    """The mean, bent by a thousandth."""

    def mix(self, x, layer_input):
        mean = x.mean(2)
        return mean + 1e-3 * mean.tanh()


class LateKink(Honest):
    """Linear as long as the inputs are small."""

    def mix(self, x, layer_input):
        mean = x.mean(2)
        return mean + (mean - 50).relu()


class LateKinkOfOne(Honest):
    """The same of the first expert alone."""

    def mix(self, x, layer_input):
        return x.mean(2) + (x[:, :, 0] - 50).relu()


class OrthogonalMaps(Honest):
    """Even experts pass as they are, odd ones turned by 90 degrees: trace(Rᵀ I) = 0."""

    def mix(self, x, layer_input):
        odd = x[:, :, 1::2].sum(2)
        turned = torch.stack([-odd[..., 1::2], odd[..., ::2]], dim=-1).flatten(2)
        return x[:, :, ::2].sum(2) + turned


class WithoutOne(Honest):
    """The mean of all experts but number 1."""

    def mix(self, x, layer_input):
        return (x.sum(2) - x[:, :, 1]) / (x.shape[2] - 1) + 0 * x[:, :, 1]


class Deaf(Honest):
    """Hears the layer input only."""

    def mix(self, x, layer_input):
        return layer_input


class NoCombiner(Honest):
    """Returns the mean itself, and has no parameters."""

    def __init__(self, config):
        super().__init__(config)
        del self.combiner

    def forward(self, expert_outputs, layer_input=None):
        return expert_outputs.mean(2)


class AfterCombiner(Honest):
    """Adds the first expert after the combiner."""

    def forward(self, expert_outputs, layer_input=None):
        return super().forward(expert_outputs, layer_input) + expert_outputs[:, :, 0]


class CombinesTwice(Honest):
    """Calls the combiner twice."""

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(super().forward(expert_outputs, layer_input))


class OwnCombiner(Honest):
    """Has a combiner of its own, under the shared one's name."""

    def __init__(self, config):
        super().__init__(config)
        self.combiner = nn.Sequential(nn.Linear(config.embed_dim, config.embed_dim), nn.Tanh())


class WrongFlops(Honest):
    """Its formula forgets the combiner."""

    def flops(self, tokens):
        return tokens


class NoFlops(Honest):
    """Has no formula."""

    def flops(self, tokens):
        return None


class NeedsWidth(Honest):
    """Cannot be built narrower than 32."""

    def __init__(self, config):
        super().__init__(config)
        if config.embed_dim < 32:
            raise ValueError("too narrow")
