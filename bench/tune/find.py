"""From a run's flags to what fits: the request, the search (on CUDA in a child), the cache, the record."""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import gcd
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import IO, Any

import torch

from bench.config import DataConfig, RunConfig, TrainingConfig
from bench.data.cache import cache_folder, kept, key_of, replace_file
from bench.data.corpus import Corpus
from bench.gate.subject import global_random_state_kept
from bench.measure.environment import device_name
from bench.training.code import code_hashes
from bench.training.ranks import Ranks
from bench.tune.budget import device_memory_bytes, length_bounds, limit_of
from bench.tune.search import Found, Mode, SearchFailed, Trial, concluded, search
from bench.tune.shape import Shape, divisors, ladder, lengths_between
from bench.tune.trials import ParametersNotApplied, Trials, TrialSetup, require_batch_applied
from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.model import GNNMoEModel

OF_THE_OPTIMIZER = ("learning_rate", "adam_betas", "weight_decay", "max_grad_norm")
Say = Callable[[str], object]
OnTrial = Callable[[Trial], object]


@dataclass(frozen=True)
class Request:
    """A search to be done; plain data, so that it can go to another process."""

    setup: TrialSetup
    budget_bytes: int
    target: float
    """Share of the budget that a trial may reach."""
    mode: Mode
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    """Of the micro-batches that may be tried."""
    start: int
    """Rows of the first trial; ``shape`` begins where it is predicted to."""
    max_trials: int
    max_seconds: float

    @property
    def shapes(self) -> list[Shape]:
        """The ladder of shapes that may be tried."""
        return ladder(self.lengths, self.rows)


@dataclass(frozen=True)
class Place:
    """What an answer depends on besides the request: it is searched again wherever one of these differs."""

    device_name: str
    torch: str
    threads: int
    coupler_sha256: str
    project_sha256: str


def request_for(
    config: RunConfig,
    model: GNNMoEConfig,
    corpus: Corpus,
    device: torch.device,
    ranks: Ranks,
    *,
    epoch_samples: int,
    any_size: bool = False,
    start: int | None = None,
    say: Say = lambda _: None,
) -> Request:
    """Return the search that a run asks for: of its length and micro-batch, or of its micro-batch alone.

    For its training, micro-batches that divide its batch; with ``any_size``, all that leave
    ``min_steps_per_epoch`` updates in the smallest epoch, which serves ``epoch_samples`` blocks.
    ``start``: rows of the first trial (None: the config's).

    Raises:
        Refused: nothing would do.
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
    optimizer = {name: getattr(training, name) for name in OF_THE_OPTIMIZER}
    setup = TrialSetup(
        model=model, training=replace(TrainingConfig(), **optimizer),
        batch_size=max(training.batch_sizes) // world, limit_bytes=limit, device=str(device),
        execution=config.execution,
    )  # fmt: skip
    return Request(
        setup, budget, memory.memory_target, mode, lengths, tuple(rows), start or memory.tune_init or piece,
        memory.tune_max_trials, memory.tune_max_seconds,
    )  # fmt: skip


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
    """Return the bytes in which a rank sums its gradients with the others': as many as they take."""
    with torch.device("meta"):
        return sum(p.numel() * p.element_size() for p in GNNMoEModel(model, seed=0).parameters())


def _lengths(config: RunConfig, corpus: Corpus, say: Say) -> list[int]:
    training = config.training
    wanted = lengths_between(*length_bounds(config), config.memory.shape_length_step)
    blocks = max(training.batch_sizes) * training.min_steps_per_epoch
    found = [length for length in wanted if _has(corpus, config.data, length, blocks)]
    if not found:
        raise Refused(f"the data are too few for {training.min_steps_per_epoch} updates at any length.")
    if found[-1] < wanted[-1]:
        say(f"  no length above {found[-1]}: the data would give too few updates an epoch")
    return found


def _has(corpus: Corpus, data: DataConfig, length: int, wanted: int) -> bool:
    """Say whether an epoch has so many blocks of this length, and each evaluated split one."""
    splits = corpus.splits
    blocks = splits["train"].num_tokens // length
    evaluated = [splits["validation"]] + [splits["test"]] * data.evaluate_test
    enough = min(blocks, data.num_train_samples or blocks) >= wanted
    return enough and all(split.num_tokens >= length for split in evaluated)


def find(request: Request, ranks: Ranks, say: Say, on_trial: OnTrial | None = None) -> dict[str, Any]:
    """Search, or take the answer of an earlier search, and agree with the other ranks; return the record.

    Every rank calls it. ``on_trial`` is told of each trial, ``say`` where it is None.

    Raises:
        NoFeasibleBatch: nothing fits.
        SearchFailed: the search broke off, or nothing fits on another rank.
        ParametersNotApplied: a larger batch takes no more memory.
    """

    def told(trial: Trial) -> None:
        shape = trial.shape if request.mode == "shape" else trial.shape.rows
        say(f"  {shape} at once: {trial.failure or 'fits'}")

    start, shapes, tell = time.perf_counter(), request.shapes, on_trial or told
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
        "status": "ok", "from_cache": from_cache, "seconds": seconds, **_about(request),
        **_answer(request, found, shapes[least]),
    }  # fmt: skip


def failed(request: Request, error: SearchFailed) -> dict[str, Any]:
    """Return the record of a search that failed."""
    return {
        "status": "failed", "micro_batch_size": None, "error": f"{type(error).__name__}: {error}",
        "trials": _trials(request, error.trials), **_about(request),
    }  # fmt: skip


def words_of(found: dict[str, Any]) -> str:
    """Return what the record of a search means for its run."""
    fits = "method" in found
    if found["status"] == "failed" and fits:
        return f"WARNING: the fit failed, so what is configured is used: {found['error']}"
    if found["status"] == "failed":
        return f"WARNING: the search failed, so the configured batch is used: {found['error']}"
    if fits:
        shape = Shape(found["micro_batch_size"], found["length"])
        return f"  {shape} at once, {found['batch_size']} an update"
    return f"  micro-batch {found['micro_batch_size']} of a batch of {found['batch_size']}"


def _about(request: Request) -> dict[str, Any]:
    setup = request.setup
    by_mode = {"method": "fit_shape"} if request.mode == "shape" else {"init_val": request.start}
    return {
        "budget_bytes": request.budget_bytes, "target": request.target, "limit_bytes": setup.limit_bytes,
        "batch_size": setup.batch_size, "length": setup.model.max_seq_length,
        "device_name": device_name(torch.device(setup.device)), **by_mode,
    }  # fmt: skip


def _answer(request: Request, found: Found, shape: Shape) -> dict[str, Any]:
    """Return the part of the record that a search found, of which all ranks run ``shape``."""
    if request.mode == "shape":
        names = ("predicted_peak_bytes", "expected_peak_bytes", "measured_peak_bytes")
        by_mode = {name: getattr(found.trial, name) for name in names}
        by_mode |= {"longest": request.lengths[-1], "shortest": request.lengths[0]}
    else:
        by_mode = {"largest": found.shape.rows, "knee": found.knee, "mode": request.mode}
    return {
        "micro_batch_size": shape.rows, "length": shape.length, "cap": request.rows[-1],
        "stopped": found.stopped, "trials": _trials(request, found.trials), **by_mode,
    }  # fmt: skip


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


def search_here(request: Request, on_trial: OnTrial) -> Found:
    """Search in this process; ``on_trial`` is told of each trial.

    Raises:
        NoFeasibleBatch: nothing fits.
        ParametersNotApplied: a larger batch takes no more memory; looked at where the length is fitted.
    """
    trials, device = Trials(request.setup), torch.device(request.setup.device)
    if request.mode == "shape":
        shortest = request.lengths[0]
        with global_random_state_kept(device):
            require_batch_applied(request.setup.build(shortest), shortest, device)
    return search(
        trials, request.shapes, request.mode, start=request.start, predict=trials.predicted,
        limit_bytes=request.setup.limit_bytes, max_trials=request.max_trials,
        max_seconds=request.max_seconds, on_trial=on_trial,
    )  # fmt: skip


@dataclass(frozen=True)
class _Done:
    """The last message of a process: its answer."""

    found: Found


def search_in_child(
    request: Request, on_trial: OnTrial, work: Callable[[Request, OnTrial], Found] = search_here
) -> Found:
    """Search in a process of its own.

    What a trial leaves behind on the device, or breaks there, goes with the process. It is ended after
    ``max_seconds``, its start included; the answer is then what its trials show. On CUDA its allocator
    gets no more than the budget.

    Raises:
        NoFeasibleBatch, ParametersNotApplied: ``work`` raised it.
        SearchFailed: ``work`` raised something else, no trial ended in time, or the process died.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    ours, theirs = context.Pipe(duplex=False)
    deadline = time.time() + request.max_seconds
    child = context.Process(target=_child, args=(theirs, work, request, deadline), daemon=True)
    child.start()
    theirs.close()
    trials: list[Trial] = []

    def keep(trial: Trial) -> None:
        trials.append(trial)
        on_trial(trial)

    try:
        done = _last_message(ours, child, deadline, keep)
    finally:
        child.kill()
        child.join()
    if done is not None:
        return done.found
    if not trials:
        raise SearchFailed(f"no trial ended within {request.max_seconds:g} s (--tune-max-seconds).")
    return concluded(trials, request.shapes, "max_seconds")


def _last_message(ours: Connection, child: BaseProcess, deadline: float, keep: OnTrial) -> _Done | None:
    """Return the child's last message, None at the deadline."""
    while ours.poll(max(0.0, deadline - time.time())):
        try:
            message = ours.recv()
        except (EOFError, OSError):  # at the end of a message, or within one
            child.join()
            raise SearchFailed(f"the search's process died (exit code {child.exitcode}).") from None
        if isinstance(message, _Done):
            return message
        if isinstance(message, Exception):
            raise message
        if isinstance(message, str):
            raise SearchFailed(f"the search's process raised {message}")
        keep(message)
    return None


def _child(
    theirs: Connection, work: Callable[[Request, OnTrial], Found], request: Request, deadline: float
) -> None:
    warnings.simplefilter("ignore")  # the parent has said what there is to say of the coupler
    device = torch.device(request.setup.device)
    try:
        if device.type == "cuda":
            share = request.budget_bytes / device_memory_bytes(device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.index)
        left = replace(request, max_seconds=max(1.0, deadline - time.time()))
        theirs.send(_Done(work(left, theirs.send)))
    except (SearchFailed, ParametersNotApplied) as known:
        theirs.send(known)
    except Exception:
        theirs.send(traceback.format_exc())


def place_of(request: Request) -> Place:
    """Return where this process would search."""
    name = device_name(torch.device(request.setup.device))
    code = code_hashes(request.setup.model)
    return Place(name, str(torch.__version__), torch.get_num_threads(), **code)


def cached_search(
    request: Request, make: Callable[[], Found], say: Say, *, keep: bool = True
) -> tuple[Found, bool]:
    """Return the answer to ``request``, and whether it is one that was kept; else it is made, and kept
    where the caller may ``keep`` it.

    The key holds the model's config with its length, the dtype, the optimizer's settings, the limit
    and the search's own settings; beside it stands the ``Place``. An answer for the same key from
    another device is not used, and ``say`` is told so. Neither what ``make`` raises is kept, nor a
    search that ended for want of time or of free memory of the host.
    """
    path = cache_folder() / f"batch-size-{_key(request)}.json"
    place, known = place_of(request), kept(path, "batch size of an earlier search", _read) or []
    for answer in known:
        if answer["place"] == asdict(place):
            return Found.from_json(answer["found"]), True
    others = {answer["place"]["device_name"] for answer in known}
    if others and place.device_name not in others:
        say(f"the batch size was tuned before on {', '.join(sorted(others))}; searching again on this device")
    made = make()
    if made.of_the_moment or not keep:
        return made, False
    text = json.dumps([*known, {"place": asdict(place), "found": made.to_json()}][-20:])
    try:
        replace_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        say(f"the batch size found cannot be kept in {path.parent} ({error.strerror})")
    return made, False


def _key(request: Request) -> str:
    return key_of({"dtype": "float32", "optimizer": "fused AdamW", **asdict(request)})


def _read(file: IO[bytes]) -> list[dict[str, Any]]:
    """Return the answers in a file."""
    return json.load(file)
