"""From the flags of a run to what fits: the budget, the refusals, the request, the record and the cache."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from math import gcd
from typing import IO, Any, NamedTuple

import torch
from torch import nn

from bench.check.leak_check import refuse_wrong_names
from bench.config import DataConfig, MemoryConfig, RunConfig, TrainingConfig
from bench.data.cache import cache_folder, kept, key_of, replace_file
from bench.data.corpus import Corpus
from bench.data.loader import BlockLoader
from bench.device import UNITS, device_memory_bytes, format_bytes, refuse_too_large
from bench.record import Requested
from bench.training.environment import code_hashes, device_name
from bench.training.loaders import (
    load_text,
    make_loaders,
    model_for,
    refuse_curriculum_without_epochs,
    validate_first_batches,
)
from bench.training.loop import TrainingPlan
from bench.training.ranks import ALONE, Ranks
from bench.tune.search import Found, SearchFailed, Shape, Trial, divisors
from bench.tune.trials import (
    OnTrial,
    Request,
    TrialSetup,
    search_here,
    search_in_child,
)
from gnnmoe.config import GNNMoEConfig, Refused, brief, unknown_name
from gnnmoe.cost import expert_object_bytes, least_training_bytes
from gnnmoe.couplers.registry import without_memory
from gnnmoe.model import GNNMoEModel

Say = Callable[[str], object]
SWITCHES = TUNE, FIT, CONTROL = "tune_batch_size", "fit_shape", "control_memory"

# --- The budget

WHOLE_DEVICE = "device"
ALLOWED = (
    "write an amount with its unit (16GiB, 512MiB, 2.5GB), 'device' for all the memory of the device, "
    "or a share of it in (0, 1], such as 0.5."
)
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class MemoryBudget:
    """An amount of memory in bytes, or (where that is None) a share of the device's memory."""

    text: str
    """As the user wrote it."""
    explicit_bytes: int | None = None
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> MemoryBudget:
        """Read ``16GiB``, ``512MiB``, ``2.5GB``, ``device`` or a share of the device such as ``0.5``.

        The case of units does not matter; kB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024.

        Raises:
            Refused: another text, an unknown unit, less than a byte, or a share outside (0, 1].
        """
        found = _AMOUNT.fullmatch(text.strip())
        if text.strip().lower() == WHOLE_DEVICE:
            return cls(text)
        if found is None:
            raise Refused(f"memory budget {brief(text)} is no amount of memory; {ALLOWED}")
        number, unit = Decimal(found[1]), found[2]
        if not unit:
            if not 0 < number <= 1:
                raise Refused(f"memory budget {brief(text)} has no unit and is no share in (0, 1]; {ALLOWED}")
            return cls(text, share=float(number))
        factor = {name.lower(): factor for name, factor in UNITS.items()}.get(unit.lower())
        if factor is None:
            raise Refused(f"memory budget {brief(text)}: {unknown_name('unit', unit, UNITS)}")
        if number * factor < 1:
            raise Refused(f"memory budget {brief(text)} is less than a byte; {ALLOWED}")
        return cls(text, explicit_bytes=int(number * factor))

    def resolve(self, device: torch.device, sharing: int = 1) -> int:
        """Return the budget of a process in bytes.

        ``sharing`` processes have the device's memory together, in equal parts.

        Raises:
            Refused: the amount is larger than the process's part of the device.
        """
        total = device_memory_bytes(device) // sharing
        if self.explicit_bytes is None:
            return int(total * self.share)
        if self.explicit_bytes > total:
            raise Refused(
                f"memory budget {self.text} is more than the {format_bytes(total)} of device "
                f"{device.type}; lower it, or write 'device' for all of it."
            )
        return self.explicit_bytes


def limit_of(memory: MemoryConfig, device: torch.device, ranks: Ranks) -> tuple[int, int]:
    """Return a process's memory budget, and the share of it that a step may reach, both in bytes.

    The target is the only safety factor, and it enters only here.
    """
    budget = MemoryBudget.parse(memory.memory_budget or WHOLE_DEVICE)
    total = budget.resolve(device, ranks.sharing(device))
    return total, int(total * memory.memory_target)


def training_state_bytes(model: nn.Module) -> int:
    """Return the bytes that a model takes in training before any batch, under AdamW.

    Parameters and buffers count. Each trained parameter adds a gradient and two moments of its own size, and
    a step counter of 4 bytes. The model may be on the device ``meta``.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in [*held, *trained, *trained, *trained]) + 4 * len(trained)


def length_bounds(config: RunConfig) -> tuple[int, int]:
    """Return the shortest and the longest length of a run that may change its length."""
    memory, full = config.memory, config.model.max_seq_length
    shortest = max(1, full // 4) if memory.shape_min_length is None else memory.shape_min_length
    return shortest, full if memory.shape_max_length is None else memory.shape_max_length


def requested(config: RunConfig) -> Requested:
    """Return the sizes that were asked for; the record has the sizes that were found beside them."""
    memory = config.memory
    asked = Requested(
        batch_size=config.training.batch_size,
        max_seq_length=config.model.max_seq_length,
        micro_batch_size=memory.micro_batch_size,
    )
    if any(getattr(memory, switch) for switch in SWITCHES):
        asked.memory_budget, asked.memory_target = memory.memory_budget, memory.memory_target
    return asked


# --- What a user can get wrong about batch, length and memory

USED_BY = {
    "memory_budget": SWITCHES,
    "memory_target": SWITCHES,
    "tune_mode": (TUNE,),
    "tune_init": (TUNE,),
    "tune_max_batch_size": SWITCHES,
    "tune_max_trials": (TUNE, FIT),
    "tune_max_seconds": (TUNE, FIT),
    "tune_fallback": (TUNE, FIT),
    "shape_min_length": (FIT, CONTROL),
    "shape_max_length": (FIT,),
    "shape_length_step": (FIT,),
}


def refuse_wrong_flags(memory: MemoryConfig) -> None:
    """Refuse a wrong budget, a flag that no given switch uses, and sizes above their maximum.

    A flag is given where it differs from its default.

    Raises:
        Refused: naming the flag, and what to add or drop.
    """
    if memory.memory_budget is not None:
        MemoryBudget.parse(memory.memory_budget)  # a wrong value is wrong whatever the switch
    default, unused = MemoryConfig(), []
    for name, switches in USED_BY.items():
        given = getattr(memory, name) != getattr(default, name)
        if given and not any(getattr(memory, switch) for switch in switches):
            *others, last = (f"--{switch.replace('_', '-')}" for switch in switches)
            unused.append(f"{name} is for {', '.join(others)}{' or ' if others else ''}{last}")
    if unused:
        raise Refused(f"{'; '.join(unused)}; add a switch, or drop what would do nothing without it.")
    most = memory.tune_max_batch_size
    for name in ("micro_batch_size", "tune_init"):
        if most is not None and (getattr(memory, name) or 0) > most:
            raise Refused(
                f"{name} is {getattr(memory, name)}, above the tune_max_batch_size of {most}; change one."
            )


class Checked(NamedTuple):
    """A config that a run can have, with shares of the training as steps, and what was made of it."""

    config: RunConfig
    model: GNNMoEConfig
    corpus: Corpus
    loaders: dict[str, BlockLoader]


def checked(
    config: RunConfig,
    device: torch.device | None,
    ranks: Ranks = ALONE,
    text: Callable[[RunConfig], Corpus] = load_text,
) -> Checked:
    """Refuse everything that can be seen to be wrong before the model is built, and load the data.

    ``device`` None: the run is for another machine, whose memory is not known. ``text`` loads the corpus.

    Raises:
        Refused: with what was wrong, what is allowed and what to do.
    """
    refuse_wrong_names(config.model.resolved(1))  # before the data are read
    refuse_curriculum_without_epochs(config.training)
    refuse_wrong_flags(config.memory)
    corpus = text(config)
    model = model_for(config, corpus)
    refuse_wrong_sizes(config, model, device, ranks)
    loaders = make_loaders(config, corpus, device or torch.device("cpu"), ranks)
    validate_first_batches(loaders)
    steps = TrainingPlan(loaders["train"], config.training).total_steps
    return Checked(replace(config, training=config.training.settled(steps)), model, corpus, loaders)


def refuse_wrong_sizes(
    config: RunConfig, model: GNNMoEConfig, device: torch.device | None, ranks: Ranks
) -> None:
    """Refuse what cannot be done about batch, length and memory, before anything is done.

    ``device`` None: its memory is not known.

    Raises:
        Refused: saying what was wrong, and what is possible.
    """
    memory, full = config.memory, config.model.max_seq_length
    sizes, world = config.training.batch_sizes, ranks.world_size
    refuse_uneven_pieces(sizes, 1, world)
    for name in ("micro_batch_size", "tune_init"):
        if getattr(memory, name) is not None:
            refuse_uneven_pieces(sizes, getattr(memory, name), world, name=name)
    if memory.control_memory and config.execution.compile:
        raise Refused(
            "control_memory changes the shape of the steps, and each would be compiled anew: "
            "drop --compile, or --control-memory."
        )
    if memory.fit_shape and (memory.tune_batch_size or memory.micro_batch_size is not None):
        raise Refused("fit_shape finds the micro-batch: drop tune_batch_size and micro_batch_size, or it.")
    if memory.fit_shape and config.training.curriculum is not None:
        raise Refused("a curriculum orders blocks of one length: drop --fit-shape or --curriculum.")
    shortest, longest = length_bounds(config)
    if (memory.fit_shape or memory.control_memory) and not 1 <= shortest <= full <= longest:
        raise Refused(
            f"shape_min_length {shortest}, max_seq_length {full} and shape_max_length {longest} must rise."
        )
    if device is not None:
        refuse_too_little_memory(config, model, device, ranks)


def refuse_too_little_memory(
    config: RunConfig, model: GNNMoEConfig, device: torch.device, ranks: Ranks
) -> None:
    """Refuse a model whose training step on one sequence fits neither the device nor the memory budget.

    A sequence counts with the shortest length that the run may choose.

    Raises:
        Refused: naming both sizes.
    """
    memory = config.memory
    shaped = memory.fit_shape or memory.control_memory
    length = length_bounds(config)[0] if shaped else model.max_seq_length
    number_bytes = 2 if config.execution.precision == "bf16" else 4
    needed = least_training_bytes(replace(model, max_seq_length=length), number_bytes=number_bytes)
    refuse_too_large(needed, device, "a training step of this model", ranks.sharing(device))
    host = torch.device("cpu")
    objects = expert_object_bytes(model)
    refuse_too_large(
        objects, host, "building these experts", ranks.sharing(host), ("num_layers", "num_experts")
    )
    searching = any(getattr(memory, switch) for switch in SWITCHES)
    budget = limit_of(memory, device, ranks)[0] if searching else needed
    if budget < needed:
        raise Refused(
            f"the memory budget of {format_bytes(budget)} is smaller than the {format_bytes(needed)} that a "
            "training step on one sequence needs at least; raise it, or lower embed_dim, num_layers, "
            "num_experts or vocab_size."
        )


def refuse_uneven_pieces(
    batch_sizes: Sequence[int], micro_batch_size: int, world_size: int = 1, name: str = "micro_batch_size"
) -> None:
    """Refuse a micro-batch in which the ranks cannot run each of these global batches evenly.

    Raises:
        Refused: naming the nearest micro-batch that divides the batches.
    """
    named = " and ".join(map(str, dict.fromkeys(batch_sizes)))
    share, rest = divmod(gcd(*batch_sizes), world_size)
    if rest:
        raise Refused(f"a batch of {named} cannot be shared evenly by {world_size} ranks.")
    if micro_batch_size < 1 or share % micro_batch_size:
        nearest = min(divisors(share), key=lambda size: abs(size - micro_batch_size))
        ranks = f" on {world_size} ranks" if world_size > 1 else ""
        raise Refused(
            f"{name} is {micro_batch_size}, which does not divide the batch of {named}{ranks}; "
            f"the nearest that does is {nearest}."
        )


# --- The request

OF_THE_OPTIMIZER = ("learning_rate", "adam_betas", "weight_decay", "max_grad_norm")


def request_for(
    config: RunConfig,
    model: GNNMoEConfig,
    corpus: Corpus,
    device: torch.device,
    ranks: Ranks,
    *,
    epoch_samples: int,
    say: Say,
    any_size: bool = False,
    start: int | None = None,
) -> Request:
    """Return the search that a run asks for: of its length and micro-batch, or of its micro-batch alone.

    Args:
        epoch_samples: The blocks that the smallest epoch serves.
        say: Receives a note for the user.
        any_size: Try every micro-batch that leaves ``min_steps_per_epoch`` updates in the smallest epoch,
            instead of the micro-batches that divide the run's batch.
        start: Rows of the first trial; None: the config's.

    Raises:
        Refused: no shape may be tried.
    """
    memory, training, world = config.memory, config.training, ranks.world_size
    piece = gcd(*training.batch_sizes) // world
    if memory.fit_shape:
        mode, lengths = "shape", tuple(_lengths(config, corpus, say))
        most = memory.tune_max_batch_size or piece
    else:
        mode, lengths = memory.tune_mode, (model.max_seq_length,)
        most = largest_allowed(memory.tune_max_batch_size, epoch_samples, training.min_steps_per_epoch, world)
    rows = range(1, most + 1) if any_size else [part for part in divisors(piece) if part <= most]
    budget, limit = limit_of(memory, device, ranks)
    if not ranks.alone:  # a trial sums no gradients with other ranks
        limit -= exchange_bytes(model)
    return Request(
        setup=_setup(config, model, device, max(training.batch_sizes) // world, limit),
        budget_bytes=budget,
        target=memory.memory_target,
        mode=mode,
        lengths=lengths,
        rows=tuple(rows),
        start=start or memory.tune_init or piece,
        max_trials=memory.tune_max_trials,
        max_seconds=memory.tune_max_seconds,
    )


def _setup(
    config: RunConfig, model: GNNMoEConfig, device: torch.device, batch_size: int, limit_bytes: int
) -> TrialSetup:
    """Return what the trials share: of the training's settings, only those of the optimizer count."""
    optimizer = {name: getattr(config.training, name) for name in OF_THE_OPTIMIZER}
    training = replace(TrainingConfig(), **optimizer)
    return TrialSetup(model, training, batch_size, limit_bytes, str(device), config.execution)


def largest_allowed(maximum: int | None, epoch_samples: int, min_steps: int, world_size: int = 1) -> int:
    """Return the cap of a search: the user's maximum, and ``min_steps`` updates in the smallest epoch.

    Raises:
        Refused: the smallest epoch has too few samples for any batch.
    """
    most = epoch_samples // (world_size * min_steps)
    if most < 1:
        raise Refused(
            f"the smallest epoch serves {epoch_samples} blocks, too few for {min_steps} updates on "
            f"{world_size} rank{'s' * (world_size > 1)}; use more data or lower min_steps_per_epoch."
        )
    return most if maximum is None else min(maximum, most)


def exchange_bytes(model: GNNMoEConfig) -> int:
    """Return the bytes in which a rank sums its gradients with other ranks: the size of all parameters."""
    with without_memory(model):
        return sum(p.numel() * p.element_size() for p in GNNMoEModel(model, seed=0).parameters())


def _lengths(config: RunConfig, corpus: Corpus, say: Say) -> list[int]:
    training, (shortest, longest) = config.training, length_bounds(config)
    wanted = [*range(shortest, longest, config.memory.shape_length_step), longest]
    blocks = max(training.batch_sizes) * training.min_steps_per_epoch
    found = [length for length in wanted if _has(corpus, config.data, length, blocks)]
    if not found:
        raise Refused(f"the data are too few for {training.min_steps_per_epoch} updates at any length.")
    if found[-1] < wanted[-1]:
        say(f"  no length above {found[-1]}: the data would give too few updates an epoch")
    return found


def _has(corpus: Corpus, data: DataConfig, length: int, wanted: int) -> bool:
    """Return whether an epoch has so many blocks of this length, and each evaluated split one block."""
    splits = corpus.splits
    blocks = splits["train"].num_tokens // length
    evaluated = [splits["validation"]] + [splits["test"]] * data.evaluate_test
    enough = min(blocks, data.num_train_samples or blocks) >= wanted
    return enough and all(split.num_tokens >= length for split in evaluated)


# --- The search, and its record


def find(request: Request, ranks: Ranks, say: Say, on_trial: OnTrial | None = None) -> dict[str, Any]:
    """Search, or take the answer of an earlier search, and agree with the other ranks; return the record.

    Every rank calls it. ``on_trial`` receives each trial; where it is None, ``say`` receives a line.

    Raises:
        NoFeasibleBatch: nothing fits.
        SearchFailed: the search broke off, or nothing fits on another rank.
        ParametersNotApplied: a larger batch takes no more memory.
    """

    def say_trial(trial: Trial) -> None:
        shape = trial.shape if request.mode == "shape" else trial.shape.rows
        say(f"  {shape}: {trial.failure or 'fits'}")

    start, shapes, tell = time.perf_counter(), request.shapes, on_trial or say_trial
    look = search_in_child if torch.device(request.setup.device).type == "cuda" else search_here
    found, failure, from_cache = None, None, False
    try:
        found, from_cache = cached_search(request, lambda: look(request, tell), say, keep=ranks.first)
    except SearchFailed as error:
        failure = error
    least = min(ranks.gather(-1 if found is None else shapes.index(found.shape)))  # the one collective
    if found is None:
        raise failure or SearchFailed("nothing was found")
    if least < 0:
        raise SearchFailed("nothing fits on another rank.")
    seconds = time.perf_counter() - start
    return {
        "status": "ok",
        "from_cache": from_cache,
        "seconds": seconds,
        **_about(request),
        **_answer(request, found, shapes[least]),
    }


def failed(request: Request, error: SearchFailed) -> dict[str, Any]:
    """Return the record of a search that failed."""
    return {
        "status": "failed",
        "micro_batch_size": None,
        "error": f"{type(error).__name__}: {error}",
        "trials": _trials(request, error.trials),
        **_about(request),
    }


def words_of(found: dict[str, Any]) -> str:
    """Return a line for the user: what the record of a search means for its run."""
    fits = "method" in found
    if found["status"] == "failed" and fits:
        return f"WARNING: the fit failed; the run uses the given length and batch: {found['error']}"
    if found["status"] == "failed":
        return f"WARNING: the search failed; the run uses the given batch: {found['error']}"
    if fits:
        shape = Shape(found["micro_batch_size"], found["length"])
        return f"  micro-batches of {shape}, {found['batch_size']} sequences per update"
    return f"  micro-batch {found['micro_batch_size']} of a batch of {found['batch_size']}"


def _about(request: Request) -> dict[str, Any]:
    """Return the part of the record that is known before the search."""
    setup = request.setup
    by_mode = {"method": "fit_shape"} if request.mode == "shape" else {"init_val": request.start}
    return {
        "budget_bytes": request.budget_bytes,
        "target": request.target,
        "limit_bytes": setup.limit_bytes,
        "batch_size": setup.batch_size,
        "length": setup.model.max_seq_length,
        "device_name": device_name(torch.device(setup.device)),
        **by_mode,
    }


def _answer(request: Request, found: Found, shape: Shape) -> dict[str, Any]:
    """Return the part of the record that the search found; all ranks run ``shape``."""
    if request.mode == "shape":
        names = ("predicted_peak_bytes", "expected_peak_bytes", "measured_peak_bytes")
        by_mode = {name: getattr(found.trial, name) for name in names}
        by_mode |= {"longest": request.lengths[-1], "shortest": request.lengths[0]}
    else:
        by_mode = {"largest": found.shape.rows, "knee": found.knee, "mode": request.mode}
    return {
        "micro_batch_size": shape.rows,
        "length": shape.length,
        "cap": request.rows[-1],
        "stopped": found.stopped,
        "trials": _trials(request, found.trials),
        **by_mode,
    }


def _trials(request: Request, trials: tuple[Trial, ...]) -> list[dict[str, Any]]:
    records = []
    for trial in trials:
        record = asdict(trial)
        del record["shape"]
        record["size"] = trial.shape.rows
        if request.mode == "shape":
            record["length"] = trial.shape.length
        else:
            del record["expected_peak_bytes"]
        records.append(record)
    return records


# --- The cache


def cached_search(
    request: Request, make: Callable[[], Found], say: Say, *, keep: bool = True
) -> tuple[Found, bool]:
    """Return the answer to ``request``, and whether it comes from the cache; else ``make`` finds it.

    With ``keep``, the answer is kept, unless ``make`` raised, or time or free memory of the host was short.
    The key of the file holds the model's config with its length, the dtype, the optimizer's settings, the
    limit and the search's own settings. Each answer in it names the place where it was found. Where only
    other devices have an answer, ``say`` receives a note.
    """
    path = cache_folder() / f"batch-size-{_key(request)}.json"
    place, known = place_of(request), kept(path, "batch size of an earlier search", _read) or []
    for answer in known:
        if answer["place"] == place:
            return Found.from_json(answer["found"]), True
    others = {answer["place"]["device_name"] for answer in known}
    if others and place["device_name"] not in others:
        say(f"the batch size was tuned before on {', '.join(sorted(others))}; searching again on this device")
    made = make()
    if made.of_the_moment or not keep:
        return made, False
    text = json.dumps([*known, {"place": place, "found": asdict(made)}][-20:])
    try:
        replace_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        say(f"the batch size found cannot be kept in {path.parent} ({error.strerror})")
    return made, False


def place_of(request: Request) -> dict[str, Any]:
    """Return what an answer depends on besides the request."""
    return {
        "device_name": device_name(torch.device(request.setup.device)),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        **code_hashes(request.setup.model),
    }


def _key(request: Request) -> str:
    return key_of({"dtype": "float32", "optimizer": "fused AdamW", **asdict(request)})


def _read(file: IO[bytes]) -> list[dict[str, Any]]:
    """Return the answers in a file.

    Raises:
        ValueError: the file has another form.
    """
    answers = json.load(file)
    for answer in answers if isinstance(answers, list) else [None]:
        if not isinstance(answer, dict) or not isinstance(answer.get("place"), dict):
            raise ValueError("it is no list of answers")
        Found.from_json(answer["found"])
    return answers
