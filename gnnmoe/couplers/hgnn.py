"""The hypergraph coupler: experts that share a hyperedge exchange messages.

Shapes: B batch, L length, N = B·L tokens, E experts, D width, M hyperedges.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig, Refused, unknown_name
from gnnmoe.couplers.base import COUPLER_FIELDS, Coupler, linear_flops
from gnnmoe.couplers.registry import register_coupler
from gnnmoe.hypergraph.backends import BACKENDS, require_backend
from gnnmoe.hypergraph.propagation import FORMULAS, hyperedge_index, linear_readout, linear_readout_flops
from gnnmoe.hypergraph.strategies import static_hyperedges
from gnnmoe.layers.base import LAYERS, HypergraphLayer
from gnnmoe.layers.static import StaticConvolution
from gnnmoe.mixing import mean_over_experts

ACTIVATIONS = {"gelu": F.gelu, "none": None}
SOFTPLUS_OF_ONE = math.log(math.e - 1.0)  # softplus(SOFTPLUS_OF_ONE) = 1
SMALLEST_WEIGHT = 1e-6
EDGE_WEIGHTS = ("softplus", "raw")
RAW_WEIGHTS = ("HypergraphConv", "PyGHypergraphConv")  # they take no root and no logarithm of a weight


class HypergraphStack(nn.ModuleList):
    """Layers of one kind on one hypergraph, each with an optional activation and an optional residual."""

    def __init__(self, activation: Callable[[Tensor], Tensor] | None, residual: bool) -> None:
        super().__init__()
        self.activation, self.residual = activation, residual

    def as_list(self) -> list[HypergraphLayer]:
        """Return the layers."""
        return list(self)  # pyright: ignore[reportReturnType]

    def update(self, x: Tensor, message: Tensor) -> Tensor:
        """Return the features after a layer: ``x``, and ``message`` of the same shape, its output."""
        message = message if self.activation is None else self.activation(message)
        return message + x if self.residual else message  # in the memory order of the message

    def mean(self, x_NED: Tensor, weights_M: Tensor) -> Tensor:
        """Return the mean over the experts (N, D) of the features after the last layer.

        These features are not computed for each expert. Where all layers are linear, the features between the
        layers are not computed either.
        """
        layers, linear, start_NED = self.as_list(), self._linear_layers(), x_NED
        with torch.autocast(x_NED.device.type, enabled=False):  # as small as E × M, in every token's sum
            from_weights = layers[0].from_weights(weights_M)
        for layer in layers[: -max(linear, 1)]:
            x_NED = self.update(x_NED, layer(x_NED, from_weights, start_NED))
        if linear:
            maps = [(layer.weight, layer.bias) for layer in layers[-linear:]]
            return linear_readout(x_NED, from_weights, maps, residual=self.residual)  # pyright: ignore
        if self.activation is None:
            message_ND = layers[-1].mean(x_NED, from_weights, start_NED)
        else:
            message_ND = mean_over_experts(self.activation(layers[-1](x_NED, from_weights, start_NED)))
        return mean_over_experts(x_NED) + message_ND if self.residual else message_ND

    def flops(self, tokens: int) -> int | None:
        """Return the FLOPs of ``mean`` for this many tokens; None where a layer has no formula."""
        layers, linear = self.as_list(), self._linear_layers()
        E, D = layers[0].num_experts, layers[0].embed_dim
        if linear:
            readout = linear_readout_flops(tokens, E, D, linear, residual=self.residual)
        else:
            readout = layers[-1].mean_flops(tokens) if self.activation is None else layers[-1].flops(tokens)
        parts = [readout, *(layer.flops(tokens) for layer in layers[: -max(linear, 1)])]
        counted = [part for part in parts if part is not None]
        return layers[0].from_weights_flops() + sum(counted) if len(counted) == len(parts) else None

    def _linear_layers(self) -> int:
        """Return how many of the last layers ``linear_readout`` computes: linear layers, while it saves maps.

        With the residual, the first of k such layers maps k rows per token, in place of E rows.
        """
        first = self[0]
        if self.activation is not None or not isinstance(first, StaticConvolution) or not first.is_matrix:
            return 0
        return min(len(self), first.num_experts) if self.residual else len(self)


@register_coupler("HGNN")
class HGNNExpertCoupler(Coupler):
    r"""A stack of hypergraph layers over the experts, then their mean, then the combiner.

    .. math:: X \leftarrow X + \mathrm{GELU}(\mathrm{conv}_w(X)), \quad
              w = \mathrm{softplus}(\texttt{hyperedge\_weights})

    ``hgnn_conv_type`` names the layer (see ``gnnmoe/layers/``). The default is the documented
    ``HypergraphConv``, :math:`D^{-1} H W B^{-1} H^\top X \Theta + b`. All layers share the weights, which
    start at 1; weights that are not learned stay 1. Without hyperedges (fewer experts than members) the
    coupler is the mean over experts.

    Options: ``activation`` (gelu or none) and ``residual`` after each layer. ``edge_weights``: softplus
    (positive), or raw (drawn from N(0, 1) and used directly, as in the original experiments). ``backend``
    (vectorized, pyg, loop, scatter or sparse) selects how a static layer is computed.

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: Bai, Zhang and Torr, "Hypergraph convolution and hypergraph attention", 2019
    (arXiv:1901.08150), equation 5. Activation and residual between layers are this project's.
    """

    config_fields = COUPLER_FIELDS
    hyperedge_weights: nn.Parameter | None

    def __init__(
        self,
        config: GNNMoEConfig,
        *,
        activation: str = "gelu",
        residual: bool = True,
        edge_weights: str = "softplus",
        backend: str = "vectorized",
    ) -> None:
        super().__init__(config)
        for kind, name, allowed in (
            ("activation", activation, ACTIVATIONS),
            ("edge_weights", edge_weights, EDGE_WEIGHTS),
            ("backend", backend, BACKENDS),
        ):
            if name not in allowed:
                raise Refused(unknown_name(kind, name, allowed))
        LAYERS.find(config.hgnn_conv_type)
        _refuse_static_only(config.hgnn_conv_type, edge_weights, backend)
        self.edge_weights = edge_weights
        self._members = static_hyperedges(config.num_experts, config.static_hyperedge_strategy)
        self._num_hyperedges = len(self._members)
        self._hyperedge_index = hyperedge_index(self._members)
        self.layers = HypergraphStack(ACTIVATIONS[activation], residual)
        self.register_parameter("hyperedge_weights", None)
        if not self._members:
            warnings.warn(
                f"HGNN: {config.static_hyperedge_strategy} has no hyperedges at num_experts "
                f"{config.num_experts}; the coupler is the mean over experts.",
                stacklevel=2,
            )
            return
        self._build_layers(config, backend)

    def _build_layers(self, config: GNNMoEConfig, backend: str) -> None:
        options = {"backend": backend} if config.hgnn_conv_type in FORMULAS else {}
        make: Callable[..., HypergraphLayer] = LAYERS.find(config.hgnn_conv_type)
        for _ in range(config.gnn_layers):
            self.layers.append(
                make(self._members, config.num_experts, config.embed_dim, config.num_heads, **options)
            )
        self.register_buffer("_ones_M", torch.ones(self._num_hyperedges), persistent=False)
        if config.hgnn_learnable_edge_weights:
            start = torch.full((self._num_hyperedges,), SOFTPLUS_OF_ONE)
            self.hyperedge_weights = nn.Parameter(
                torch.randn(self._num_hyperedges) if self.edge_weights == "raw" else start
            )

    @classmethod
    def canonical_options(cls, config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
        """Leave out ``edge_weights`` where no weights are learned: all are 1 then."""
        learned = config.hgnn_learnable_edge_weights
        return {name: value for name, value in options.items() if learned or name != "edge_weights"}

    @staticmethod
    def generate_static_hyperedges(num_experts: int, strategy: str) -> tuple[Tensor, int]:
        """Return the hyperedge index (2, nnz) and the number of hyperedges M."""
        members = static_hyperedges(num_experts, strategy)
        return hyperedge_index(members), len(members)

    def effective_hyperedge_weights(self) -> Tensor:
        """Return w (M): softplus of the parameter (> 0); raw, the parameter itself; not learned, ones.

        The lower bound keeps 1 / D and its gradient finite in float32 for every value of the parameter.
        """
        if self.hyperedge_weights is None:
            return self._ones_M  # pyright: ignore[reportReturnType]
        if self.edge_weights == "raw":
            return self.hyperedge_weights
        return F.softplus(self.hyperedge_weights).clamp_min(SMALLEST_WEIGHT)

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D) into (B, L, D)."""
        if not self._members:
            return self.combiner(mean_over_experts(expert_outputs))
        B, L, E, D = expert_outputs.shape
        x_NED = expert_outputs.reshape(B * L, E, D)
        return self.combiner(self.layers.mean(x_NED, self.effective_hyperedge_weights())).view(B, L, D)

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor | None:
        """Compute every layer's formula hyperedge by hyperedge, without matrices and indices.

        None where the layer has no ``naive``.
        """
        start = features = list(expert_outputs.unbind(2))
        for layer in self.layers.as_list():
            messages = layer.naive(features, self.effective_hyperedge_weights(), start)
            if messages is None:
                return None
            features = [self.layers.update(x, message) for x, message in zip(features, messages, strict=True)]
        return self.combiner(torch.stack(features).mean(0))

    def flops(self, tokens: int) -> int | None:
        """Count the stack and the combiner."""
        stack, D = self.layers.flops(tokens) if self._members else 0, self.config.embed_dim
        return None if stack is None else stack + linear_flops(tokens, D, D)

    def static_communication(self) -> dict[str, Tensor]:
        """Return the effective hyperedge weights (M) and ``adjacency`` (E, E), where there are hyperedges.

        Row i of the adjacency has the weights of what expert i receives: the matrix that a static layer
        applies. For other layers it is the matrix that follows from the hypergraph and its weights alone.
        """
        if not self._members:
            return {}
        weights_M = self.effective_hyperedge_weights()
        adjacency_EE = self.layers.as_list()[0].adjacency(weights_M)
        return {"hyperedge_weights": weights_M, "adjacency": adjacency_EE}

    @torch.no_grad()
    def communication(
        self, expert_outputs: Tensor | None = None, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return, with ``expert_outputs``, also ``membership_k`` (E, M) of each layer k that attends."""
        found = super().communication(expert_outputs, layer_input)
        if expert_outputs is None or not self._members:
            return found
        start_NED = x_NED = expert_outputs.flatten(0, 1)
        weights_M = self.effective_hyperedge_weights()
        for number, layer in enumerate(self.layers.as_list()):
            membership_EM = layer.membership(x_NED, weights_M)
            if membership_EM is not None:
                found[f"membership_{number}"] = membership_EM
            x_NED = self.layers.update(x_NED, layer(x_NED, layer.from_weights(weights_M), start_NED))
        return found

    def member_names(self) -> dict[str, list[str]]:
        """Return the name of each hyperedge: its members, as in ``{0,2}``."""
        return {"hyperedge_weights": ["{" + ",".join(map(str, members)) + "}" for members in self._members]}

    def inert_parameters(self) -> dict[str, str]:
        """Declare hyperedge weights that cancel out, and the inert parameters of the layers."""
        inert = {}
        for number, layer in enumerate(self.layers.as_list()):
            own = layer.inert_parameters()
            shared = own.pop("hyperedge_weights", None)
            inert |= {f"layers.{number}.{name}": own[name] for name in own}
            if self.hyperedge_weights is None:
                continue
            if shared is not None:
                inert["hyperedge_weights"] = shared
            elif layer.weights_cancel():
                inert["hyperedge_weights"] = "no expert has two hyperedges, so their weights cancel out"
        return inert


def _refuse_static_only(conv_type: str, edge_weights: str, backend: str) -> None:
    """Refuse options that the layer does not have.

    Raises:
        Refused: raw weights or another backend for a layer that does not have them, or a backend whose
            package is missing.
    """
    require_backend(backend)
    if backend != "vectorized" and conv_type not in FORMULAS:
        raise Refused(f"backend {backend} computes {', '.join(FORMULAS)}; {conv_type} has vectorized only.")
    if edge_weights == "raw" and conv_type not in RAW_WEIGHTS:
        raise Refused(
            f"edge_weights raw may be negative, for which {conv_type} has no meaning; use softplus, or "
            f"{' or '.join(RAW_WEIGHTS)}."
        )
