"""A run's leak check: done here and now or, in a sweep, taken from another seed of the same configuration."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gnnmoe
from bench.gate import Check, GateReport, run_gate
from bench.gate.gate import CHECKS
from bench.record import Environment, NotMeasured, Record, RunFolder, is_measured
from bench.run.identity import run_id
from bench.run.prepare import Prepared
from gnnmoe.couplers import coupler_class

SEEDS_LOOKED_AT = 100  # from 0 on; a sweep's other seeds are checked for themselves
OF_COMMITS = ("git_commit", "git_changes_sha256")  # the hashes of the code say what they say of a run


def gate_of(prepared: Prepared, environment: Environment | NotMeasured) -> GateReport:
    """Return the leak check's verdict on a run's configuration, before there are trained weights.

    With ``reuse_check`` it is that of a run in the same study whose identity differs in its seed only
    (hyperedges, data and schema count), in an equal ``environment``: device, threads, versions, and the hash
    of the code. A coupler from elsewhere is always checked: no hash holds all the files that it is made of.
    Nothing is waited for, so two runs that start at once both check. Only a verdict that passed is taken, of
    a run that checked for itself, and each of its checks says whose it is.
    """
    config = prepared.config
    own = config.memory.fit_shape or not prepared.ranks.alone  # its length, or what all ranks do
    own = own or not is_ours(config.model.coupler_type)
    if config.places.reuse_check and not own:
        for record in _other_seeds(prepared):
            if _same(record.environment, environment):
                report = _passed(record)
                if report is not None:
                    prepared.folder.log(f"its checks are those of run {report.checks[0].reused_from}")
                    return report
    device = torch.device("cpu") if prepared.device.type == "mps" else prepared.device  # mps has no float64
    return run_gate(prepared.model_config, seed=config.training.seed, device=device)


def is_ours(coupler: str) -> bool:
    """Whether all that a coupler is made of is in this package, whose files the hashes of the code cover."""
    names = [base.__module__.partition(".")[0] for base in coupler_class(coupler).__mro__]
    return set(names) <= {gnnmoe.__name__, "torch", "builtins", "abc", "typing"}


def _other_seeds(prepared: Prepared) -> Iterator[Record]:
    """Yield the records of the study that are of this configuration: the run's id is the hash of it."""
    places, identity = prepared.config.places, prepared.identity
    for seed in range(SEEDS_LOOKED_AT):
        name = run_id({**identity, "training": {**identity["training"], "seed": seed}})
        record = None if name == prepared.run_id else RunFolder(
            places.results_dir, places.study, name).read_record()  # fmt: skip
        if isinstance(record, Record):
            yield record


def _same(there: Environment | NotMeasured, here: Environment | NotMeasured) -> bool:
    """Whether two environments are one, but for commits that changed nothing in the code."""
    both = [one.model_copy(update=dict.fromkeys(OF_COMMITS)) for one in (there, here)]
    return is_measured(there) and both[0] == both[1]


def _passed(record: Record) -> GateReport | None:
    """Return the verdicts of a record as reused ones, None where one is missing, failed, or reused itself."""
    found = record.check.checks if is_measured(record.check) else {}
    if not all(name in found and found[name].passed and found[name].reused_from is None for name in CHECKS):
        return None
    return GateReport([Check(name, True, found[name].detail, 0.0, record.run_id) for name in CHECKS])
