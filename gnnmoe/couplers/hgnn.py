"""The hypergraph coupler: experts that share a hyperedge exchange what they found.

Shapes: B batch, L length, N = B·L tokens, E experts, D width, M hyperedges.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.couplers._base import Coupler
from gnnmoe.couplers._registry import register_coupler
from gnnmoe.hypergraph import hyperedge_index, incidence, static_hyperedges
from gnnmoe.hypergraph_backends import BACKENDS
from gnnmoe.naming import unknown_name

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig

CONV_TYPES = ("HypergraphConv", "PyGHypergraphConv")
ACTIVATIONS = {"gelu": F.gelu, "none": None}
SOFTPLUS_OF_ONE = math.log(math.e - 1.0)  # softplus(SOFTPLUS_OF_ONE) = 1
SMALLEST_WEIGHT = 1e-6


class HypergraphLayer(nn.Module):
    """One static hypergraph convolution, ``P(w) x Θ + b``, with the backend of its choice."""

    incidence_EM: Tensor
    index: Tensor

    def __init__(
        self, embed_dim: int, index: Tensor, incidence_EM: Tensor, formula: str, backend: str
    ) -> None:
        super().__init__()
        self.formula, self.backend = formula, backend
        self.weight = nn.Parameter(torch.empty(embed_dim, embed_dim))  # Θ, as nn.Linear stores it
        self.bias = nn.Parameter(torch.zeros(embed_dim))
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("incidence_EM", incidence_EM.to(self.weight.dtype), persistent=False)
        self.pyg_conv: list[nn.Module] = []  # made by the PyG backends on first use

    def forward(self, x_NED: Tensor, weights_M: Tensor) -> Tensor:
        """Return (N, E, D)."""
        return BACKENDS[self.backend](self, x_NED, weights_M)


@register_coupler("HGNN")
class HGNNExpertCoupler(Coupler):
    r"""A stack of hypergraph convolutions over the experts, then their mean, then the combiner.

    .. math:: X \leftarrow X + \mathrm{GELU}(D^{-1} H W B^{-1} H^\top X \Theta + b)

    with :math:`W = \mathrm{diag}(\mathrm{softplus}(\texttt{hyperedge\_weights}))`, 1 at the start
    and shared by the layers, :math:`D = \mathrm{diag}(H w)` and :math:`B = \mathrm{diag}(H^\top 1)`.
    ``hgnn_conv_type="PyGHypergraphConv"`` leaves :math:`W` out of the message, as PyG does.
    Without hyperedges (fewer experts than members) it is the mean over experts.

    Options: ``activation`` (gelu or none) and ``residual`` after each convolution; ``backend``
    (vectorized, pyg or loop) computes the same in different ways.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: Bai, Zhang and Torr, "Hypergraph convolution and hypergraph attention", 2019
    (arXiv:1901.08150), equation 5; activation and residual between layers are this project's.
    """

    hyperedge_weights: nn.Parameter | None

    def __init__(
        self,
        config: GNNMoEConfig,
        *,
        activation: str = "gelu",
        residual: bool = True,
        backend: str = "vectorized",
    ) -> None:
        super().__init__(config)
        for kind, name, allowed in (
            ("hgnn_conv_type", config.hgnn_conv_type, CONV_TYPES),
            ("activation", activation, ACTIVATIONS),
            ("backend", backend, BACKENDS),
        ):
            if name not in allowed:
                raise ValueError(unknown_name(kind, name, allowed))
        self.activation, self.residual = ACTIVATIONS[activation], residual
        self._weight_in_message = config.hgnn_conv_type == "HypergraphConv"
        self._members = static_hyperedges(config.num_experts, config.static_hyperedge_strategy)
        self._num_hyperedges = len(self._members)
        self._hyperedge_index = hyperedge_index(self._members)
        self.layers = nn.ModuleList()
        self.register_parameter("hyperedge_weights", None)
        if not self._members:
            warnings.warn(
                f"HGNN: {config.static_hyperedge_strategy} has no hyperedges at num_experts "
                f"{config.num_experts}; the coupler is the mean over experts.",
                stacklevel=2,
            )
            return
        incidence_EM = incidence(self._hyperedge_index, config.num_experts, self._num_hyperedges)
        self.layers.extend(
            HypergraphLayer(
                config.embed_dim, self._hyperedge_index, incidence_EM, config.hgnn_conv_type, backend
            )
            for _ in range(config.gnn_layers)
        )
        self.register_buffer("_ones_M", torch.ones(self._num_hyperedges), persistent=False)
        if config.hgnn_learnable_edge_weights:
            self.hyperedge_weights = nn.Parameter(torch.full((self._num_hyperedges,), SOFTPLUS_OF_ONE))

    @staticmethod
    def generate_static_hyperedges(num_experts: int, strategy: str) -> tuple[Tensor, int]:
        """Return the hyperedge index (2, nnz) and the number of hyperedges M."""
        members = static_hyperedges(num_experts, strategy)
        return hyperedge_index(members), len(members)

    def effective_hyperedge_weights(self) -> Tensor:
        """Return w (M) > 0: softplus of the parameter, or ones where the weights are not learned.

        The floor keeps 1 / D and its gradient finite in float32 wherever the parameter goes.
        """
        if self.hyperedge_weights is None:
            return self._ones_M  # pyright: ignore[reportReturnType]
        return F.softplus(self.hyperedge_weights).clamp_min(SMALLEST_WEIGHT)

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        del layer_input
        if not self._members:
            return self.combiner(expert_outputs.mean(2))
        B, L, E, D = expert_outputs.shape
        x_NED = expert_outputs.reshape(B * L, E, D)
        weights_M = self.effective_hyperedge_weights()
        for layer in self.layers:
            x_NED = self._update(x_NED, layer(x_NED, weights_M))
        return self.combiner(x_NED.mean(1)).view(B, L, D)

    def _update(self, x: Tensor, message: Tensor) -> Tensor:
        message = message if self.activation is None else self.activation(message)
        return x + message if self.residual else message

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Sum over hyperedges and their members one by one, with no matrix and no index."""
        del layer_input
        features = list(expert_outputs.unbind(2))
        weights = self.effective_hyperedge_weights() if self._members else ()
        for layer in self.layers:
            assert isinstance(layer, HypergraphLayer)
            mapped = [F.linear(x, layer.weight) for x in features]
            messages = [
                self._message(expert, mapped, weights) + layer.bias for expert in range(len(features))
            ]
            features = [self._update(x, message) for x, message in zip(features, messages, strict=True)]
        return self.combiner(torch.stack(features).mean(0))

    def _message(self, expert: int, mapped: list[Tensor], weights: Sequence[Tensor] | Tensor) -> Tensor:
        """Return what one expert hears: the mean of each of its hyperedges, weighed and summed."""
        total, degree = torch.zeros_like(mapped[expert]), torch.zeros_like(mapped[expert][0, 0, 0])
        for weight, members in zip(weights, self._members, strict=True):
            if expert in members:
                average = torch.stack([mapped[member] for member in members]).mean(0)
                total = total + (weight * average if self._weight_in_message else average)
                degree = degree + weight
        return total / degree if any(expert in members for members in self._members) else total

    def static_communication(self) -> dict[str, Tensor]:
        """Return the effective hyperedge weights (M), where there are hyperedges."""
        return {"hyperedge_weights": self.effective_hyperedge_weights()} if self._members else {}

    def member_names(self) -> dict[str, list[str]]:
        """Name each hyperedge by its members, as in ``{0,2}``."""
        return {"hyperedge_weights": ["{" + ",".join(map(str, members)) + "}" for members in self._members]}

    def inert_parameters(self) -> dict[str, str]:
        """Declare the weight of a single hyperedge, which the degree divides out again."""
        if self.hyperedge_weights is not None and self._num_hyperedges == 1 and self._weight_in_message:
            return {"hyperedge_weights": "the weight of a single hyperedge cancels out in D⁻¹ H W"}
        return {}
