"""Whether a checkpoint holds all that a run goes on with, refused as a whole before anything is written.

A state is held against a model, an optimizer and a plan that are made for this and thrown away.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any, get_type_hints

import torch
from torch import Tensor

from bench.data.blocks import EvalWindows
from bench.learning import probed
from bench.measure.ledger import COUNTED, EpochAccount
from bench.prepare import Prepared
from bench.training.checkpoint import refuse_unlike
from bench.training.communication import CommunicationTrace
from bench.training.loop import Trained
from bench.training.plan import TrainingPlan
from bench.training.step import make_optimizer
from bench.tune.control import Decision, Recovery, shapes_of
from bench.tune.shape import Shape
from gnnmoe.config import Refused
from gnnmoe.model import GNNMoEModel

NUMBER, MAYBE_INT = int | float, int | None
PARTS = [{"command": str, "start": str, "end": str | None, "seconds": {str: NUMBER},
          "resumed_at_step": MAYBE_INT}]  # fmt: skip
COUNTS = dict.fromkeys((*COUNTED, "updates"), int)
STATE = {
    "tuned": dict | None, "log": str, "history": str, "parts": PARTS,
    "trainer": {
        "model": dict, "best_model": dict, "optimizer": {"state": dict, "param_groups": [dict]},
        "done": get_type_hints(Trained),
        "recovering": {"micro_batch_size": MAYBE_INT, "recoveries": [get_type_hints(Recovery)]},
        "control": dict | None, "random": [Tensor], "random_cuda": [Tensor | None],
    },
    "trace": {"steps": [int], "samples": {str: [Tensor]}},
    "ledger": {
        "tuned_micro_batch_size": MAYBE_INT,
        "epochs": [get_type_hints(EpochAccount) | {"asked": COUNTS, "got": COUNTS}],
        "evaluations": {str: {"evaluations": int, "asked": int, "got": int}},
        "batch_shapes": {str: int}, "micro_batch_shapes": {str: int}, "last_shapes": [[int]],
    },
}  # fmt: skip
CONTROL = {"rows": int, "length": int, "ceiling": int, "room": int, "pending": MAYBE_INT,
           "decisions": [get_type_hints(Decision)]}  # fmt: skip
FOUND = {"status": str, "micro_batch_size": int, "length": int, "batch_size": int, "from_cache": bool,
         "trials": list, "cap": int, "limit_bytes": int, "target": NUMBER}  # fmt: skip
NOT_FOUND = {"status": str, "micro_batch_size": type(None), "length": int, "error": str, "trials": list}


def refuse_unfit(state: dict[str, Any], prepared: Prepared) -> None:
    """Refuse the state of a checkpoint, of this run by its identity, that the run cannot go on with.

    Raises:
        Refused: names the first thing that is missing or does not fit.
    """
    refuse_unlike({name: state[name] for name in STATE if name in state}, STATE)
    if not state["parts"]:
        raise Refused("it names no part of the run")
    prepared = _as_found(state["tuned"], prepared)
    plan = TrainingPlan(prepared.loaders["train"], prepared.config.training)
    done = Trained(**state["trainer"]["done"])
    if not (1 <= done.steps <= plan.total_steps and 0 <= done.best_step <= done.steps):
        raise Refused(
            f"trainer.done is {done.steps} steps, the best {done.best_step}; the run has {plan.total_steps}"
        )
    seed = prepared.config.training.seed
    model = prepared.execution.build(prepared.model_config, seed)  # on the device, where couplers can run
    model.set_output_bias(torch.from_numpy(prepared.corpus.vocabulary.log_unigram()))
    _refuse_weights(state["trainer"], done, model)
    _refuse_optimizer(state["trainer"], model, prepared)
    _refuse_pieces(state["trainer"], math.gcd(*plan.batch_sizes()), state["tuned"], prepared)
    _refuse_random(state["trainer"], prepared)
    _refuse_trace(state["trace"], done.steps, model, prepared)
    if state["ledger"]["tuned_micro_batch_size"] != (state["tuned"] or {}).get("micro_batch_size"):
        raise Refused("ledger.tuned_micro_batch_size is not that of tuned")
    _refuse_ledger(state["ledger"], done.steps, plan)
    _refuse_counts(state["ledger"], done.steps, len(state["trace"]["steps"]) - 1, prepared)
    _refuse_history(state["history"], done.steps, state["trace"]["steps"])


def _as_found(tuned: dict[str, Any] | None, prepared: Prepared) -> Prepared:
    """Return the run with the length that its search found.

    Raises:
        Refused: there is no answer of a search that the run asks for, or one that it does not.
    """
    memory = prepared.config.memory
    if (tuned is not None) != (memory.fit_shape or memory.tune_batch_size):
        raise Refused("tuned is the answer of a search" if tuned else "it lacks the answer of the search")
    if tuned is None:
        return prepared
    form = NOT_FOUND if tuned.get("status") == "failed" else FOUND
    refuse_unlike({name: tuned[name] for name in form if name in tuned}, form, "tuned")
    length = tuned["length"]
    if length == prepared.model_config.max_seq_length:
        return prepared
    if not memory.fit_shape or length < 1:
        raise Refused(f"tuned.length is {length}, which the run cannot have")
    return prepared.at_length(length)


def _refuse_weights(trainer: dict[str, Any], done: Trained, model: GNNMoEModel) -> None:
    form = {name: value if isinstance(value, Tensor) else type(value)
            for name, value in model.state_dict().items()}  # fmt: skip
    refuse_unlike(trainer["model"], form, "trainer.model")
    refuse_unlike(trainer["best_model"], form if done.best_step else {}, "trainer.best_model")


def _refuse_optimizer(trainer: dict[str, Any], model: GNNMoEModel, prepared: Prepared) -> None:
    """Refuse moments that are missing or of other shapes, and groups of other parameters or settings.

    A parameter has no moments where it never had a gradient, and then it is as ``model`` begins with it.
    The learning rate is free, since each step sets it.
    """
    here, there = make_optimizer(model, prepared.config.training), trainer["optimizer"]
    parameters = [parameter for group in here.param_groups for parameter in group["params"]]
    step = torch.zeros(())
    form = {number: {"step": step, "exp_avg": like, "exp_avg_sq": like}
            for number, like in enumerate(parameters)}  # fmt: skip
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, like in enumerate(parameters):
        if number not in there["state"] and torch.equal(like.cpu(), trainer["model"][name_of[id(like)]]):
            del form[number]
    refuse_unlike(there["state"], form, "trainer.optimizer.state")
    groups = here.state_dict()["param_groups"]
    if len(there["param_groups"]) != len(groups):
        raise Refused(f"trainer.optimizer has {len(there['param_groups'])} groups, not {len(groups)}")
    for number, (group, own) in enumerate(zip(there["param_groups"], groups, strict=True)):
        name = f"trainer.optimizer.param_groups.{number}"
        refuse_unlike(group, {key: type(value) for key, value in own.items()}, name)
        for key in own:
            if key != "lr" and group[key] != own[key]:
                raise Refused(f"{name}.{key} is {group[key]}; it must be {own[key]}")


def _refuse_pieces(
    trainer: dict[str, Any], unit: int, tuned: dict[str, Any] | None, prepared: Prepared
) -> None:
    """Refuse micro-batches that the batches cannot be cut into, and shapes that the control does not have."""
    rows = trainer["recovering"]["micro_batch_size"]
    if rows is not None and (rows < 1 or unit % rows):
        raise Refused(f"trainer.recovering.micro_batch_size is {rows}, and batches are of {unit} rows")
    shapes, control = shapes_of(prepared.config, unit, tuned), trainer["control"]
    if shapes is None:
        refuse_unlike(control, type(None), "trainer.control")
        return
    refuse_unlike(control, CONTROL, "trainer.control")
    if Shape(control["rows"], control["length"]) not in shapes:
        raise Refused(
            f"trainer.control is at {control['rows']} × {control['length']}, which is no shape of the run"
        )
    pending = control["pending"] or 0
    if not (0 <= control["ceiling"] <= len(shapes) and 0 <= pending < len(shapes) and control["room"] >= 0):
        raise Refused(f"trainer.control is beyond the {len(shapes)} shapes of the run")


def _refuse_random(trainer: dict[str, Any], prepared: Prepared) -> None:
    """Refuse random states that are not one of each rank, or that torch does not take."""
    ranks, device = prepared.ranks.world_size, prepared.device
    for name, kind in (("random", "cpu"), ("random_cuda", "cuda")):
        states = trainer[name]
        if len(states) != ranks:
            raise Refused(f"trainer.{name} has {len(states)} states for {ranks} ranks")
        for rank, state in enumerate(states):
            if kind not in ("cpu", device.type):
                refuse_unlike(state, type(None), f"trainer.{name}.{rank}")
                continue
            try:
                torch.Generator(device if kind == "cuda" else "cpu").set_state(state)
            except (RuntimeError, TypeError) as error:
                raise Refused(f"trainer.{name}.{rank} is no random state of torch") from error


def _refuse_trace(there: dict[str, Any], steps: int, model: GNNMoEModel, prepared: Prepared) -> None:
    """Refuse samples of other couplers, and those that are not one for each step that was sampled."""
    trace = CommunicationTrace(probed(prepared))
    trace.sample(0, model)
    samples = trace.state_dict()["samples"]
    refuse_unlike(there["samples"], {name: [values[0]] for name, values in samples.items()}, "trace.samples")
    at = there["steps"]
    if at[:1] != [0] or at[-1] > steps or any(before >= after for before, after in pairwise(at)):
        raise Refused(f"trace.steps do not rise from 0 to at most {steps}")
    for name, values in there["samples"].items():
        if len(values) != len(at):
            raise Refused(f"trace.samples.{name} has {len(values)} samples of {len(at)} steps")


def _refuse_ledger(ledger: dict[str, Any], steps: int, plan: TrainingPlan) -> None:
    """Refuse counts that are not those of the plan after so many steps."""
    epochs, last = ledger["epochs"], plan.place(steps - 1)[0]
    if len(epochs) != last + 1:
        raise Refused(f"ledger.epochs are {len(epochs)}; step {steps} is in epoch {last}, from 0")
    left = steps
    for number, there in enumerate(epochs):
        planned = EpochAccount.of(plan.epoch(number))
        here = min(left, planned.asked["updates"])
        whole = here == planned.asked["updates"]
        got, left = there["got"], left - here
        counted = got == planned.asked if whole else got["batches"] == got["updates"] == here
        if EpochAccount(**{**there, "got": planned.got}) != planned or not counted:
            raise Refused(f"ledger.epochs.{number} is not as the run's plan has it after {steps} steps")


def _refuse_counts(ledger: dict[str, Any], steps: int, evaluations: int, prepared: Prepared) -> None:
    """Refuse counts of shapes and of evaluations that do not add up."""
    batches, pieces = ledger["batch_shapes"], ledger["micro_batch_shapes"]
    whole = sum(batches.values()) == steps
    whole = whole and _tokens(batches) == _tokens(pieces) * prepared.ranks.world_size
    if not (whole and ledger["last_shapes"]):
        raise Refused(f"ledger.batch_shapes, micro_batch_shapes or last_shapes are not of {steps} steps")
    windows = prepared.loaders["val"].dataset_obj
    assert isinstance(windows, EvalWindows)
    targets = evaluations * windows.num_scored
    counts = {"evaluations": evaluations, "asked": targets, "got": targets}
    if ledger["evaluations"] != ({"validation in training": counts} if evaluations else {}):
        raise Refused(f"ledger.evaluations are not of {evaluations} evaluations with {targets:,} targets")


def _tokens(counts: dict[str, int]) -> float:
    """Return the tokens of batches that are counted by shape, "4x16"; NaN where a key is no shape."""
    try:
        return sum(math.prod(map(int, shape.split("x"))) * count for shape, count in counts.items())
    except ValueError:
        return math.nan


def _refuse_history(text: str, steps: int, sampled: list[int]) -> None:
    """Refuse a history that has not one row of each step, and one of each evaluation."""
    try:
        rows = [(row["kind"], row["step"]) for row in map(json.loads, text.splitlines())]
    except (ValueError, TypeError, KeyError) as error:
        raise Refused("history is not one row of JSON per line, with kind and step") from error
    if [step for kind, step in rows if kind == "train"] != list(range(1, steps + 1)):
        raise Refused(f"history has not one row for each of {steps} steps")
    if [step for kind, step in rows if kind == "validation"] != sampled[1:]:
        raise Refused("history has not one row for each evaluation in trace.steps")
