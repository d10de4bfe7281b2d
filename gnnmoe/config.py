"""The shape of a GNN-MoE language model, and refusals of what a user cannot have. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

Initialization = Literal["project", "original"]
VOCABULARY_MULTIPLE = 64  # rows of the embedding and of the head; aligned matrix products are faster
LARGEST = {
    "num_experts": 10_000,
    "embed_dim": 2**20,
    "num_layers": 10_000,
    "num_heads": 2**20,
    "gnn_layers": 1_000,
    "max_seq_length": 2**20,
    "vocab_size": 10**8,
    "ffn_dim": 2**24,
}
"""The largest value of each size of a model; a larger value is a slip."""
MOST_SHOWN = 80
"""The most letters of a list of names in a message."""
OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda"}
"""Names of other tools, and the name here."""


class Refused(ValueError):
    """What a user asked for and cannot have; the message says what is wrong, what is allowed and what to do.

    Every other exception is a mistake of this project.
    """


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Return the sentence that refuses ``name``, lists the allowed names and suggests the nearest."""
    names = sorted(allowed)
    return f"unknown {kind} {brief(name)}; allowed: {listed(names) or 'none'}.{nearest_name(name, names)}"


def brief(value: object) -> str:
    """Return a value as Python writes it, or its beginning."""
    try:
        return shortened(repr(value), 36)
    except (ValueError, RecursionError):  # an integer of 5,000 digits; lists nested in lists
        return f"a value of type {type(value).__name__} that is too long to show"


def shortened(text: str, most: int = 60) -> str:
    """Return a text with at most ``most`` letters; "…" stands for the rest."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def listed(names: Sequence[str]) -> str:
    """Return the names for a message: ``a, b, c``, or of a long list the beginning and how many follow."""
    shown = names if len(", ".join(names)) <= MOST_SHOWN else names[:1]
    while len(shown) < len(names) and len(", ".join(names[: len(shown) + 1])) <= MOST_SHOWN:
        shown = names[: len(shown) + 1]
    rest = f" … and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return ", ".join(shown) + rest


def nearest_name(name: object, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest allowed name, or no text where none is near."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(allowed)}
    asked = str(name).lower()[:MOST_SHOWN]
    nearest = difflib.get_close_matches(OTHER_NAMES.get(asked, asked), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""


@dataclass(kw_only=True)
class GNNMoEConfig:
    """A model: ``num_layers`` layers of ``num_experts`` transformer experts and one coupler.

    Raises:
        Refused: a size is not from 1 to ``LARGEST``, the dropout is outside [0, 1), the number of heads does
            not divide the width, or ``initialization`` is unknown. The names of couplers and strategies are
            checked where they are looked up.
    """

    coupler_type: str = "HGNN"
    """Coupler: a name (--list shows all names), package.module:Class or file.py:Class."""
    hgnn_conv_type: str = "HypergraphConv"
    """HGNN: the hypergraph layer: HypergraphConv (the documented formula), PyGHypergraphConv, HGNNConv, HNHN,
    HypergraphAttention, AllDeepSets, AllSetTransformer, EDHNN, MeanPooling, or file.py:Class."""
    static_hyperedge_strategy: str = "all_pairs"
    """HGNN: which experts share a hyperedge: all_pairs, all_triplets, pairs_and_triplets, all, k_subsets:k=3,
    ring:k=2, random:k=3,m=8,seed=0, file:edges.json (a JSON list of member lists) or file.py:function."""
    hgnn_learnable_edge_weights: bool = True
    """HGNN: learn a positive weight for each hyperedge. Each weight starts at 1."""
    gnn_layers: int = 2
    """Message-passing layers inside the coupler."""
    coupler_options: dict[str, Any] = field(default_factory=dict)
    """The coupler's own options by name."""
    num_experts: int = 4
    """Experts in each layer; all of them see every token."""
    embed_dim: int = 64
    """Width of the embeddings and of every expert."""
    ffn_dim: int | None = None
    """Hidden width of an expert's feed-forward part (default: 4 × embed_dim)."""
    num_layers: int = 2
    """Layers of experts. Each layer has its own coupler."""
    num_heads: int = 2
    """Attention heads of an expert."""
    max_seq_length: int = 128
    """Tokens in a training sequence, which is also the longest input of the model."""
    dropout_rate: float = 0.0
    """Dropout in the experts."""
    initialization: Initialization = "project"
    """How weights start: as in this project's studies, or as in the original GNN-MoE experiments
    (docs/couplers.md lists the standard deviations)."""
    vocab_size: int = 33_278
    """Words in the vocabulary (the published figure of WikiText-2)."""

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if name == "ffn_dim" and value is None:
                continue
            if type(value) is not int or not 1 <= value <= most:
                raise Refused(f"{name} is {brief(value)}; it must be a whole number from 1 to {most:,}.")
        if self.initialization not in get_args(Initialization):
            raise Refused(unknown_name("initialization", self.initialization, get_args(Initialization)))
        if not 0.0 <= self.dropout_rate < 1.0:
            raise Refused(f"dropout_rate is {brief(self.dropout_rate)}; it must lie in [0, 1).")
        if self.embed_dim % self.num_heads:
            divisors = (n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0)
            raise Refused(
                f"num_heads is {self.num_heads} and does not divide embed_dim {self.embed_dim}; "
                f"heads that do: {', '.join(map(str, islice(divisors, 12)))}."
            )

    @property
    def expert_width(self) -> int:
        """Hidden width of an expert: ``ffn_dim``, or 4 × embed_dim where ``ffn_dim`` is None."""
        return 4 * self.embed_dim if self.ffn_dim is None else self.ffn_dim

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of 64."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    def to_dict(self) -> dict[str, Any]:
        """Return every field by name, ready for JSON."""
        return asdict(self)
