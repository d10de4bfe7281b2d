"""Evaluation: the nll of every target, summed in float64; and the couplers' weights over the steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench.training.ranks import ALONE, Ranks
from bench.training.step import split, to_device
from gnnmoe.head import IGNORED
from gnnmoe.model import GNNMoELayer, GNNMoEModel


@dataclass(frozen=True)
class Evaluation:
    """Sums over the scored targets; perplexity is exp(nll_sum / tokens)."""

    nll_sum: float
    tokens: int
    nll: np.ndarray
    """The nll in nats of each target, float32, in the order of the text."""


def merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation of the whole text; each part is the stretch that one rank scored, in order.

    The sum is computed again over all targets, so it does not depend on the number of ranks.
    """
    nll = np.concatenate([part.nll for part in parts])
    return Evaluation(nll_sum=float(nll.sum(dtype=np.float64)), tokens=len(nll), nll=nll)


Progress = Callable[[int, int], object]
"""Is told how many batches are done, and of how many."""


def _tell_nobody(done: int, batches: int) -> None:
    del done, batches


@torch.no_grad()
def evaluate(
    model: GNNMoEModel,
    loader: DataLoader,
    device: torch.device,
    rows: int | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every target of ``loader`` that is not ignored, in eval mode; restore the mode afterwards.

    On several ``ranks`` each rank scores its own stretch, and all return the evaluation of the whole text.
    ``rows``: windows per forward (None: a whole batch); it changes the rounding only. ``progress`` is told
    how many batches are done.
    """
    tell = progress or _tell_nobody
    was_training = model.training
    model.eval()
    parts = []
    tell(0, len(loader))
    for number, batch in enumerate(loader, start=1):
        batch = to_device(batch, device)
        for part in split(batch, rows):
            nll = model.token_nll(part["input_ids"], part["targets"])
            parts.append(nll[part["targets"] != IGNORED].float().cpu().numpy())
        tell(number, len(loader))
    model.train(was_training)
    nll = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    own = Evaluation(nll_sum=float(nll.sum(dtype=np.float64)), tokens=len(nll), nll=nll)
    return own if ranks.alone else merged(ranks.gather(own))


# --- the couplers' weights ------------------------------------------------------------------------

MIXING_TOKENS = 128  # what depends on content is averaged over so many validation tokens


def probe_tokens(input_ids: Tensor) -> Tensor:
    """Return the first rows of ``input_ids`` (B, L) with about ``MIXING_TOKENS`` tokens, at least one."""
    return input_ids[: max(1, MIXING_TOKENS // input_ids.shape[1])]


def communication_by_layer(model: GNNMoEModel, input_ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return ``communication()`` of the coupler of every layer on ``input_ids`` (B, L), in eval mode."""
    was_training = model.training
    model.eval()
    found = model.analyze_expert_communication(input_ids)
    model.train(was_training)
    return found


Sample = Callable[[GNNMoEModel], dict[str, Tensor]]


class CommunicationTrace:
    """Samples of the ``communication`` of every layer, always on the same tokens (B, L).

    ``experts`` measures more of the model, by name, at the same steps (``bench.measure.experts``).
    """

    def __init__(self, input_ids: Tensor, experts: Sample | None = None) -> None:
        self.input_ids, self._experts = input_ids, experts
        self._steps: list[int] = []
        self._samples: dict[str, list[np.ndarray]] = {}
        self.seconds = 0.0
        """The time that ``experts`` took."""

    def sample(self, step: int, model: GNNMoEModel) -> None:
        """Add a sample after ``step`` steps."""
        self._steps.append(step)
        for layer, parts in communication_by_layer(model, self.input_ids).items():
            self._add({f"{layer}.{name}": value for name, value in parts.items()})
        if self._experts is not None:
            start = time.perf_counter()
            self._add(self._experts(model))
            self.seconds += time.perf_counter() - start

    def _add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._samples.setdefault(name, []).append(value.float().cpu().numpy().copy())

    def state_dict(self) -> dict[str, Any]:
        """Return the samples as tensors, for a checkpoint."""
        samples = {name: [torch.from_numpy(v) for v in values] for name, values in self._samples.items()}
        return {"steps": list(self._steps), "samples": samples, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the samples of a checkpoint."""
        self._steps, self.seconds = list(state["steps"]), state["seconds"]
        self._samples = {name: [v.numpy() for v in values] for name, values in state["samples"].items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return ``step`` (T,) and, by names such as ``layer_0.mixing``, the values (T, …).

        What only a part of a resumed run sampled is left out.
        """
        whole = {name: v for name, v in self._samples.items() if len(v) == len(self._steps)}
        stacked = {name: np.stack(values) for name, values in whole.items()}
        return {"step": np.array(self._steps, dtype=np.int64), **stacked}


def summarize_communication(model: GNNMoEModel, input_ids: Tensor) -> dict[str, Any]:
    """Return ``communication_by_layer`` for the record, with vectors as dicts by member name."""
    found = communication_by_layer(model, input_ids)
    summary: dict[str, Any] = {}
    for number, parts in enumerate(found.values()):
        layer = model.layers[number]
        assert isinstance(layer, GNNMoELayer)
        names = layer.coupler.member_names()
        summary[f"layer_{number}"] = {
            name: _readable(value.cpu().double(), names.get(name)) for name, value in parts.items()
        }
    return summary


def _readable(value: Tensor, names: list[str] | None) -> Any:
    if value.ndim != 1:
        return torch.round(value, decimals=6).tolist()
    keys = names or [str(expert) for expert in range(len(value))]
    return dict(zip(keys, torch.round(value, decimals=6).tolist(), strict=True))
