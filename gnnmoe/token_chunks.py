"""Going over the tokens in pieces, for what needs more memory for each token than there is for all.

Shapes: N tokens, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MOST_COMPILED_PIECES = 4
"""A compiler writes every piece out, and takes as long for each."""


def over_token_chunks(function: Callable[..., Tensor], *inputs: Tensor, features: int) -> Tensor:
    """Return ``function(*inputs)`` of inputs (N, E, D), one piece of the tokens after the other.

    ``features`` is how many feature vectors (D) a token needs at once, in forward and backward: the pieces
    are so many that all of one piece together are about as large as an input. Nothing inside a piece is
    saved: it is computed again in the backward. ``function`` treats each token alone and draws no
    random numbers. Under the transforms of ``torch.func``, which do not let go of what is saved, all
    tokens are one piece; under ``torch.compile`` there are four pieces at most.
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
