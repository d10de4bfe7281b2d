"""Couplers that are wrong in one way each; the honest parts are those of ``mean``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnnmoe.couplers.mean import MeanCoupler

DOCUMENTED = """
    .. math:: y = f(x)

    Shapes: those of the mean. Source: made up.
    """


class Made(MeanCoupler):
    """The mean; its subclasses say in one line what is wrong, and this adds the rest of the docstring."""

    def __init_subclass__(cls) -> None:
        cls.__doc__ = f"{cls.__doc__}\n{DOCUMENTED}"


class Wrong(Made):
    """Forward and reference are the same, so that only the one wrong thing shows."""

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        return self.forward(expert_outputs, layer_input)


class HiddenLeak(Wrong):
    """Adds the next token's mean, behind a scalar that starts at zero."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        return self.combiner(mean + self.scale * mean.roll(-1, 1))


class BatchNorm(Wrong):
    """Honest in eval mode; in train mode the statistics are those of all tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.embed_dim)

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        return self.combiner(self.norm(mean.flatten(0, 1)).view_as(mean))


class PastMixing(Wrong):
    """Causal, but every token hears from its own past."""

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(expert_outputs.mean(2).cumsum(1))


class InputLeak(Wrong):
    """Leaks through the layer input only, and only to a token's future."""

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(expert_outputs.mean(2) + layer_input.flip(1))  # pyright: ignore


class AcrossBatch(Wrong):
    """Mixes the same position of all sequences."""

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        return self.combiner(mean + mean.mean(0, keepdim=True))


class GradientLeak(Wrong):
    """Its values are honest, its gradients are not (a straight-through estimator gone wrong)."""

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        other = mean.roll(-1, 1)
        return self.combiner(mean) + other - other.detach()


class DetachedLeak(Wrong):
    """Its gradients are honest, its values are not."""

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        return self.combiner(mean + mean.detach().amax(1, keepdim=True))


class ExpertChoice(Wrong):
    """Keeps the strongest half of the tokens, so that each token's fate depends on the others."""

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        scores = mean[..., :1]
        chosen = scores >= scores.median(1, keepdim=True).values
        return self.combiner(mean * chosen)


class Memory(Wrong):
    """Adds what the call before left behind, as long as it is in train mode that it was left."""

    last = 0.0

    def forward(self, expert_outputs, layer_input=None):
        output = self.combiner(expert_outputs.mean(2) + self.last)
        if self.training:
            self.last = expert_outputs.detach().mean()
        return output


class OtherReference(Made):
    """Its reference is off by one part in a million."""

    def reference(self, expert_outputs, layer_input=None):
        return super().reference(expert_outputs, layer_input) * (1 + 1e-6)


class OtherGradient(Made):
    """The same output as its reference, with another gradient."""

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(0.5 * expert_outputs.mean(2) + 0.5 * expert_outputs.detach().mean(2))


class Dead(Wrong):
    """Has a parameter that nothing reads."""

    def __init__(self, config):
        super().__init__(config)
        self.unread = nn.Parameter(torch.ones(3))


class DeclaredDead(Dead):
    """Says so."""

    def inert_parameters(self):
        return {"unread": "kept for old checkpoints"}


class DeclaredAlive(Wrong):
    """Says so of a parameter that does learn."""

    def inert_parameters(self):
        return {"combiner.0.weight": "an error"}


class NotANumberInBf16(Wrong):
    """Divides by a difference that bf16 rounds to zero."""

    def forward(self, expert_outputs, layer_input=None):
        mean = expert_outputs.mean(2)
        one = torch.ones(1, 1, dtype=mean.dtype)
        gap = (one * (1 + 1e-4)) @ one - 1  # autocast multiplies in bf16
        return self.combiner(mean / gap.to(mean.dtype))


class Raising(Made):
    """Fails in every call."""

    def forward(self, expert_outputs, layer_input=None):
        raise KeyError("no such expert")


class WrongShape(Made):
    """Forgets to mix."""

    def forward(self, expert_outputs, layer_input=None):
        return expert_outputs


class NoisyInTraining(Wrong):
    """Honest: draws noise in train mode (as a noisy router does), and has dropout of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Dropout(0.5)

    def forward(self, expert_outputs, layer_input=None):
        mean = self.dropout(expert_outputs.mean(2))
        return self.combiner(mean + torch.randn_like(mean) if self.training else mean)


class Unbuildable(Made):
    """Fails when it is built."""

    def __init__(self, config):
        super().__init__(config)
        self.share = 1 / (config.num_experts - config.num_experts)
