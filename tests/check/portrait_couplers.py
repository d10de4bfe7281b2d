"""Couplers whose portrait is known beforehand; ``D`` is even, and no map depends on a parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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


def position(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], dtype=x.dtype)[:, None]


def bent_late(x: Tensor) -> Tensor:
    """What is zero as long as the inputs are small."""
    return (x - 50).relu()


def where(condition: Tensor, x: Tensor) -> Tensor:
    """The mean, but the second expert alone at some tokens."""
    return torch.where(condition, x[:, :, 1], x.mean(2))


def orthogonal_maps(x: Tensor) -> Tensor:
    """Even experts pass as they are, odd ones turned by 90 degrees: trace(Rᵀ I) = 0."""
    odd = x[:, :, 1::2].sum(2)
    return x[:, :, ::2].sum(2) + torch.stack([-odd[..., 1::2], odd[..., ::2]], dim=-1).flatten(2)


def one_small(first: Tensor, x: Tensor) -> Tensor:
    """The mean; ``first``, the first coordinate of the output, is small beside the others."""
    return torch.cat([first, 1e12 * x.mean(2)[..., 1:]], -1)


MIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of the expert outputs and the layer input
    "Static": lambda x, u: weighted(x, WEIGHTS),
    "BothSigns": lambda x, u: weighted(x, (1.5, -0.5, 0.5, -0.5)),
    "Sum": lambda x, u: x.sum(2),
    "PlusConstant": lambda x, u: x.mean(2) + 0.5,
    "PlusInput": lambda x, u: x.mean(2) + u,
    "PlusLargeInput": lambda x, u: x.mean(2) + bent_late(u),
    "PlusPosition": lambda x, u: x.mean(2) + position(x),
    "TokenMaps": lambda x, u: x.mean(2) * u,
    "TinyNonlinearity": lambda x, u: x.mean(2) + 1e-3 * x.mean(2).tanh(),
    "LateKink": lambda x, u: x.mean(2) + bent_late(x.mean(2)),
    "LateKinkOfOne": lambda x, u: x.mean(2) + bent_late(x[:, :, 0]),
    "OrthogonalMaps": lambda x, u: orthogonal_maps(x),
    "WithoutOne": lambda x, u: (x.sum(2) - x[:, :, 1]) / (x.shape[2] - 1) + 0 * x[:, :, 1],
    "Deaf": lambda x, u: u,
    # those that are the mean for most tokens, or in most coordinates: the rest must not hide behind those
    "SquaredWhereLarge": lambda x, u: torch.where(u[..., :1] > 3, (x**2).mean(2), x.mean(2)),
    "OneExpertWhereLarge": lambda x, u: where(u[..., :1] > 2.5, x),
    "OneExpertInAWindow": lambda x, u: where((u[..., :1] > 2) & (u[..., :1] < 2.2), x),
    "OneSmallTanh": lambda x, u: one_small(x.mean(2)[..., :1].tanh(), x),
    "OneSmallExpert": lambda x, u: one_small(x[:, :, 2, :1], x),
    "OneSmallGate": lambda x, u: one_small(x.mean(2)[..., :1] * u[..., :1].sigmoid(), x),
    "OneSmallPosition": lambda x, u: one_small(x.mean(2)[..., :1] + position(x), x),
}
for _name, _mix in MIXES.items():
    _own = {"mix": lambda self, x, u, mix=_mix: mix(x, u)}
    globals()[_name] = type(_name, (Honest,), {"__module__": __name__, "__doc__": _name, **_own})


class StaticLinear(Honest):
    """Static weights, then a Linear."""

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.embed_dim, config.embed_dim)

    def mix(self, x, layer_input):
        return self.linear(weighted(x, WEIGHTS))


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
