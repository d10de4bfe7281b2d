"""Hypergraph layers by the names of ``hgnn_conv_type``: messages from experts to hyperedges and back.

To add one, copy ``hnhn.py`` and enter it here.
"""

from collections.abc import Callable
from functools import partial

from gnnmoe.hypergraph import FORMULAS
from gnnmoe.hypergraph_layers._base import HypergraphLayer
from gnnmoe.hypergraph_layers.all_deep_sets import AllDeepSets
from gnnmoe.hypergraph_layers.all_set_transformer import AllSetTransformer
from gnnmoe.hypergraph_layers.attention import HypergraphAttention
from gnnmoe.hypergraph_layers.edhnn import EDHNN
from gnnmoe.hypergraph_layers.hnhn import HNHN
from gnnmoe.hypergraph_layers.stack import HypergraphStack
from gnnmoe.hypergraph_layers.static import StaticConvolution

CONV_TYPES: dict[str, Callable[..., HypergraphLayer]] = {
    **{formula: partial(StaticConvolution, formula=formula) for formula in FORMULAS},
    "HNHN": HNHN,
    "HypergraphAttention": HypergraphAttention,
    "AllDeepSets": AllDeepSets,
    "AllSetTransformer": AllSetTransformer,
    "EDHNN": EDHNN,
}
"""Each takes ``(members, num_experts, embed_dim, num_heads)``."""

__all__ = [
    "CONV_TYPES",
    "EDHNN",
    "HNHN",
    "AllDeepSets",
    "AllSetTransformer",
    "HypergraphAttention",
    "HypergraphLayer",
    "HypergraphStack",
    "StaticConvolution",
]
