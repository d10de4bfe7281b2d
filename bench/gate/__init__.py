"""The leak gate: a coupler's perplexity counts only if every check here passes.

Read in this order: ``report`` (what a check gives), ``subject`` (what is checked, on which
numbers), ``isolation``, ``few_forwards`` and ``dependence`` (no token sees another), ``behaviour`` and
``agreement`` (the other checks of a coupler), ``causality`` (the whole model), ``communication``
(what a coupler says of itself), ``gate``; then ``trained`` and ``audit``, of the trained model.
"""

from bench.gate.audit import Scored, audit_evaluation, audit_training
from bench.gate.gate import CHECKS, refuse_wrong_hypergraph, refuse_wrong_names, run_gate
from bench.gate.report import Check, GateReport
from bench.gate.trained import check_trained_isolation

__all__ = [
    "CHECKS",
    "Check",
    "GateReport",
    "Scored",
    "audit_evaluation",
    "audit_training",
    "check_trained_isolation",
    "refuse_wrong_hypergraph",
    "refuse_wrong_names",
    "run_gate",
]
