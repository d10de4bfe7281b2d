"""The difficulty model of a curriculum: a finished run's checkpoint, and the scores it gives to blocks.

Scoring takes minutes where the text is large, so the scores are kept in the cache.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.config import ExecutionConfig
from bench.data.blocks import TrainBlocks
from bench.data.cache import cache_folder, cached, key_of
from bench.data.corpus import Corpus
from bench.data.curriculum import ScoreBlocks, model_scores
from bench.measure.environment import couplers_sha256, project_sha256
from bench.training.checkpoint import load_checkpoint
from bench.training.execution import Execution
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.model import GNNMoEModel

_REMEDY = "name the checkpoint.pt of a finished run"


def difficulty_scores(
    path: Path,
    blocks: TrainBlocks,
    *,
    corpus: Corpus,
    device: torch.device,
    announce: Callable[[str], None] | None = None,
    cache_dir: Path | None = None,
) -> np.ndarray:
    """Return the mean nll in nats that a checkpoint's model gives each block, (blocks,) float64.

    From the cache (see ``cache_folder``) where the same bytes scored the same blocks before, else
    computed and put there; ``announce`` is told before, in one sentence. Raises Refused as
    ``checkpoint_scorer``.
    """

    def make() -> np.ndarray:
        score = checkpoint_scorer(path, blocks.length, corpus, device)
        if announce is not None:
            announce(f"scoring {len(blocks):,} blocks by {path} …")
        return model_scores(blocks, score)

    return cached(
        cache_folder(cache_dir) / "difficulty" / f"{_key(path, blocks, corpus)}.npy",
        "set of difficulty scores",
        make,
        read=lambda file: np.load(file, allow_pickle=False),
        write=np.save,
    )


def _key(path: Path, blocks: TrainBlocks, corpus: Corpus) -> str:
    try:
        with path.open("rb") as file:
            checkpoint = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"checkpoint {path} cannot be read ({error.strerror}); {_REMEDY}.") from error
    indices = hashlib.sha256(blocks.indices.numpy().astype("<i8").tobytes()).hexdigest()
    text = corpus.sha256, corpus.splits["train"].stream_sha256
    return key_of(project_sha256(), couplers_sha256(), checkpoint, *text, blocks.length, indices)


def checkpoint_scorer(path: Path, length: int, corpus: Corpus, device: torch.device) -> ScoreBlocks:
    """Return a function from inputs and targets (B, ``length``) to the mean nll in nats of each block (B,).

    Raises:
        Refused: the file is no checkpoint of a run that got as far as an evaluation, of another
            text, of shorter sequences, or of a coupler that lies in a file.
    """
    fields, weights = _contents(path, corpus)
    model = _model(path, fields, weights, corpus.vocabulary.size, device).eval()
    trained = model.config.max_seq_length
    if trained < length:
        raise _unfit(
            path,
            f"was trained at max_seq_length {trained}, but this run's blocks have {length} tokens; "
            f"use --max-seq-length {trained} or less, or a checkpoint trained at {length} or more",
        )

    def score(input_ids: Tensor, targets: Tensor) -> Tensor:
        return model.token_nll(input_ids.to(device), targets.to(device)).mean(1)

    return score


def _contents(path: Path, corpus: Corpus) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the model's fields and its best weights."""
    state = load_checkpoint(path, _REMEDY)
    try:
        fields, text = state["identity"]["model"], state["identity"]["data"]["sha256"]
        if state.get("tuned"):  # interrupted: its model has the length found, its identity the one asked for
            fields = {**fields, "max_seq_length": state["tuned"]["length"]}
        weights = state["model"] if "model" in state else state["trainer"]["best_model"]
    except KeyError as error:
        raise _unfit(path, f"is no checkpoint of a run: it lacks {error.args[0]}; {_REMEDY}") from error
    except TypeError as error:
        raise _unfit(path, f"is no checkpoint of a run: a part of it is no dict; {_REMEDY}") from error
    if text != corpus.sha256:
        there = f"{corpus.name} {corpus.config_name}".strip()
        raise _unfit(
            path,
            "was trained on another text or with another tokenizer; "
            f"name a checkpoint of a run on {there} with the tokenizer {corpus.tokenizer}",
        )
    if not weights:
        raise _unfit(path, f"is of a run that was interrupted before its first evaluation; {_REMEDY}")
    return fields, weights


def _model(
    path: Path, fields: dict[str, Any], weights: dict[str, Tensor], words: int, device: torch.device
) -> GNNMoEModel:
    """Return the model in float32, in whatever precision it was trained: its scores order the data."""
    try:
        config = GNNMoEConfig(**{"vocab_size": words, **fields})
        model = Execution(ExecutionConfig(), device).build(config, seed=0)
        model.load_state_dict(weights)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" …")
        raise _unfit(
            path,
            f"cannot be built again ({reason}); use one whose coupler is registered, made by this version",
        ) from error
    return model


def _unfit(path: Path, reason: str) -> Refused:
    return Refused(f"the curriculum's difficulty model {path} {reason}.")
