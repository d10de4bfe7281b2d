"""Couplers that are the mean for most tokens, or in most coordinates: the rest must not hide behind those."""

from __future__ import annotations

import torch

from tests.check.portrait_couplers import Honest


class SquaredWhereLarge(Honest):
    """The mean, but of squares where the layer input is large."""

    def mix(self, x, layer_input):
        return torch.where(layer_input[..., :1] > 3, (x**2).mean(2), x.mean(2))


class OneExpertWhereLarge(Honest):
    """The mean, but the second expert alone where the layer input is large."""

    def mix(self, x, layer_input):
        return torch.where(layer_input[..., :1] > 2.5, x[:, :, 1], x.mean(2))


class OneExpertInAWindow(Honest):
    """The same between two thresholds so close that few tokens are there."""

    def mix(self, x, layer_input):
        first = layer_input[..., :1]
        return torch.where((first > 2) & (first < 2.2), x[:, :, 1], x.mean(2))


class OneSmall(Honest):
    """The mean; the first coordinate of the output is small beside the others, and ``small``."""

    def mix(self, x, layer_input):
        return torch.cat([self.small(x, layer_input), 1e12 * x.mean(2)[..., 1:]], -1)

    def small(self, x, layer_input):
        return x.mean(2)[..., :1]


class OneSmallTanh(OneSmall):
    def small(self, x, layer_input):
        return x.mean(2)[..., :1].tanh()


class OneSmallExpert(OneSmall):
    def small(self, x, layer_input):
        return x[:, :, 2, :1]


class OneSmallGate(OneSmall):
    def small(self, x, layer_input):
        return x.mean(2)[..., :1] * layer_input[..., :1].sigmoid()


class OneSmallPosition(OneSmall):
    def small(self, x, layer_input):
        return x.mean(2)[..., :1] + torch.arange(x.shape[1], dtype=x.dtype)[:, None]
