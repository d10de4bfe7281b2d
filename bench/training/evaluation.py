"""Evaluation: the nll of every target once, summed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from bench.training.ranks import ALONE, Ranks
from bench.training.step import split, to_device
from gnnmoe.head import IGNORED
from gnnmoe.model import GNNMoEModel


@dataclass(frozen=True)
class Evaluation:
    """Sums over the targets scored; perplexity is exp(nll_sum / tokens)."""

    nll_sum: float
    tokens: int
    nll: np.ndarray
    """The nll in nats of each target, float32, in the order of the text."""


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation of a text of which each rank scored a stretch, in the order of the ranks.

    The sum is taken anew over all targets, so that it does not depend on the number of ranks.
    """
    nll = np.concatenate([part.nll for part in parts])
    return Evaluation(nll_sum=float(nll.sum(dtype=np.float64)), tokens=len(nll), nll=nll)


@torch.no_grad()
def evaluate(
    model: GNNMoEModel,
    loader: DataLoader,
    device: torch.device,
    rows: int | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Score every target of ``loader`` that is not ignored; the model's mode is put back after.

    On several ``ranks`` each scores its own stretch, and all return the evaluation of the whole.

    ``rows``: windows to run at once (None: a whole batch), which changes no more than the rounding.
    """
    was_training = model.training
    model.eval()
    parts = []
    for batch in loader:
        batch = to_device(batch, device)
        for part in split(batch, rows):
            nll = model.token_nll(part["input_ids"], part["targets"])
            parts.append(nll[part["targets"] != IGNORED].float().cpu().numpy())
    model.train(was_training)
    nll = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    own = Evaluation(nll_sum=float(nll.sum(dtype=np.float64)), tokens=len(nll), nll=nll)
    return own if ranks.alone else merged(ranks.gather(own))
