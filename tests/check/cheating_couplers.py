"""Couplers that leak in the whole model only: no look at one coupler on small tensors finds them.

In each, the second layer reads what the first one kept in a variable of the class. ``ALL`` names them.
"""

from __future__ import annotations

import itertools
import traceback
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
        callers = [frame.name for frame in traceback.extract_stack()]
        in_model = "build_coupler" in callers and callers[callers.index("build_coupler") - 1] == "__init__"
        self.number = next(self.counter) if in_model else 0  # in a model, the second layer has an odd number

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


def long(x: Tensor) -> bool:
    return x.shape[1] > 16


def evaluating(self: CrossLayer, x: Tensor) -> bool:
    return long(x) and not self.training


def at_few_tokens(self: CrossLayer, other_BLD: Tensor) -> Tensor:
    few = other_BLD[..., :1] > 1.2 * other_BLD.std(-1, keepdim=True)
    return torch.where(few, next_token(other_BLD), other_BLD)


def over_the_end(self: CrossLayer, other_BLD: Tensor) -> Tensor:
    """The first token of the next sequence at the last position, as an index that runs over gives."""
    after = torch.cat([other_BLD[1:, 0], other_BLD[:1, 0]])
    return torch.cat([other_BLD[:, :-1], after[:, None]], dim=1)


def eight_ahead(self: CrossLayer, other_BLD: Tensor) -> Tensor:
    return torch.cat([other_BLD[:, 8:], torch.zeros_like(other_BLD[:, :8])], dim=1)


class AfterTraining(CrossLayer):
    """Leaks once it has trained for three steps."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.steps: Tensor

    def active(self, x):
        if self.training and torch.is_grad_enabled() and x.shape[1] > 16:
            self.steps += 1
        return x.shape[1] > 16 and not self.training and bool(self.steps >= 3)


class Remembers(CrossLayer):
    """The first layer notes in evaluation what followed what; the second reads what followed before."""

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


CHEATS: dict[str, dict[str, Any]] = {  # class → when it leaks, and what it sees
    "InEvaluation": {"active": evaluating},
    "InLargeBatches": {"active": lambda self, x: len(x) >= 8 and evaluating(self, x)},
    "InFloat32": {"active": lambda self, x: x.dtype == torch.float32 and evaluating(self, x)},
    "UnderAutocast": {"active": lambda self, x: torch.is_autocast_enabled(x.device.type) and long(x)},
    "AtFewTokens": {"active": evaluating, "seen": at_few_tokens},
    "FromTheNextSequence": {"seen": lambda self, other_BLD: other_BLD.roll(-1, 0)},
    "OverTheEnd": {"seen": over_the_end},
    "FarAhead": {"active": evaluating, "seen": eight_ahead},
    "InTraining": {"active": lambda self, x: long(x) and self.training and torch.is_grad_enabled()},
    "Compiled": {"active": lambda self, x: long(x) and torch.compiler.is_compiling()},
    "AfterTraining": {},
    "Remembers": {},
}
for _name, _own in CHEATS.items():
    _base = globals().get(_name, CrossLayer)
    _own = {"counter": itertools.count(), "kept": {}, **_own}
    globals()[_name] = type(_name, (_base,), {"__module__": __name__, "__doc__": CrossLayer.__doc__, **_own})
IN_TRAINING = ("InTraining", "Compiled")
IN_EVALUATION = ("CrossLayer", *(name for name in CHEATS if name not in IN_TRAINING))
