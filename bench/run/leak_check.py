"""The leak check of a run; in a sweep a run can reuse the check of another seed of its configuration."""

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

SEEDS_LOOKED_AT = 100  # seeds 0 to 99; runs with other seeds are always checked
OF_COMMITS = ("git_commit", "git_changes_sha256")  # the code hashes already say which code ran


def gate_of(prepared: Prepared, environment: Environment | NotMeasured) -> GateReport:
    """Return the leak check of a run's configuration, before training.

    With ``reuse_check``, a passing check is reused from a run of the same study. Its identity may differ only
    in the seed, and its ``environment`` (device, threads, versions, code hashes) must be equal. That run must
    have made the check itself; the record names it. A coupler from outside the package is always checked,
    because the hash need not cover all its files. Two runs that start at the same time both check.
    """
    config = prepared.config
    own = config.memory.fit_shape or not prepared.ranks.alone
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
    """Say whether all classes of a coupler are in this package, whose files the code hashes cover."""
    names = [base.__module__.partition(".")[0] for base in coupler_class(coupler).__mro__]
    return set(names) <= {gnnmoe.__name__, "torch", "builtins", "abc", "typing"}


def _other_seeds(prepared: Prepared) -> Iterator[Record]:
    """Yield the records of the other seeds of this configuration in the study."""
    places, identity = prepared.config.places, prepared.identity
    for seed in range(SEEDS_LOOKED_AT):
        name = run_id({**identity, "training": {**identity["training"], "seed": seed}})
        record = None if name == prepared.run_id else RunFolder(
            places.results_dir, places.study, name).read_record()  # fmt: skip
        if isinstance(record, Record):
            yield record


def _same(there: Environment | NotMeasured, here: Environment | NotMeasured) -> bool:
    """Say whether two environments are equal, apart from the commit."""
    both = [one.model_copy(update=dict.fromkeys(OF_COMMITS)) for one in (there, here)]
    return is_measured(there) and both[0] == both[1]


def _passed(record: Record) -> GateReport | None:
    """Return the checks of a record as reused checks; None if one is missing, failed or itself reused."""
    found = record.check.checks if is_measured(record.check) else {}
    if not all(name in found and found[name].passed and found[name].reused_from is None for name in CHECKS):
        return None
    return GateReport([Check(name, True, found[name].detail, 0.0, record.run_id) for name in CHECKS])
