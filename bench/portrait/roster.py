"""Every coupler there is, each hypergraph layer and each strategy, at one set of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.gate import refuse_wrong_names
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.hgnn import CONV_TYPES
from gnnmoe.couplers.registry import coupler_class, coupler_names
from gnnmoe.hypergraph.strategies import STRATEGIES

HYPERGRAPH_COUPLER = "HGNN"


@dataclass(frozen=True)
class Entry:
    """One coupler under a name that tells it from the others."""

    name: str
    config: GNNMoEConfig


def list_couplers(config: GNNMoEConfig) -> tuple[list[Entry], dict[str, str]]:
    """Return what can be built at the sizes of ``config``, and why the rest is left out, by name.

    The coupler that ``config`` names comes last, with its options, if it is not among them without.

    Raises:
        Refused: there is no such coupler, or its options are wrong.
    """
    plain = replace(
        config,
        coupler_options={},
        hgnn_conv_type=GNNMoEConfig.hgnn_conv_type,
        static_hyperedge_strategy=GNNMoEConfig.static_hyperedge_strategy,
    )
    entries, left_out = [], {}
    for entry in _registered(plain):
        try:
            refuse_wrong_names(entry.config)
        except Refused as error:
            left_out[entry.name] = str(error)
        else:
            entries.append(entry)
    named = replace(plain, coupler_type=config.coupler_type, coupler_options=config.coupler_options)
    refuse_wrong_names(named)
    if config.coupler_options or config.coupler_type not in coupler_names():
        options = [f"{name}={value}" for name, value in config.coupler_options.items()]
        entries.append(Entry(" ".join([coupler_class(config.coupler_type).name, *options]), named))
    return entries, left_out


def _registered(plain: GNNMoEConfig) -> Iterator[Entry]:
    for name in coupler_names():
        if name != HYPERGRAPH_COUPLER:
            yield Entry(name, replace(plain, coupler_type=name))
    hypergraph = replace(plain, coupler_type=HYPERGRAPH_COUPLER)
    for conv_type in CONV_TYPES:
        yield Entry(f"{HYPERGRAPH_COUPLER} {conv_type}", replace(hypergraph, hgnn_conv_type=conv_type))
    for strategy in STRATEGIES:
        if strategy != plain.static_hyperedge_strategy:
            changed = replace(hypergraph, static_hyperedge_strategy=strategy)
            yield Entry(f"{HYPERGRAPH_COUPLER} {strategy}", changed)
