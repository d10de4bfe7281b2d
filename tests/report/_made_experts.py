"""What the experts of a made study learned, added to its runs: diagnostics, samples, features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure.similarity import debiased_cka
from tests.report._made_traces import LAYERS, random_of

TOKENS, WIDTH, RANK = 40, 8, 2
SHARED = {"HGNN": 1.5, "GNN": 1.2, "mean": 0.6, "gate": 0.4}
"""How large the part of the updates is that all experts of a coupler share."""
MATTER = {"gate": 0.02, "HGNN": 0.001}
"""By how many nats the loss rises without the expert that matters most."""


def add_experts(study: Path, *, same: float = 0.8) -> Path:
    """Add what the experts learned to every run of ``study`` that ended well, and return ``study``.

    The last expert differs most from the others and matters most. The experts of two seeds correspond by
    their numbers; ``same`` is the share of their updates that all seeds have in common.
    """
    for path in sorted(study.glob("*/record.json")):
        record = json.loads(path.read_text())
        if record["status"] == "ok":
            _add(path.parent, record, same)
    return study


def _add(folder: Path, record: dict[str, Any], same: float) -> None:
    model, seed = record["config"]["model"], record["seed"]
    coupler, experts = model["coupler_type"], model["num_experts"]
    features = {layer: _features(coupler, experts, layer, seed, same) for layer in range(LAYERS)}
    layers = [
        _layer(coupler, found, random_of("rise", coupler, layer, seed)) for layer, found in features.items()
    ]
    record["diagnostics"] = {"tokens": 2048, "seconds": 1.0, "share_of_run": 0.015, "layers": layers}
    (folder / "record.json").write_text(json.dumps(record))
    write_features(folder, [features[layer] for layer in range(LAYERS)])
    if (folder / "communication.npz").is_file():
        with np.load(folder / "communication.npz") as arrays:
            found = dict(arrays)
        steps = len(found["step"])
        ranks = {
            f"layer_{layer}.effective_rank": np.linspace(
                0.9 * experts, layers[layer]["effective_rank"], steps
            )
            for layer in range(LAYERS)
        }
        np.savez(folder / "communication.npz", **found | ranks)


def write_features(folder: Path, features: Sequence[np.ndarray]) -> None:
    """Write the features (E, n, D) of each layer."""
    arrays: dict[str, Any] = {
        f"layer_{layer}.features": found.astype(np.float16) for layer, found in enumerate(features)
    }
    np.savez_compressed(folder / "experts.npz", **arrays)


def _features(coupler: str, experts: int, layer: int, seed: int, same: float) -> np.ndarray:
    """Return updates (E, n, D): a part of all experts, a part of the expert, and a part of the seed."""
    of_all, of_seed = random_of("experts", coupler, layer, -1), random_of("experts", coupler, layer, seed)

    def draw(random: np.random.Generator, number: int) -> np.ndarray:
        return random.normal(size=(number, TOKENS, RANK)) @ random.normal(size=(number, RANK, WIDTH))

    alike = np.linspace(1, 0.3, experts)[:, None, None] * SHARED.get(coupler, 0.5) * draw(of_all, 1)
    return alike + same * draw(of_all, experts) + (1 - same) * draw(of_seed, experts)


def _layer(coupler: str, features_END: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
    experts = len(features_END)
    unit_END = features_END / np.linalg.norm(features_END, axis=2, keepdims=True)
    centred = list(features_END - features_END.mean(1, keepdims=True))
    rises = MATTER.get(coupler, 0.005) * np.linspace(0, 1, experts) ** 2 + random.normal(0, 2e-4, experts)
    values_NE = np.linalg.svd(features_END.transpose(1, 0, 2), compute_uv=False)
    shares_NE = values_NE / values_NE.sum(1, keepdims=True)
    entropy_N = -(shares_NE * np.log(np.maximum(shares_NE, 1e-12))).sum(1)
    nothing = {"value": None, "reason": "the coupler has no weights that depend on the token"}
    return {
        "cosine": (np.einsum("ind,jnd->ij", unit_END, unit_END) / TOKENS).tolist(),
        "cka": debiased_cka(centred, centred),
        "effective_rank": float(np.exp(entropy_N).mean()),
        "ablation_nats": rises.tolist(),
        "ablation_standard_error": [4e-4] * experts,
        "load": nothing, "mutual_information": nothing,
        "effective_experts": float(experts),
    }  # fmt: skip
