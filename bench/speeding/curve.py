"""What both suites share: the couplers that are timed alone, and their cost by E and by N."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bench.speeding.coupler_rows import Timing, coupler_rows
from bench.speeding.forms import forms_of
from bench.speeding.jobs import Job
from bench.speeding.machine import Machine
from bench.speeding.rows import SpeedRow
from bench.speeding.targets import CURVE
from gnnmoe.config import GNNMoEConfig

VOCABULARY = 33_278  # WikiText-2's


def curve_jobs(
    experts: tuple[int, ...], batch: int, batches: tuple[int, ...], length: int, width: int,
    precision: str, rounds: int,
) -> list[Job]:  # fmt: skip
    """Return the jobs of the plot: the couplers of S7 by number of experts, and by number of tokens."""
    plain = GNNMoEConfig(max_seq_length=length, embed_dim=width, vocab_size=1)
    sizes = [(replace(plain, num_experts=number), batch) for number in experts]
    sizes += [(plain, number) for number in batches if (plain, number) not in sizes]
    timing = Timing(rounds=rounds, memory=False, forward=False, check=False)

    def rows(config: GNNMoEConfig, number: int, machine: Machine) -> list[SpeedRow]:
        forms = [form for name, one in alone(config).items() for form in forms_of(name, one)[:1]]
        return coupler_rows(CURVE, forms, number, machine, precision, timing)

    return [Job(f"curve: E {config.num_experts}, N {number * length:,}", partial(rows, config, number), 3)
            for config, number in sizes]  # fmt: skip


def alone(config: GNNMoEConfig) -> dict[str, GNNMoEConfig]:
    """Return the couplers that are timed alone, by name."""
    couplers = {name: replace(config, coupler_type=name) for name in ("static", "gate", "HGNN", "GNN")}
    return couplers | {"HNHN": replace(config, coupler_type="HGNN", hgnn_conv_type="HNHN")}
