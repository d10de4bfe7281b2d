"""What changes over the steps of a made run: its history, its weights, its losses by token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, BATCH, LENGTH = 2, 16, 64
TEST_IS_HARDER = 0.03  # nats


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``made_study`` was asked for."""

    seeds: Sequence[int]
    noise: float
    seed_noise: float
    loss: float
    history: int
    eval_every: int
    tokens: int
    articles: int
    embedded: bool
    arrays: bool
    test: bool
    unmeasured: tuple[str, ...]
    run_name: str | None
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Made:
    """One run: its configuration, seed and status, and the loss that its record will say."""

    config: dict[str, Any]
    key: str
    experts: int
    seed: int
    status: str
    loss: float

    @property
    def coupler(self) -> str:
        return self.config["model"]["coupler_type"]

    def random(self, of: str) -> np.random.Generator:
        return random_of(of, self.key, self.experts, self.seed)


def random_of(of: str, key: str, experts: int, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(
        int.from_bytes(hashlib.md5(f"{of}|{key}|{experts}|{seed}".encode()).digest())))  # fmt: skip


def evaluations(made: Made, plan: Plan, steps: int) -> list[int]:
    return [step for step in range(1, steps + 1) if step % plan.eval_every == 0 or step == plan.history]


def history_text(made: Made, plan: Plan) -> str:
    """Return a loss that falls from the unigram's to the run's own, and its evaluations."""
    steps = plan.history if made.status == "ok" else 0 if made.status == "check_failed" else plan.history // 2
    if not steps:
        return ""
    left_T = np.exp(-4 * np.arange(1, steps + 1) / plan.history)
    losses_T = made.loss + (7.2 - made.loss) * left_T + made.random("batches").normal(0, 0.05, steps)
    if made.status == "diverged":
        losses_T[-1] = np.nan
    evaluated, rows = set(evaluations(made, plan, steps)), []
    for step, loss in enumerate(losses_T.tolist(), 1):
        rate = 8e-3 * min(1, step / max(1, plan.history // 8)) * (1 - 0.9 * step / plan.history)
        rows.append({"kind": "train", "step": step, "epoch": 0, "loss": loss, "learning_rate": rate,
                     "gradient_norm": 0.3 + loss / (10 + step), "tokens": BATCH * LENGTH})  # fmt: skip
        if step in evaluated:
            mean = made.loss + (7.2 - made.loss) * float(left_T[step - 1] - left_T[-1])
            rows.append({"kind": "validation", "step": step, "epoch": 0, "nll_sum": mean * plan.tokens,
                         "tokens": plan.tokens})  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows)


def communication(made: Made) -> dict[str, Any]:
    """Return the end of ``traces``, by names, as the record has it."""
    values = traces(made, np.array([1.0]))
    layers: dict[str, Any] = {f"layer_{layer}": {} for layer in range(LAYERS)}
    for name, found in values.items():
        layer, _, part = name.partition(".")
        end = found[-1].round(6).tolist()
        if part == "hyperedge_weights":
            end = dict(zip(map(named, hyperedges(made)), end, strict=True))
        elif found.ndim == 2:
            end = {str(expert): value for expert, value in enumerate(end)}
        layers[layer][part] = end
    return layers


def hyperedges(made: Made) -> list[tuple[int, ...]]:
    """Return the members of each hyperedge of a run."""
    size = {"all_pairs": 2, "all_triplets": 3}.get(made.config["model"]["static_hyperedge_strategy"])
    return list(combinations(range(made.experts), size)) if size else [tuple(range(made.experts))]


def named(members: tuple[int, ...]) -> str:
    return "{" + ",".join(map(str, members)) + "}"


def traces(made: Made, progress_T: np.ndarray) -> dict[str, np.ndarray]:
    """Return by ``layer_0.name`` the values over time, which go from even to their own ends.

    A part of the ends is the seed's, and a larger one common to all seeds, so that seeds agree in layer 0
    and do not in layer 1.
    """
    found = {}
    for layer in range(LAYERS):
        common = random_of(f"layer {layer}", made.key, made.experts, -1)
        own, share = made.random(f"layer {layer}"), (0.9, 0.0)[layer]

        def moved(shape: int | tuple[int, int], common=common, own=own, share=share) -> np.ndarray:
            ends = share * common.normal(size=shape) + (1 - share) * own.normal(size=shape)
            return np.multiply.outer(progress_T, ends)

        at, number = f"layer_{layer}.", made.experts
        if made.coupler == "HGNN":
            found[at + "hyperedge_weights"] = 1 + 0.03 * moved(len(hyperedges(made)))
        if made.coupler in ("HGNN", "GNN"):
            adjacency = (1 + 0.02 * moved((number, number))) * (1 - np.eye(number)) / max(1, number - 1)
            found |= {at + name: adjacency for name in (
                ("adjacency",) if made.coupler == "HGNN" else ("adjacency_0", "adjacency_1"))}  # fmt: skip
        shares = np.ones((len(progress_T), number)) if made.coupler == "mean" else np.exp(0.1 * moved(number))
        found[at + "mixing"] = shares / shares.sum(-1, keepdims=True)
        if made.coupler in ("gate", "topk"):
            found[at + "gate_weights"] = found[at + "mixing"]
        if made.coupler == "topk":
            found[at + "expert_load"] = found[at + "mixing"]
    return found


def write_arrays(path: Path, made: Made, plan: Plan) -> None:
    steps = np.array([0, *evaluations(made, plan, plan.history)])
    found = traces(made, steps / max(1, plan.history))
    arrays: dict[str, Any] = {name: values.astype(np.float32) for name, values in found.items()}
    np.savez(path / "communication.npz", step=steps, **arrays)
    document = np.sort(np.arange(plan.tokens) % plan.articles).astype(np.int32)
    hard = random_of("tokens", "", 0, 0).gamma(1.5, size=plan.tokens)  # the same tokens are hard for all
    nll = hard * np.exp(made.random("tokens").normal(0, 0.1, plan.tokens))
    nll = (nll * made.loss / nll.mean()).astype(np.float32)
    arrays = {"validation_nll": nll, "validation_document": document}
    if plan.test:
        arrays |= {"test_nll": nll + np.float32(TEST_IS_HARDER), "test_document": document}
    np.savez(path / "nll.npz", **arrays)
