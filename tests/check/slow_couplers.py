"""Couplers that leak beyond the length at which a slow one's gradients are looked at, and ones that count."""

from __future__ import annotations

import time

import torch

from tests.check.couplers import Wrong

SHORT = 4
CALLS: list[tuple[int, bool, bool]] = []


class Late(Wrong):
    """Token 9 of each sequence sees token 7 of the other one."""

    modes = (True, False)

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        if mean.shape[1] > SHORT and self.training in self.modes:
            mean = torch.cat([mean[:, :9], mean[:, 9:10] + self.seen(mean, layer_input), mean[:, 10:]], 1)
        return self.combiner(mean)

    def seen(self, mean, layer_input):
        return mean[:, 7:8].flip(0)


class LateInEval(Late):
    """In eval mode only."""

    modes = (False,)


class LateInTraining(Late):
    """In train mode only."""

    modes = (True,)


class LatePast(Late):
    """Token 9 sees the layer input of token 8."""

    def seen(self, mean, layer_input):
        return layer_input[:, 8:9]


class Counted(Wrong):
    """Notes the length, the mode and whether there will be gradients."""

    def forward(self, expert_outputs, layer_input=None):
        CALLS.append((expert_outputs.shape[1], self.training, torch.is_grad_enabled()))
        return self.combiner(expert_outputs.mean(2))


class Sleepy(Counted):
    """Takes a millisecond a position."""

    def forward(self, expert_outputs, layer_input=None):
        time.sleep(1e-3 * expert_outputs.shape[1])
        return super().forward(expert_outputs, layer_input)
