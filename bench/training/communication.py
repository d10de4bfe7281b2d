"""Who talks to whom, while it is learned: the couplers' weights over steps, and at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gnnmoe.model import GNNMoELayer, GNNMoEModel

MIXING_TOKENS = 128  # what depends on content is averaged over so many validation tokens


def probe_tokens(input_ids: Tensor) -> Tensor:
    """Return the first rows of ``input_ids`` (B, L) with about ``MIXING_TOKENS`` tokens, at least one."""
    return input_ids[: max(1, MIXING_TOKENS // input_ids.shape[1])]


def communication_by_layer(model: GNNMoEModel, input_ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return what every layer's coupler says of itself on ``input_ids`` (B, L), in eval mode."""
    was_training = model.training
    model.eval()
    found = model.analyze_expert_communication(input_ids)
    model.train(was_training)
    return found


class CommunicationTrace:
    """Every layer's ``communication`` on the same tokens (B, L), sampled now and then."""

    def __init__(self, input_ids: Tensor) -> None:
        self.input_ids = input_ids
        self._steps: list[int] = []
        self._samples: dict[str, list[np.ndarray]] = {}

    def sample(self, step: int, model: GNNMoEModel) -> None:
        """Keep a copy of what the model says after ``step`` steps."""
        self._steps.append(step)
        for layer, parts in communication_by_layer(model, self.input_ids).items():
            for name, value in parts.items():
                self._samples.setdefault(f"{layer}.{name}", []).append(value.float().cpu().numpy().copy())

    def state_dict(self) -> dict[str, Any]:
        """Return the samples as tensors, for a checkpoint."""
        samples = {name: [torch.from_numpy(v) for v in values] for name, values in self._samples.items()}
        return {"steps": list(self._steps), "samples": samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the samples of a checkpoint."""
        self._steps = list(state["steps"])
        self._samples = {name: [v.numpy() for v in values] for name, values in state["samples"].items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return ``step`` (T,) and, by ``layer_0.name``, the values with time as first axis."""
        stacked = {name: np.stack(values) for name, values in self._samples.items()}
        return {"step": np.array(self._steps, dtype=np.int64), **stacked}


def summarize_communication(model: GNNMoEModel, input_ids: Tensor) -> dict[str, Any]:
    """Return ``communication_by_layer`` with vectors by member names, ready for JSON."""
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
