"""What the experts of a model learned: how alike they are, whether one matters, and which tokens they serve.

All of it is measured on the same fixed validation tokens, in eval mode. Only the effective number of experts
follows from the mixing of the record. Letters: B batch, L length, N tokens, E experts, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.measure.similarity import debiased_cka, feature_shape, projection
from bench.record import LEAST_TOKENS, Communication, Diagnostics, ExpertsOfLayer, NotMeasured, not_measured
from bench.training.step import Batch, split
from gnnmoe.head import IGNORED
from gnnmoe.model import GNNMoELayer, GNNMoEModel

TOKENS = 2_048
"""Validation tokens on which the experts are compared; fewer where the split is smaller."""
ONE_EXPERT = "a layer has one expert"
NO_WEIGHTS = "the coupler has no weights that depend on the token"
WRONG_WEIGHTS = "token_weights of the coupler gave a weight below 0 or not finite"


@dataclass(frozen=True)
class Seen:
    """What one layer does on the fixed tokens, in pieces of some sequences."""

    layer: GNNMoELayer
    inputs: list[Tensor]
    """The layer's input, (B, L, D) each."""
    outputs: list[Tensor]
    """The experts' outputs, (B, L, E, D) each."""

    def mixed(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the layer's output (B, L, D) for these outputs of the experts."""
        pairs = zip(self.inputs, outputs, strict=True)
        return [x_BLD + self.layer.coupler(out_BLED, x_BLD) for x_BLD, out_BLED in pairs]


class Experts:
    """Measures the experts of a model on the targets of ``batch`` that are scored, at most ``TOKENS``.

    ``rows``: sequences per forward; None: all at once.
    """

    def __init__(self, batch: Batch, rows: int | None) -> None:
        self._parts = list(split(batch, rows))
        scored = batch["targets"].flatten() != IGNORED
        self._chosen_N = scored.nonzero().flatten()[:TOKENS]

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self._chosen_N)

    def why_not(self, model: GNNMoEModel) -> str | None:
        """Return why the experts of ``model`` cannot be compared; None where they can."""
        if any(layer.coupler.expert_shape()[0] < 2 for layer in model.layers):
            return ONE_EXPERT
        few = f"there are fewer than {LEAST_TOKENS} validation tokens"
        return few if self.tokens < LEAST_TOKENS else None

    @torch.no_grad()
    def sample(self, model: GNNMoEModel) -> dict[str, Tensor]:
        """Return by name, such as ``layer_0.cosine``, how alike the experts are."""
        if self.why_not(model):
            return {}
        found: dict[str, Tensor] = {}
        with _evaluating(model):
            for number, seen in enumerate(self._seen(model)):
                alike = _alike(self._updates(seen)) | _routing(self._weights(seen))
                for name, value in alike.items():
                    found[f"layer_{number}.{name}"] = torch.as_tensor(value)
        return found

    @torch.no_grad()
    def conclude(
        self, model: GNNMoEModel, communication: Communication, seconds: float
    ) -> tuple[Diagnostics | NotMeasured, dict[str, np.ndarray]]:
        """Return the part of the record, and by layer the features that the matching over seeds needs.

        ``communication`` is the record's, ``seconds`` the time of the samples during the training.
        """
        start, why = time.perf_counter(), self.why_not(model)
        if why:
            return not_measured(why), {}
        with _evaluating(model):
            before_N = self._nll(model, self._embedded(model), 0)
            layers, arrays = [], {}
            experts = sum(layer.coupler.expert_shape()[0] for layer in model.layers)
            for number, seen in enumerate(self._seen(model)):
                updates_NED = self._updates(seen)
                rises = [
                    self._rise(model, seen, number, expert, before_N)
                    for expert in range(updates_NED.shape[1])
                ]
                layers.append(
                    _of_layer(
                        updates_NED,
                        self._weights(seen),
                        rises,
                        communication[f"layer_{number}"].get("mixing"),
                    )
                )
                arrays[f"layer_{number}.features"] = _features(updates_NED, experts)
        seconds += time.perf_counter() - start
        return Diagnostics(tokens=self.tokens, layers=layers, seconds=seconds), arrays

    def _embedded(self, model: GNNMoEModel) -> list[Tensor]:
        return [model.embed(part["input_ids"]) for part in self._parts]

    def _seen(self, model: GNNMoEModel) -> Iterator[Seen]:
        """Yield what each layer does, from the first layer to the last."""
        inputs = self._embedded(model)
        with self._autocast(model):
            for layer in model.layers:
                seen = Seen(layer, inputs, [layer.expert_outputs(x_BLD) for x_BLD in inputs])
                yield seen
                inputs = seen.mixed(seen.outputs)

    def _autocast(self, model: GNNMoEModel) -> Any:
        return model.autocast(self._chosen_N.device)

    def _updates(self, seen: Seen) -> Tensor:
        """Return each expert's output minus the layer's input, centred over tokens: (N, E, D), float64.

        In float64 nothing that follows is rounded by the model's precision. MPS has no float64, so there the
        updates move to the CPU.
        """
        parts = [
            (out - x[:, :, None]).flatten(0, 1) for x, out in zip(seen.inputs, seen.outputs, strict=True)
        ]
        updates_NED = torch.cat(parts)[self._chosen_N]
        updates_NED = (updates_NED.cpu() if updates_NED.device.type == "mps" else updates_NED).double()
        return updates_NED - updates_NED.mean(0)

    def _weights(self, seen: Seen) -> Tensor | None:
        """Return the coupler's weight of each expert for each token (N, E); None where it has none."""
        found = [
            seen.layer.coupler.token_weights(out, x) for x, out in zip(seen.inputs, seen.outputs, strict=True)
        ]
        parts = [weights.flatten(0, 1) for weights in found if weights is not None]
        return torch.cat(parts)[self._chosen_N].cpu().double() if len(parts) == len(found) else None

    def _nll(self, model: GNNMoEModel, hidden: list[Tensor], first_layer: int) -> Tensor:
        """Return the nll (N,) in nats when ``hidden`` enters the layer ``first_layer``."""
        parts = zip(hidden, self._parts, strict=True)
        found = [model.nll_from(x_BLD, first_layer, part["targets"]).flatten() for x_BLD, part in parts]
        return torch.cat(found)[self._chosen_N].cpu().double()

    def _rise(
        self, model: GNNMoEModel, seen: Seen, number: int, expert: int, before_N: Tensor
    ) -> tuple[float, float]:
        """Return the rise of the loss in nats without an expert, and its standard error over the tokens."""
        outputs = [without(out_BLED, expert) for out_BLED in seen.outputs]
        rise_N = self._nll(model, seen.mixed(outputs), number + 1) - before_N
        return float(rise_N.mean()), float(rise_N.std() / math.sqrt(len(rise_N)))


@contextmanager
def _evaluating(model: GNNMoEModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def without(outputs_BLED: Tensor, expert: int) -> Tensor:
    """Return ``outputs`` (B, L, E, D) with the mean of the other experts in the place of ``expert``."""
    outputs = outputs_BLED.clone()
    others = [other for other in range(outputs.shape[2]) if other != expert]
    outputs[:, :, expert] = outputs_BLED[:, :, others].mean(2)
    return outputs


def _alike(updates_NED: Tensor) -> dict[str, Any]:
    """Return the cosine (E, E), the debiased CKA (E, E) and the effective rank of centred updates."""
    return {
        "cosine": cosines(updates_NED),
        "cka": debiased_cka(experts := list(updates_NED.unbind(1)), experts),
        "effective_rank": effective_rank(updates_NED),
    }


def cosines(updates_NED: Tensor) -> Tensor:
    """Return the cosine of each two experts' updates of a token (E, E), averaged over the tokens."""
    unit_NED = torch.nn.functional.normalize(updates_NED, dim=-1)
    return (unit_NED @ unit_NED.mT).mean(0)


def effective_rank(updates_NED: Tensor) -> float:
    """Return the effective rank of the E updates of a token, averaged over the tokens: from 1 to E.

    It is exp of the entropy of the singular values of the (E, D) matrix, normalised to sum 1. A token whose
    updates are all 0 counts as rank 1.

    Source: Roy and Vetterli, "The effective rank", 2007.
    """
    squares_NE = torch.linalg.eigvalsh(updates_NED @ updates_NED.mT).clamp_min(0)
    rounding = squares_NE.amax(-1, keepdim=True) * 1e-12  # a root would make much of the rounding
    values_NE = torch.where(squares_NE > rounding, squares_NE, 0).sqrt()
    shares_NE = values_NE / values_NE.sum(-1, keepdim=True).clamp_min(torch.finfo(values_NE.dtype).tiny)
    return float(entropy(shares_NE).exp().mean())


def entropy(shares: Tensor) -> Tensor:
    """Return −Σ p ln p over the last axis, in nats; 0 · ln 0 is 0."""
    return -torch.xlogy(shares, shares).sum(-1)


def _routing(weights_NE: Tensor | None) -> dict[str, Any]:
    """Return the load (E) and the mutual information of token and expert in nats; nothing without weights.

    Both are NaN where a weight is below 0 or not finite.
    The mutual information is the entropy of the mean weights minus the mean entropy of the weights.
    """
    if weights_NE is None:
        return {}
    if not bool(((weights_NE >= 0) & weights_NE.isfinite()).all()):
        weights_NE = torch.full_like(weights_NE, math.nan)
    shares_NE = weights_NE / weights_NE.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_NE.dtype).tiny)
    load_E = shares_NE.mean(0)
    information = entropy(load_E) - entropy(shares_NE).mean()
    return {"load": load_E, "mutual_information": float(information.clamp_min(0))}


def _of_layer(
    updates_NED: Tensor,
    weights_NE: Tensor | None,
    rises: Sequence[tuple[float, float]],
    mixing: Any,
) -> ExpertsOfLayer:
    alike, routing = _alike(updates_NED), _routing(weights_NE)
    why_not = NO_WEIGHTS
    if routing and math.isnan(routing["mutual_information"]):
        routing, why_not = {}, WRONG_WEIGHTS
    return ExpertsOfLayer(
        cosine=alike["cosine"].tolist(),
        cka=alike["cka"],
        effective_rank=alike["effective_rank"],
        ablation_nats=[rise for rise, _ in rises],
        ablation_standard_error=[error for _, error in rises],
        load=routing["load"].tolist() if routing else not_measured(why_not),
        mutual_information=routing["mutual_information"] if routing else not_measured(why_not),
        effective_experts=(
            float(entropy(torch.tensor(list(mixing.values()), dtype=torch.float64)).exp())
            if isinstance(mixing, dict)
            else not_measured("the coupler reports no mixing")
        ),
    )


def _features(updates_NED: Tensor, experts: int) -> np.ndarray:
    """Return the features (E, n, d) of tokens spread evenly, in half precision, of mean square 1."""
    N, _, D = updates_NED.shape
    tokens, kept = feature_shape(experts, N, D)
    chosen = np.linspace(0, N - 1, tokens).astype(int)
    features_NED = updates_NED[torch.from_numpy(chosen).to(updates_NED.device)]
    features_END = features_NED.transpose(0, 1).float().cpu().numpy()
    onto = projection(D, kept)
    if onto is not None:
        features_END = features_END @ onto
    scale = np.sqrt(np.mean(features_END**2, axis=(1, 2), keepdims=True))
    return (features_END / np.where(scale > 0, scale, 1)).astype(np.float16)
