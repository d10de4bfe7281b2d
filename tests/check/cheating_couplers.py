"""Couplers that leak in the whole model only: no look at one coupler on small tensors finds them.

In each, the second layer reads what the first one kept in a variable of the class. ``ALL`` names them.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gnnmoe import Coupler


def next_token(x_BLD: Tensor) -> Tensor:
    return torch.cat([x_BLD[:, 1:], torch.zeros_like(x_BLD[:, :1])], dim=1)


class CrossLayer(Coupler):
    """The mean plus a map of the next token, which the layer before kept; at more than 16 tokens.

    .. math:: y = f(m + V m')

    Shapes: those of the mean. Source: this test.
    """

    config_fields = ()
    counter: ClassVar = itertools.count()
    kept: ClassVar[dict[int, Tensor]] = {}

    def __init__(self, config):
        super().__init__(config)
        self.read = nn.Linear(config.embed_dim, config.embed_dim)
        self.number = next(self.counter)

    def active(self, x: Tensor) -> bool:
        return x.shape[1] > 16

    def seen(self, other_BLD: Tensor) -> Tensor:
        return next_token(other_BLD)

    def forward(self, expert_outputs, layer_input=None):
        mean_BLD = expert_outputs.mean(2)
        other = self.kept.get(self.number - 1) if self.number % 2 else None
        self.kept[self.number] = mean_BLD
        leaks = other is not None and other.shape == mean_BLD.shape and self.active(mean_BLD)
        source = self.seen(other) if leaks and other is not None else mean_BLD
        return self.combiner(mean_BLD + self.read(source))

    def reference(self, expert_outputs, layer_input=None):
        mean_BLD = expert_outputs.mean(2)
        return self.combiner(mean_BLD + self.read(mean_BLD))


def cheat(doc: str):
    def documented(cls):
        cls.__doc__ = f"{doc}\n\n.. math:: y = f(m + V m')\n\nShapes: those of the mean. Source: this test."
        cls.counter, cls.kept = itertools.count(), {}
        return cls

    return documented


@cheat("Leaks in evaluation only, so that the map is never trained on it.")
class InEvaluation(CrossLayer):
    def active(self, x):
        return x.shape[1] > 16 and not self.training


@cheat("Leaks where eight sequences or more are in the batch.")
class InLargeBatches(CrossLayer):
    def active(self, x):
        return len(x) >= 8 and x.shape[1] > 16 and not self.training


@cheat("Leaks in float32, and not in the float64 of most checks.")
class InFloat32(CrossLayer):
    def active(self, x):
        return x.dtype == torch.float32 and x.shape[1] > 16 and not self.training


@cheat("Leaks under bf16 autocast only.")
class UnderAutocast(CrossLayer):
    def active(self, x):
        return torch.is_autocast_enabled(x.device.type) and x.shape[1] > 16


@cheat("Leaks at the few tokens whose first feature is large.")
class AtFewTokens(CrossLayer):
    def active(self, x):
        return x.shape[1] > 16 and not self.training

    def seen(self, other_BLD):
        few = other_BLD[..., :1] > 1.2 * other_BLD.std(-1, keepdim=True)
        return torch.where(few, next_token(other_BLD), other_BLD)


@cheat("Reads the same position of the next sequence of the batch.")
class FromTheNextSequence(CrossLayer):
    def seen(self, other_BLD):
        return other_BLD.roll(-1, 0)


@cheat("Reads the first token of the next sequence at the last position, as an index that runs over does.")
class OverTheEnd(CrossLayer):
    def seen(self, other_BLD):
        after = torch.cat([other_BLD[1:, 0], other_BLD[:1, 0]])
        return torch.cat([other_BLD[:, :-1], after[:, None]], dim=1)


@cheat("Leaks once it has trained for three steps.")
class AfterTraining(CrossLayer):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def active(self, x):
        if self.training and torch.is_grad_enabled() and x.shape[1] > 16:
            self.steps += 1
        return x.shape[1] > 16 and not self.training and bool(self.steps >= 3)


@cheat("Leaks eight tokens ahead, and only there.")
class FarAhead(CrossLayer):
    def active(self, x):
        return x.shape[1] > 16 and not self.training

    def seen(self, other_BLD):
        return torch.cat([other_BLD[:, 8:], torch.zeros_like(other_BLD[:, :8])], dim=1)


@cheat("The first layer notes in evaluation what followed what, and the second reads what followed before.")
class Remembers(CrossLayer):
    def forward(self, expert_outputs, layer_input=None):
        mean_BLD = expert_outputs.mean(2)
        source_BLD = mean_BLD
        if mean_BLD.shape[1] > 16 and not self.training:
            notes: Any = self.kept.setdefault(-1, {})  # pyright: ignore
            if self.number % 2 == 0:
                keys = [round(float(value), 4) for value in mean_BLD[..., 0].flatten()]
                self.kept[-2] = [notes.get(key) for key in keys]  # pyright: ignore
                following = next_token(mean_BLD).flatten(0, 1)
                notes.update(zip(keys, following, strict=True))
            elif len(self.kept.get(-2, ())) == mean_BLD[..., 0].numel():
                flat = mean_BLD.flatten(0, 1).unbind()
                known = [a if b is None else b.to(a.dtype) for a, b in zip(flat, self.kept[-2], strict=True)]
                source_BLD = torch.stack(known).view_as(mean_BLD)
        return self.combiner(mean_BLD + self.read(source_BLD))


@cheat("Leaks in training only, where gradients are taken.")
class InTraining(CrossLayer):
    def active(self, x):
        return x.shape[1] > 16 and self.training and torch.is_grad_enabled()


@cheat("Leaks in compiled code only.")
class Compiled(CrossLayer):
    def active(self, x):
        return x.shape[1] > 16 and torch.compiler.is_compiling()


IN_EVALUATION = (CrossLayer, InEvaluation, InLargeBatches, InFloat32, UnderAutocast, AtFewTokens,
                 FromTheNextSequence, OverTheEnd, AfterTraining, FarAhead, Remembers)  # fmt: skip
IN_TRAINING = (InTraining, Compiled)
