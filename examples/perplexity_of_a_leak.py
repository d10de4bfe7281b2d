"""What a leak is worth: one model, trained with and without it: ``python -m examples.perplexity_of_a_leak``.

The two start alike, see the same batches of the embedded text and differ in one number: how far the hyperedge
ids of the next token are shifted. PyG's ``Batch`` shifts them by E, which merges hyperedges of neighbouring
tokens where there are more of them than experts; by M every token has its own. About a minute on one core.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch_geometric.nn import HypergraphConv

from bench.data.corpus import load_corpus
from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.couplers.base import Coupler
from gnnmoe.hypergraph.propagation import hyperedge_index
from gnnmoe.hypergraph.strategies import static_hyperedges

LENGTH, BATCH, EVALUATED = 32, 16, 64  # blocks


class BatchedCoupler(Coupler):
    r"""The hypergraphs of all tokens as one, as PyG batches them; two layers, then the mean over experts.

    .. math:: X \leftarrow D^{-1} H B^{-1} H^\top X \Theta + b

    Shapes: (B, L, E, D) → (B, L, D). Source: see ``examples.leaking_coupler``.
    """

    leaks = True
    """Whether hyperedge ids are shifted by E a token, as by ``Batch``, or by M."""

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        self.members = static_hyperedges(config.num_experts, config.static_hyperedge_strategy)
        self.layers = nn.ModuleList(HypergraphConv(config.embed_dim, config.embed_dim) for _ in range(2))

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix the experts; with ``leaks`` also those of neighbouring tokens."""
        del layer_input
        B, L, E, D = expert_outputs.shape
        shift = torch.tensor([[E], [E if self.leaks else len(self.members)]])
        tokens = torch.arange(B * L).repeat_interleave(hyperedge_index(self.members).shape[1])
        index = hyperedge_index(self.members).repeat(1, B * L) + shift * tokens
        x = expert_outputs.reshape(B * L * E, D)
        for layer in self.layers:
            x = layer(x, index)
        return self.combiner(x.view(B, L, E, D).mean(2))

    reference = forward


def main(steps: int = 200) -> int:
    """Train with and without the leak and print the perplexities."""
    torch.set_num_threads(1)
    corpus = load_corpus(source="embedded")
    train, validation = (
        _blocks(torch.from_numpy(corpus.splits[name].stream)) for name in ("train", "validation")
    )
    config = GNNMoEConfig(
        coupler_type="examples.perplexity_of_a_leak:BatchedCoupler", embed_dim=32, num_heads=2, num_layers=2,
        num_experts=4, max_seq_length=LENGTH, vocab_size=corpus.vocabulary.size,
    )  # fmt: skip
    print(f"{corpus.vocabulary.size:,} words: a guess that knows nothing has that perplexity")
    for leaks in (True, False):
        torch.manual_seed(0)
        model = GNNMoEModel(config)
        _let_leak(model, leaks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
        for inputs, targets in _batches(train, steps):
            optimizer.zero_grad()
            model(inputs, targets=targets, return_logits=False)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        name, value = "leaking" if leaks else "honest ", _perplexity(model, validation)
        print(f"{name}: perplexity {value:8.1f} on validation, after {steps} steps")
        if leaks:
            _let_leak(model, False)
            value = _perplexity(model, validation)
            alone = "of the same weights, where no token sees another's hyperedges"
            print(f"         perplexity {value:8.1f} {alone}")
    return 0


def _blocks(stream: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, each (blocks, LENGTH)."""
    count = (len(stream) - 1) // LENGTH
    return tuple(stream[start : start + count * LENGTH].view(count, LENGTH) for start in (0, 1))  # pyright: ignore[reportReturnType]


def _batches(blocks: tuple[Tensor, Tensor], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(blocks[0]), (BATCH,), generator=generator)
        yield blocks[0][chosen], blocks[1][chosen]


@torch.no_grad()
def _perplexity(model: GNNMoEModel, blocks: tuple[Tensor, Tensor]) -> float:
    model.eval()
    some = zip(*(part[:EVALUATED].split(BATCH) for part in blocks), strict=True)
    losses = [model(inputs, targets=targets, return_logits=False)["loss"].item() for inputs, targets in some]
    model.train()
    return math.exp(sum(losses) / len(losses))


def _let_leak(model: GNNMoEModel, leaks: bool) -> None:
    for layer in model.layers:
        cast(BatchedCoupler, layer.coupler).leaks = leaks


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
