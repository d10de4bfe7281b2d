"""The leak check: every check of one configuration, and the configurations that can be checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from bench.check.behaviour import (
    agrees_with_reference,
    batch_isolation,
    bf16,
    causality,
    gradients,
    no_memory,
)
from bench.check.communication import communication
from bench.check.isolation import token_isolation
from bench.check.subject import CheckReport, Subject, global_random_state_kept, run_check
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.registry import build_coupler, coupler_class, coupler_names, without_memory
from gnnmoe.hypergraph.strategies import STRATEGIES, strategy_identity
from gnnmoe.layers.base import LAYERS

CHECKS: dict[str, Callable[[Subject], str]] = {
    "token_isolation": token_isolation,
    "batch_isolation": batch_isolation,
    "no_memory": no_memory,
    "causality": causality,
    "reference": agrees_with_reference,
    "gradients": gradients,
    "communication": communication,
    "bf16": bf16,
}
HYPERGRAPH_COUPLER = "HGNN"


def run_leak_check(config: GNNMoEConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> CheckReport:
    """Check the coupler that ``config`` names, on small tensors, and return all verdicts.

    Each check draws from its own generator, which the ``seed`` fixes. torch's global random state stays as
    it was. Any exception of the coupler is a failed check.
    """
    where = torch.device(device)
    with global_random_state_kept(where):
        return CheckReport(
            [
                run_check(name, lambda check=check: check(Subject(config, seed, where)))
                for name, check in CHECKS.items()
            ]
        )


def refuse_wrong_names(config: GNNMoEConfig) -> None:
    """Refuse a configuration that names a coupler, strategy or option that does not exist.

    The function builds the coupler once, without memory, for the messages about its name and options. Any
    other exception of the coupler's constructor is the coupler's fault, and the leak check reports it.

    Raises:
        Refused: there is no such coupler, strategy or option.
    """
    refuse_wrong_hypergraph(config)
    try:
        with without_memory(config):
            build_coupler(config)
    except ValueError as error:  # also of a coupler from elsewhere that refuses an option
        raise Refused(str(error)) from error
    except Exception:
        return


def refuse_wrong_hypergraph(config: GNNMoEConfig) -> None:
    """Refuse wrong hypergraph names, also if the coupler does not use them: such a name is misspelt.

    Raises:
        Refused: there is no such conv type or strategy, or the strategy does not accept these arguments.
    """
    LAYERS.find(config.hgnn_conv_type)
    strategy_identity(config.static_hyperedge_strategy)


@dataclass(frozen=True)
class Entry:
    """One coupler of ``--all``, under a name that no other entry has."""

    name: str
    config: GNNMoEConfig


def list_couplers(config: GNNMoEConfig) -> tuple[list[Entry], dict[str, str]]:
    """Return the couplers that can be built at the sizes of ``config``, and why the others cannot, by name.

    The list has HGNN with each layer and each strategy. The coupler of ``config`` comes last if it
    has options or comes from outside the package; otherwise it is already in the list.

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
    for conv_type in LAYERS:
        yield Entry(f"{HYPERGRAPH_COUPLER} {conv_type}", replace(hypergraph, hgnn_conv_type=conv_type))
    for strategy in STRATEGIES:
        if strategy != plain.static_hyperedge_strategy:
            changed = replace(hypergraph, static_hyperedge_strategy=strategy)
            yield Entry(f"{HYPERGRAPH_COUPLER} {strategy}", changed)
