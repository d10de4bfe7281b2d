"""How weights start: as in this project's studies, or as in the original experiments.

``GNNMoEConfig.initialization`` says which. The original applied ``init_weights`` to all modules of its
model, which reaches every ``nn.Linear`` and no bare ``nn.Parameter``. docs/couplers.md lists the standard
deviations of both starts.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from gnnmoe.experts import ExpertBlock


def init_weights(module: nn.Module) -> None:
    """Draw the matrix of a linear map or an embedding from N(0, 0.02²), with a zero bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def init_experts(blocks: Iterable[ExpertBlock], initialization: str) -> None:
    """Draw the weights of a layer's experts.

    ``original`` draws queries, keys and values as one Xavier-uniform matrix (3 D, D). That is how
    ``nn.MultiheadAttention`` starts them: as a bare parameter.
    """
    for block in blocks:
        block.apply(init_weights)
        if initialization == "original":
            nn.init.xavier_uniform_(block.qkv.weight)


def init_coupler(coupler: nn.Module, initialization: str) -> None:
    """Draw every ``nn.Linear`` and ``nn.Embedding`` of a coupler again where the start is ``original``.

    Bare parameters keep the start that the coupler's class gives them. ``project`` changes nothing.
    """
    if initialization == "original":
        coupler.apply(init_weights)
