"""Every check of one configuration, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gate.agreement import agrees_with_reference
from bench.gate.behaviour import batch_isolation, bf16, gradients, no_memory
from bench.gate.causality import causality
from bench.gate.communication import communication
from bench.gate.isolation import token_isolation
from bench.gate.report import GateReport, run_check
from bench.gate.subject import Subject, global_random_state_kept
from gnnmoe.config import GNNMoEConfig, Refused, unknown_name
from gnnmoe.couplers.hgnn import CONV_TYPES
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.hypergraph.strategies import strategy_identity

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


def run_gate(config: GNNMoEConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> GateReport:
    """Check the coupler that ``config`` names, on small tensors, and return every verdict.

    Each check draws from a generator of its own, seeded by the stream "gate" of ``seed``; torch's
    global random state is left as it was. Whatever the coupler raises is a failed check.
    """
    where = torch.device(device)
    with global_random_state_kept(where):
        return GateReport(
            [run_check(name, lambda check=check: check(Subject(config, seed, where)))
             for name, check in CHECKS.items()]
        )  # fmt: skip


def refuse_wrong_names(config: GNNMoEConfig) -> None:
    """Check the hypergraph's names, and build the coupler once, for the messages about its name and options.

    Whatever else goes wrong in its constructor is its own fault, which the leak check reports.

    Raises:
        Refused: there is no such coupler, strategy or option.
    """
    refuse_wrong_hypergraph(config)
    try:
        with torch.random.fork_rng(devices=[]):
            build_coupler(config)
    except ValueError as error:  # also a stranger's, who refuses an option
        raise Refused(str(error)) from error
    except Exception:
        return


def refuse_wrong_hypergraph(config: GNNMoEConfig) -> None:
    """Check the names that only a hypergraph coupler looks up, so that no other swallows a misspelt one.

    Raises:
        Refused: there is no such conv type or strategy, or the strategy cannot have these arguments.
    """
    if config.hgnn_conv_type not in CONV_TYPES:
        raise Refused(unknown_name("hgnn_conv_type", config.hgnn_conv_type, CONV_TYPES))
    strategy_identity(config.static_hyperedge_strategy)
