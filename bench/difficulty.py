"""The difficulty model of a curriculum: a finished run's checkpoint as a function that scores blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.data.corpus import Corpus
from bench.training.checkpoint import load_checkpoint
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel


def checkpoint_scorer(path: Path, corpus: Corpus, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from inputs and targets (B, L) to the mean nll in nats of each block (B,).

    Raises:
        ValueError: the checkpoint is damaged, of another text, or of a coupler that lies in a file.
    """
    state = load_checkpoint(path)
    identity: dict[str, Any] = state.get("identity", {})
    if identity.get("data", {}).get("sha256") != corpus.sha256:
        raise ValueError(
            f"the curriculum's difficulty model {path} was trained on another text or with another "
            f"tokenizer; name a checkpoint of a run on {corpus.name} {corpus.config_name}."
        )
    model = _model(path, identity["model"], state.get("model") or state["trainer"]["best_model"], corpus)
    model.to(device).eval()

    def score(input_ids: Tensor, targets: Tensor) -> Tensor:
        return model.token_nll(input_ids.to(device), targets.to(device)).mean(1)

    return score


def _model(path: Path, fields: dict[str, Any], weights: dict[str, Tensor], corpus: Corpus) -> GNNMoEModel:
    try:
        model = GNNMoEModel(GNNMoEConfig(**{"vocab_size": corpus.vocabulary.size, **fields}), seed=0)
        model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the curriculum's difficulty model {path} cannot be built again "
            f"({str(error).splitlines()[0]}); use one whose coupler is registered."
        ) from error
    return model
