"""Made studies: folders of runs as a sweep would write them, in a second for hundreds of runs.

``made_study(tmp_path / "study", {"mean": 0.0, "HGNN all_triplets": -0.05}, seeds=8)`` writes two
configurations of eight runs each, whose expected losses differ by 0.05 nats; ``load_study`` reads it.
Everything follows from the arguments: the same call writes the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from bench.config import RunConfig
from bench.run.prepare import config_dict
from tests._records import made_data, made_memory, made_speed, made_used, record_json
from tests.report._made_traces import (
    BATCH,
    LENGTH,
    TEST_IS_HARDER,
    Made,
    Plan,
    communication,
    history_text,
    random_of,
    write_arrays,
)

COUPLERS = {"mean": 0.0, "gate": -0.002, "topk": 0.002, "GNN": 0.02, "HGNN all_pairs": -0.05,
            "HGNN all_triplets": -0.01}  # fmt: skip
COSTS = {"mean": 0.0, "gate": 0.02, "topk": 0.03, "GNN": 0.4, "HGNN": 0.15}
"""Share of the step of the mean coupler's model that a coupler adds; 0.1 for any other."""
UNIGRAM, TRIGRAM = 6.8436, 5.4021  # nats per token
LATER = ("quality", "speed", "memory", "communication")


def made_study(
    folder: Path, couplers: Mapping[str, float] = COUPLERS, *,
    seeds: int | Sequence[int] = 8, noise: float = 0.01, seed_noise: float = 0.02, loss: float = 6.35,
    experts: Sequence[int] = (4,), per_expert: float = -0.002,
    failed: Mapping[Any, str] | None = None, names: Mapping[str, str] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None, costs: Mapping[str, float] = COSTS,
    history: int = 12, eval_every: int = 4, tokens: int = 600, articles: int = 12,
    embedded: bool = False, arrays: bool = True, test: bool = False,
    unmeasured: Iterable[str] = (), run_name: str | None = None,
) -> Path:  # fmt: skip
    """Write a study of every coupler × number of experts × seed into ``folder`` and return it.

    Args:
        folder: is made; its name is the study's.
        couplers: configuration → expected loss in nats less ``loss``. The first word is the coupler, a
            second one the hyperedge strategy ("HGNN all_triplets"); what else differs is in ``settings``.
        seeds: a number, or the seeds themselves.
        noise: standard deviation in nats of one run about its configuration and its seed; it is what a
            paired difference sees, times √2. ``seed_noise`` is common to all runs of a seed.
        experts: values of ``num_experts``; each expert changes the loss by ``per_expert`` nats.
        failed: key of ``couplers``, or (key, seed), or (key, experts, seed) → status other than ok. A run
            that ran out of memory or crashed has no quality; one that diverged has half a history, which
            ends in NaN; one that failed the leak check has no training at all.
        names: key of ``couplers`` → the name of the coupler in the config (a path, something hostile).
        settings: key of ``couplers`` → fields of the config that differ ({"learning_rate": 0.004}).
        costs: key, or coupler → share of the mean coupler's step that it adds.
        history: training steps, each a row of the history; 0 leaves the file empty. ``eval_every`` as in
            the config.
        tokens: scored on validation, in ``articles`` articles.
        embedded: the text is the embedded one.
        arrays: write nll.npz and communication.npz.
        test: score the test split too.
        unmeasured: keys of the record ("speed", "memory", …) that no run has.
        run_name: of every run.
    """
    plan = Plan(seeds=range(seeds) if isinstance(seeds, int) else seeds, noise=noise, seed_noise=seed_noise,
                loss=loss, history=history, eval_every=eval_every, tokens=tokens, articles=articles,
                embedded=embedded, arrays=arrays, test=test, unmeasured=tuple(unmeasured), run_name=run_name,
                costs=costs)  # fmt: skip
    base, base_text = _base_record(plan), json.dumps(config_dict(RunConfig()))
    folder.mkdir(parents=True)
    wanted = itertools.product(plan.seeds, couplers.items(), experts)  # seeds outermost, as a sweep does
    for place, (seed, (key, effect), number) in enumerate(wanted):
        config = json.loads(base_text)
        _configure(config, key, number, seed, plan, (names or {}).get(key), (settings or {}).get(key))
        status = _status(failed or {}, key, number, seed)
        own = random_of("loss", key, number, seed).normal(0, noise)
        common = random_of("seed", "", 0, seed).normal(0, seed_noise)
        expected = loss + effect + per_expert * number + own + common
        _write(folder, Made(config, key, number, seed, status, expected), place, base, plan)
    return folder


def _configure(config: dict[str, Any], key: str, experts: int, seed: int, plan: Plan, name: str | None,
               settings: Mapping[str, Any] | None) -> None:  # fmt: skip
    coupler, _, strategy = key.partition(" ")
    config["model"] |= {"coupler_type": name or coupler, "num_experts": experts, "max_seq_length": LENGTH}
    if strategy:
        config["model"]["static_hyperedge_strategy"] = strategy
    config["training"] |= {"seed": seed, "max_steps": plan.history or 12, "eval_every": plan.eval_every}
    config["places"]["run_name"] = plan.run_name
    for field, value in (settings or {}).items():
        group = next((fields for fields in config.values() if field in fields), None)
        if group is None:
            raise KeyError(f"no field of the config: {field}")
        group[field] = value


def _status(failed: Mapping[Any, str], key: str, experts: int, seed: int) -> str:
    for asked in ((key, experts, seed), (key, seed), key):
        if asked in failed:
            return failed[asked]
    return "ok"


def _write(folder: Path, made: Made, number: int, base: dict[str, Any], plan: Plan) -> None:
    identity = json.dumps([made.config["model"], made.config["training"], plan.embedded], sort_keys=True)
    run_id = hashlib.sha256(identity.encode()).hexdigest()[:12]
    seedless = json.dumps([made.config["model"], {**made.config["training"], "seed": None}, plan.embedded],
                          sort_keys=True)  # fmt: skip
    path = folder / run_id
    path.mkdir()
    record = base | {
        "run_id": run_id, "configuration": hashlib.sha256(seedless.encode()).hexdigest()[:12],
        "study": folder.name, "status": made.status, "config": made.config,
        "seed": made.seed, "parameters": _parameters(made), "flops": _flops(made),
        "command": f"python -m bench.run --coupler-type={made.coupler!r} --seed={made.seed}",
        "quality": _quality(made, plan), "speed": _speed(made, plan), "memory": _memory(made, plan),
        "communication": communication(made), "time": base["time"] | {"start": _start(number)},
        "environment": base["environment"] | {"coupler_sha256": _sha256(made.coupler)},
    }  # fmt: skip
    if made.status != "ok":
        record["error"] = f"made to end as {made.status}"
        missing = {"parameters", "flops", "used", *LATER} if made.status == "check_failed" else LATER
        record |= {key: null("the run did not get this far") for key in missing}
        record["check"] = record["check"] | {"passed": made.status != "check_failed"}
    record |= {key: null("not measured here") for key in plan.unmeasured}
    (path / "record.json").write_text(json.dumps(record))
    (path / "history.jsonl").write_text(history_text(made, plan))
    (path / "log.txt").write_text(f"status {made.status}\n")
    if plan.arrays and made.status == "ok":
        write_arrays(path, made, plan)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _start(number: int) -> str:
    return (datetime(2025, 1, 1, 12) + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _base_record(plan: Plan) -> dict[str, Any]:
    """Return what all runs of a study have in common."""
    steps = plan.history or 12
    evaluations = steps // plan.eval_every + (steps % plan.eval_every > 0)
    scored = evaluations * plan.tokens
    seconds = {"prepare": 0.1, "check": 1.3, "build": 0.2, "train": 50.0, "evaluate": 9.6, "speed": 4.7,
               "total": 65.9}  # fmt: skip
    when = {"start": "2025-01-01T12:00:00Z", "end": "2025-01-01T12:01:06Z", "resumed_at_step": None,
            "seconds": seconds}  # fmt: skip
    return record_json(
        run_name=plan.run_name, data=made_data(plan.embedded),
        time=when | {"parts": [when | {"command": ""}]},
        requested={"batch_size": BATCH, "max_seq_length": LENGTH},
        tuned=null("no batch-size search was asked for"),
        used=made_used(steps, BATCH, LENGTH, {
            "validation in training": {"evaluations": evaluations, "asked": scored, "got": scored},
            "validation at the end": {"evaluations": 1, "asked": plan.tokens, "got": plan.tokens},
        }),
        check={"passed": True, "checks": {name: {"passed": True, "detail": "as it must be", "seconds": 0.1}
                                          for name in ("token_isolation", "causality", "reference")}},
    )  # fmt: skip


def null(reason: str) -> dict[str, Any]:
    return {"value": None, "reason": reason}


def _cost(made: Made, plan: Plan) -> float:
    first = made.key.partition(" ")[0]
    return plan.costs.get(made.key, plan.costs.get(first, 0.1))


def _parameters(made: Made) -> dict[str, int]:
    parts = {"expert": 99_968 * made.experts, "coupler": 8_576, "other": 2_167_422}
    parts["coupler"] += {"mean": 0, "GNN": 33_604, "HGNN": 16_652}.get(made.coupler, 512)
    return {"total": sum(parts.values()), **parts}


def _flops(made: Made) -> dict[str, float]:
    coupler = {"mean": 0.0, "GNN": 823_296.0, "HGNN": 417_816.0}.get(made.coupler, 6_144.0)
    return {"training_flops_per_token": 13_181_184.0 + 599_808.0 * made.experts + coupler}


def _quality(made: Made, plan: Plan) -> dict[str, Any]:
    def split(loss: float) -> dict[str, Any]:
        return {"nll_sum": loss * plan.tokens, "tokens": plan.tokens, "words": plan.tokens,
                "unknown_words": 0, "bytes": 5 * plan.tokens, "unigram_nll_sum": UNIGRAM * plan.tokens,
                "kneser_ney_trigram_nll_sum": TRIGRAM * plan.tokens, "length": LENGTH,
                "stride": LENGTH // 2}  # fmt: skip

    missing = null("not asked for; --evaluate-test scores it")
    test = split(made.loss + TEST_IS_HARDER) if plan.test else missing
    return {"test": test, "validation": split(made.loss), "best_step": plan.history or 12}


def _speed(made: Made, plan: Plan) -> dict[str, Any]:
    step = 0.05 * (1 + made.experts) * (1 + _cost(made, plan))
    seconds = step * np.exp(made.random("speed").normal(0, 0.03, 10))
    return made_speed(seconds.tolist(), BATCH * LENGTH)


def _memory(made: Made, plan: Plan) -> dict[str, Any]:
    peak = round((70e6 + 9.5e6 * made.experts) * (1 + _cost(made, plan) / 4))
    return made_memory(peak, 7 * peak)
