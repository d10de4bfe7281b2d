"""The contract of a hypergraph layer, and the parts that layers share.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gnnmoe.config import Refused
from gnnmoe.discovery import Loaded, Registry, forget_inherited
from gnnmoe.hypergraph.propagation import hyperedge_index, incidence, propagation_matrix, safe_reciprocal
from gnnmoe.hypergraph.strategies import Members
from gnnmoe.mixing import mean_over_experts, mix

MOST_COMPILED_PIECES = 4
"""A compiler writes out every piece, which takes its time for each."""


class HypergraphLayer(nn.Module, ABC):
    """One round of messages from experts to hyperedges and back: (N, E, D) → (N, E, D).

    The coupler adds the activation and the residual, and calls ``from_weights`` once for all its layers.
    Every token has the same hypergraph, so no index depends on N, and no token can see another. ``num_heads``
    is for layers that attend.
    """

    incidence_EM: Tensor

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forget_inherited(cls, HypergraphLayer, ("mean", "naive", "flops", "mean_flops"))

    def __init__(self, members: list[Members], num_experts: int, embed_dim: int, num_heads: int = 1) -> None:
        super().__init__()
        self.members, self.num_heads = members, num_heads
        self.num_experts, self.num_hyperedges, self.embed_dim = num_experts, len(self.members), embed_dim
        matrix_EM = incidence(hyperedge_index(self.members), num_experts, self.num_hyperedges)
        self.register_buffer("incidence_EM", matrix_EM.to(torch.get_default_dtype()), persistent=False)

    @abstractmethod
    def forward(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return the message that each expert receives (N, E, D).

        ``from_weights`` is the result of the method of this name; ``start_NED`` are the features before the
        first layer.
        """

    def from_weights(self, weights_M: Tensor) -> Tensor:
        """Return all that ``forward`` needs of the hyperedge weights (M); it is the same for every token.

        Here D⁻¹ H W (E, M): the weighted mean over the hyperedges of each expert, or zeros without any.
        """
        per_expert_E = safe_reciprocal(self.incidence_EM @ weights_M)
        return per_expert_E[:, None] * self.incidence_EM * weights_M

    def mean(self, x_NED: Tensor, from_weights: Tensor, start_NED: Tensor) -> Tensor:
        """Return the mean over the experts of ``forward`` (N, D)."""
        return mean_over_experts(self(x_NED, from_weights, start_NED))

    def naive(self, x: list[Tensor], weights: Tensor, start: list[Tensor]) -> list[Tensor] | None:
        """Compute the same from the formula, hyperedge by hyperedge, on a list of E features (…, D).

        None where the layer has no reference implementation.
        """
        return None

    def flops(self, tokens: int) -> int | None:
        """Return the FLOPs of ``forward`` for this many tokens: 2 per multiply-add of a matrix product.

        None where the layer has no formula; ``torch.utils.flop_counter`` then counts them.
        """
        return None

    def mean_flops(self, tokens: int) -> int | None:
        """Return the FLOPs of ``mean`` for this many tokens."""
        return self.flops(tokens)

    def from_weights_flops(self) -> int:
        """Return the FLOPs of ``from_weights``."""
        return 0

    def inert_parameters(self) -> dict[str, str]:
        """Return the parameters that have no gradient on this hypergraph: name → the reason.

        The name ``hyperedge_weights`` is that of the coupler's weights, for a layer that does not read them.
        """
        return {}

    def adjacency(self, weights_M: Tensor) -> Tensor:
        """Return D⁻¹ H W B⁻¹ Hᵀ (E, E): how much expert i receives from expert j, by the weights alone."""
        return propagation_matrix(self.incidence_EM, weights_M, "HypergraphConv")

    def membership(self, x_NED: Tensor, weights_M: Tensor) -> Tensor | None:
        """Return how much each hyperedge counts for each expert (E, M), averaged over the tokens.

        None where this does not depend on the content.
        """
        return None

    def weights_cancel(self) -> bool:
        """Return whether the hyperedge weights change nothing: no expert has two hyperedges to weigh."""
        return self.one_hyperedge_each()

    def one_hyperedge_each(self) -> bool:
        """Return whether every expert has at most one hyperedge."""
        return bool((self.incidence_EM.sum(1) <= 1).all())

    def mean_of_members(self, x_NED: Tensor) -> Tensor:
        """Return the mean over the members of each hyperedge (N, M, D): B⁻¹ Hᵀ x."""
        per_edge_M = safe_reciprocal(self.incidence_EM.sum(0))
        return mix((self.incidence_EM * per_edge_M).T, x_NED)

    def hyperedges_of(self, expert: int) -> list[int]:
        """Return the numbers of the hyperedges to which ``expert`` belongs."""
        return [number for number, members in enumerate(self.members) if expert in members]


FORWARD = ["self", "x_NED", "from_weights", "start_NED"]


def check_layer(cls: Any, name: str) -> None:
    """Refuse a class that does not look like a hypergraph layer.

    Raises:
        Refused: it is no subclass of ``HypergraphLayer``, or ``forward`` is missing or takes other arguments.
    """
    breach = None
    if not _is_layer(cls):
        breach = "it is not a subclass of gnnmoe.HypergraphLayer; derive it from that class"
    elif inspect.isabstract(cls):
        breach = "it does not implement forward(x_NED, from_weights, start_NED)"
    elif list(inspect.signature(cls.forward).parameters) != FORWARD:
        breach = "forward must take x_NED, from_weights and start_NED after self, and nothing else"
    if breach is not None:
        raise Refused(f"hypergraph layer {name!r} breaks the contract: {breach}.")


def _is_layer(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, HypergraphLayer)


LAYERS: Registry[type[HypergraphLayer]] = Registry(
    "hgnn_conv_type", "gnnmoe.layers", "gnnmoe.layers", check_layer,
    lambda thing: _is_layer(thing) and thing is not HypergraphLayer,
)  # fmt: skip
"""The values of ``hgnn_conv_type``."""


def register_layer(name: str) -> Callable[[Loaded], Loaded]:
    """Return a decorator that makes a class available as ``--hgnn-conv-type name``.

    Raises:
        Refused: another class has this name, or the class breaks the contract.
    """
    return LAYERS.registering(name)


def naive_mean(values: list[Tensor]) -> Tensor:
    """Return the mean of tensors of one shape; the list is not empty."""
    return torch.stack(values).mean(0)


def naive_weighted_mean(values: list[Tensor], weights: list[Tensor], otherwise: Tensor) -> Tensor:
    """Return Σ w v / Σ w, or zeros like ``otherwise`` for an empty list."""
    if not values:
        return torch.zeros_like(otherwise)
    total = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(otherwise))
    return total / torch.stack(weights).sum()


class MLP(nn.Module):
    """Linear–GELU–Linear of one width, the hidden layer as wide as the output."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape (…, D)."""
        return self.second(F.gelu(self.first(x)))


def over_token_chunks(function: Callable[..., Tensor], *inputs: Tensor, features: int) -> Tensor:
    """Return ``function(*inputs)`` for inputs (N, E, D), computed for one piece of the tokens after another.

    ``features`` is how many feature vectors (D) a token needs at once, in forward and backward. The number
    of pieces is such that one piece needs about as much memory as an input. No tensor inside a piece is
    saved: the backward computes it again. ``function`` treats each token alone and draws no random numbers.

    Under the transforms of ``torch.func``, which do not release saved tensors, all tokens are one piece.
    Under ``torch.compile`` there are at most four pieces.
    """
    N, E, _ = inputs[0].shape
    pieces = -(-features // max(E, 1))
    if torch.compiler.is_compiling():
        pieces = min(pieces, MOST_COMPILED_PIECES)
    elif torch._C._are_functorch_transforms_active():
        return function(*inputs)
    if torch.is_grad_enabled():
        function = partial(
            checkpoint, function, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )
    if pieces <= 1:
        return function(*inputs)
    split = [x.split(-(-N // pieces)) for x in inputs]
    return torch.cat([function(*piece) for piece in zip(*split, strict=True)])
