"""Hypergraph layers one after the other, and the mean over the experts after the last.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gnnmoe.hypergraph_layers._base import HypergraphLayer
from gnnmoe.hypergraph_layers.static import StaticConvolution
from gnnmoe.linear_readout import linear_readout, linear_readout_flops
from gnnmoe.mixing import mean_over_experts


class HypergraphStack(nn.ModuleList):
    """Layers of one kind on one hypergraph, each followed by an activation and a residual, or not."""

    def __init__(
        self,
        layers: Iterable[HypergraphLayer] = (),
        *,
        activation: Callable[[Tensor], Tensor] | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__(layers)
        self.activation, self.residual = activation, residual

    def as_list(self) -> list[HypergraphLayer]:
        """Return the layers."""
        return list(self)  # pyright: ignore[reportReturnType]

    def update(self, x: Tensor, message: Tensor) -> Tensor:
        """Return what follows ``x`` where a layer's output is ``message``, of the same shape."""
        message = message if self.activation is None else self.activation(message)
        return message + x if self.residual else message  # in the order of the message in memory

    def mean(self, x_NED: Tensor, weights_M: Tensor) -> Tensor:
        """Return the mean over the experts (N, D) of what follows the last layer.

        What follows the last layer is not formed for each expert; nor, where nothing but linear maps
        follows, what comes before.
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

    def flops(self, tokens: int) -> int:
        """Return the FLOPs of ``mean`` on this many tokens."""
        layers, linear = self.as_list(), self._linear_layers()
        E, D = layers[0].num_experts, layers[0].embed_dim
        if linear:
            readout = linear_readout_flops(tokens, E, D, linear, residual=self.residual)
        else:
            readout = layers[-1].mean_flops(tokens) if self.activation is None else layers[-1].flops(tokens)
        before = sum(layer.flops(tokens) for layer in layers[: -max(linear, 1)])
        return layers[0].from_weights_flops() + before + readout

    def _linear_layers(self) -> int:
        """Return how many of the last layers fold into the mean: all linear ones, while that saves maps.

        With the residual, the first of k folded layers maps k rows of a token, in place of E.
        """
        first = self[0]
        if self.activation is not None or not isinstance(first, StaticConvolution) or not first.is_matrix:
            return 0
        return min(len(self), first.num_experts) if self.residual else len(self)
