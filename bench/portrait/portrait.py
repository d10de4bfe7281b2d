"""The portrait of a coupler: its costs at the real sizes, its mixing at a small width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.gate.subject import Subject, global_random_state_kept
from bench.portrait.cost import CouplerCost, measure_cost
from bench.portrait.mixing import Mixing, NoMixing, measure_mixing
from bench.portrait.verdict import sentence, verdict
from gnnmoe.config import GNNMoEConfig

WIDTH = 16  # of the copy whose mixing is measured: Jacobians cost D backward passes


@dataclass(frozen=True)
class Portrait:
    """What a coupler is."""

    cost: CouplerCost
    mixing: Mixing

    @property
    def verdict(self) -> str:
        """What it is, in a few words: ``equals mean + Linear to 1e-15``."""
        return verdict(self.mixing)

    @property
    def sentence(self) -> str:
        """What it is, with what was looked at and what follows: ``before the shared combiner it …``."""
        return sentence(self.mixing)


def draw_portrait(config: GNNMoEConfig, *, seed: int = 0) -> Portrait:
    """Measure the coupler that ``config`` names, on the CPU; torch's random state is left as it was.

    Raises:
        NoMixing: it mixes tokens.
        CheckFailed: its output or a gradient is not finite, or of another shape.
        Exception: whatever the coupler itself raises.
    """
    device = torch.device("cpu")
    with global_random_state_kept(device):
        cost = measure_cost(config, seed, device)
        try:
            mixing = measure_mixing(Subject(_narrow(config), seed, device))
        except NoMixing:
            raise
        except Exception:  # an option of the coupler may need the real width
            if _narrow(config) == config:
                raise
            mixing = measure_mixing(Subject(config, seed, device))
    return Portrait(cost, mixing)


def _narrow(config: GNNMoEConfig) -> GNNMoEConfig:
    """Return ``config`` at the smallest width of at least 16 that its heads divide, if it is wider."""
    width = -(-WIDTH // config.num_heads) * config.num_heads
    return replace(config, embed_dim=min(width, config.embed_dim))
