"""A checkpoint is what was saved, and holds all that a run goes on with; else it is refused unwritten."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cli import parse
from bench.config import RunConfig
from bench.run.__main__ import main
from bench.run.prepare import Prepared, prepare
from bench.run.resume import KNOWN_BY, STATE, refuse_unfit
from bench.training.checkpoint import load_checkpoint, save_checkpoint
from bench.tune.control import Controller
from bench.tune.search import Shape, ladder
from tests.bench._runs import act_at_step, interrupt, only_folder, refusal
from tests.bench.conftest import TINY

FLAGS = [
    *TINY,
    "--no-speed",
    "--max-steps",
    "9",
    "--eval-every",
    "3",
    "--epochs",
    "3",
    "--max-batches-per-epoch",
    "4",
]
FLAGS += ["--min-steps-per-epoch", "1", "--dropout-rate", "0.1", "--num-experts", "2"]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def stopped(small_data_dir, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run that was stopped in its eighth step, with a checkpoint after six, and its flags."""
    results = tmp_path_factory.mktemp("stopped")
    flags = [*FLAGS, "--data-dir", str(small_data_dir), "--results-dir", str(results / "results")]
    with pytest.MonkeyPatch.context() as patch:
        act_at_step(patch, 8, interrupt)
        assert main([*flags, "--quiet"]) == 130
    return only_folder(results / "results"), flags


@pytest.fixture
def run(stopped, tmp_path) -> tuple[Path, list[str]]:
    """A copy of that run of this test's own."""
    results = shutil.copytree(stopped[0].parents[1], tmp_path / "results")
    place = stopped[1].index("--results-dir") + 1
    return only_folder(results), [*stopped[1][:place], str(results)]


@pytest.fixture(scope="module")
def prepared(stopped) -> Prepared:
    return prepare(parse(RunConfig, stopped[1], presets=True))


@pytest.fixture(scope="module")
def tuned(stopped, sound) -> tuple[dict[str, Any], Prepared]:
    """The state of the same run with a search before it, whose shapes are controlled."""
    found = {"status": "ok", "micro_batch_size": 4, "length": 16, "batch_size": 4, "from_cache": False,
             "trials": [], "cap": 4, "limit_bytes": 1, "target": 0.85}  # fmt: skip
    control = Controller(ladder([16], [1, 2, 4]), Shape(4, 16), limit_bytes=1).state_dict()
    trainer, ledger = sound["trainer"] | {"control": control}, sound["ledger"] | {"tuned_micro_batch_size": 4}
    flags = [*stopped[1], "--tune-batch-size", "--memory-budget", "1GiB"]
    state = {**sound, "tuned": found, "trainer": trainer, "ledger": ledger}
    return state, prepare(parse(RunConfig, flags, presets=True))


@pytest.fixture(scope="module")
def sound(stopped) -> dict[str, Any]:
    return load_checkpoint(stopped[0] / "checkpoint.pt")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file in the study of a run, hidden ones too, by its path."""
    files = (path for path in folder.parent.rglob("*") if path.is_file())
    return {str(path.relative_to(folder.parent)): path.read_bytes() for path in files}


def test_a_checkpoint_is_an_archive_of_torch_that_ends_with_the_hash_of_all_before(tmp_path):
    path, state = tmp_path / "checkpoint.pt", {"weight": torch.arange(6.0).view(2, 3), "text": "é", "n": None}
    save_checkpoint(path, state)
    whole = path.read_bytes()
    assert whole[-64:].decode() == hashlib.sha256(whole[:-64]).hexdigest()
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == whole[-64:]
        assert archive.testzip() is None
    for loaded in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded.pop("weight"), state["weight"])
        assert loaded == {"schema": 3, "text": "é", "n": None}


@pytest.mark.slow
@pytest.mark.core("resume")
def test_a_flipped_bit_anywhere_is_refused(stopped, tmp_path):
    """Kind: silent damage of a disk. 10 places at random, and all bits of the ends."""
    whole, path = (stopped[0] / "checkpoint.pt").read_bytes(), tmp_path / "flipped.pt"
    bits = [random.Random(seed).randrange(8 * len(whole)) for seed in range(10)]
    bits += [*range(16), *range(8 * (len(whole) - 88), 8 * len(whole), 7)]  # incl. the length of the comment
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"flipped.pt is damaged: it.* SHA-256 .*; --force starts again"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: b"", "is damaged: it is cut short to 0 bytes"),
        (lambda whole: whole[:64], "is damaged: it is cut short to 64 bytes"),
        (lambda whole: whole[:-1], "is damaged: its SHA-256 differs|does not end with its SHA-256"),
        (lambda whole: whole[:-64], "is damaged: it does not end with its SHA-256"),
        (lambda whole: whole + b"0" * 64, "is damaged: its SHA-256 differs"),
        (lambda whole: whole[: len(whole) // 2], "is damaged: it does not end with its SHA-256"),
        (lambda whole: b"text" + hashlib.sha256(b"text").hexdigest().encode(), "holds no state of a run"),
    ],
)
def test_a_file_that_is_not_as_it_was_saved_is_refused_in_our_own_words(stopped, tmp_path, change, said):
    path = tmp_path / "changed.pt"
    path.write_bytes(change((stopped[0] / "checkpoint.pt").read_bytes()))
    with pytest.raises(ValueError, match=f"changed.pt {said}.*; --force starts again") as refused:
        load_checkpoint(path)
    assert "weights_only" not in str(refused.value)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"cannot be read .Is a directory"):
        load_checkpoint(tmp_path)
    save_checkpoint(path, {"value": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="holds no state of a run, though its SHA-256 is right"):
        load_checkpoint(path)


def test_a_full_disk_is_told_in_the_systems_own_words_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Torch raises an error of its zip writer over that of the disk."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"value": 1})

    def save(*_: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 596736 vs 596624")

    monkeypatch.setattr("bench.training.checkpoint.torch.save", save)
    with pytest.raises(OSError, match=r"^checkpoint.pt cannot be written: No space left on device$"):
        save_checkpoint(path, {})
    assert load_checkpoint(path)["value"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_signal_while_a_checkpoint_is_written_is_no_error_of_the_disk(tmp_path, monkeypatch):
    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        finally:  # as torch's writer does, which cannot be ended in the middle
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "checkpoint.pt", {})
    assert not any(tmp_path.iterdir())


def test_each_part_is_missed(sound, prepared):
    """Every key of every dict in it, but for the phases of a part; of long dicts the ends and the middle."""
    tried, before = 0, copy.deepcopy(sound)
    refuse_unfit(sound, prepared)
    assert str(before) == str(sound), "it passes and does not change"
    assert set(STATE) | {"schema", *KNOWN_BY} == set(sound)
    always = {"trace", "steps", "samples", "seconds", "layer_0.mixing"}
    for keys in places(sound, [key for key in sound if key in STATE]):
        name = ".".join(map(str, keys))
        if name.startswith("parts.0.seconds.") or (keys[-1] not in always and keys[0] == "trace"):
            continue  # samples of experts are missing from a run that began with --no-diagnostics
        with pytest.raises(ValueError, match=f"it lacks {re.escape(name)}|ledger.* not of"):
            refuse_unfit(without(sound, *keys), prepared)
        tried += 1
    assert tried > 80


def places(value: Any, keys: list[Any]) -> Iterator[list[Any]]:
    """Yield the way to every key of every dict in a state, from the first value of each list."""
    for key in keys if len(keys) < 20 else [keys[0], keys[len(keys) // 2], keys[-1]]:
        if isinstance(value, dict):
            yield [key]
        inner = value[key]
        below = list(inner) if isinstance(inner, dict) else [0] if isinstance(inner, list) and inner else []
        yield from ([key, *way] for way in places(inner, below))


def without(state: Any, *keys: Any) -> Any:
    """Return a state that lacks the value at ``keys``; the rest of it is shared."""
    first, *others = keys
    changed = copy.copy(state)
    if others:
        changed[first] = without(state[first], *others)
    else:
        del changed[first]
    return changed


def put(way: str, value: Any) -> Change:
    """Return a change of the value at ``way``; a callable ``value`` takes the old one."""

    def change(state: dict[str, Any]) -> None:
        keys: list[Any] = [int(key) if key.isdecimal() else key for key in way.split("/")]
        inner, last = reduce(getitem, keys[:-1], state), keys[-1]
        inner[last] = value(inner[last]) if callable(value) else value

    return change


WRONG: dict[str, list[tuple[str, Any, str]]] = {
    "trainer/": [
        ("", [], "trainer is a list; it must be a dict"),
        ("model/head.bias", torch.zeros(3), r"head.bias is a tensor \(3,\) of float32; it must be a t"),
        ("model/head.bias", lambda value: value.double(), "head.bias is a tensor .* of float64; it"),
        ("model/head.bias", 0.5, "trainer.model.head.bias is 0.5; it must be a tensor"),
        ("model/wings", torch.zeros(3), "it holds trainer.model.wings, which this run does not have"),
        ("best_model/head.bias", torch.zeros(3), "trainer.best_model.head.bias is a tensor"),
        ("optimizer/state", {}, "it lacks trainer.optimizer.state.0, trainer.optimizer.state.1"),
        ("optimizer/state/0/exp_avg", torch.zeros(2, 2), "optimizer.state.0.exp_avg is a tensor"),
        ("optimizer/state/999", {}, "it holds trainer.optimizer.state.999"),
        ("optimizer/param_groups/0/params", [0], "param_groups.0.params is .0.; it must be"),
        ("optimizer/param_groups/0/weight_decay", 0.5, "param_groups.0.weight_decay is 0.5; it must"),
        ("optimizer/param_groups", lambda groups: groups[:1], "trainer.optimizer has 1 groups, not 2"),
        ("done/steps", "6", "trainer.done.steps is '6'; it must be a value of type int"),
        ("done/steps", True, "trainer.done.steps is True"),
        ("done/steps", 10, "trainer.done is 10 steps, the best .*; the run has 9"),
        ("done/steps", 5, "ledger.epochs.1 is not as the run's plan has it after 5 steps|trace.steps"),
        ("done/best_step", 7, "trainer.done is 6 steps, the best 7"),
        ("recovering/micro_batch_size", 3, "micro_batch_size is 3, and batches are of 4 rows"),
        ("random", [], "trainer.random has 0 states for 1 ranks"),
        ("random/0", torch.zeros(5056, dtype=torch.uint8), "trainer.random.0 is no random state"),
        ("random/0", None, "trainer.random.0 is None; it must be"),
        ("random_cuda/0", torch.zeros(16, dtype=torch.uint8), "trainer.random_cuda.0 is a tensor"),
        ("control", {}, "trainer.control is a dict; it must be None"),
    ],
    "": [
        ("trace/steps", [0, 3], "trace.samples.* has 3 samples of 2 steps"),
        ("trace/steps", [0, 6, 3], "trace.steps do not rise from 0 to at most 6"),
        ("trace/samples/layer_0.mixing/1", torch.zeros(9), "samples.layer_0.mixing.1 is a tensor"),
        ("history", "", "history has not one row for each of 6 steps"),
        ("history", lambda text: text[: len(text) // 2], "history is not one row of JSON per line"),
        ("history", lambda text: text.partition("\n")[2], "history has not one row for each of 6 steps"),
        ("history", b"", "history is b''; it must be a value of type str"),
        ("parts", [], "it names no part of the run"),
        ("parts/0/seconds", 3, "parts.0.seconds is 3; it must be a dict"),
        ("log", 3, "log is 3; it must be a value of type str"),
        ("tuned", {"status": "ok"}, "tuned is the answer of a search"),
    ],
    "ledger/": [
        ("epochs/0/got/tokens", 1, "ledger.epochs.0 is not as the run's plan has it after 6 steps"),
        ("epochs/0/asked/tokens", 1, "ledger.epochs.0 is not as the run's plan has it"),
        ("epochs", lambda epochs: epochs[:1], "ledger.epochs are 1; step 6 is in epoch 1"),
        ("batch_shapes", {"4x16": 5}, "ledger.batch_shapes, micro_batch_shapes or last_shapes are"),
        ("batch_shapes", {"wide": 6}, "micro_batch_shapes or last_shapes are not"),
        ("micro_batch_shapes", {"2x16": 6}, "micro_batch_shapes or last_shapes are not of 6 steps"),
        ("evaluations", {}, "ledger.evaluations are not of 2 evaluations with 256 targets"),
    ],
    "of a search: ": [
        ("trainer/control", None, "trainer.control is None; it must be a dict"),
        ("trainer/control/rows", 3, "trainer.control is at 3 × 16, which is no shape of the run"),
        ("trainer/control/ceiling", 99, "trainer.control is beyond the 3 shapes"),
        ("tuned", None, "it lacks the answer of the search"),
        ("tuned/length", 8, "tuned.length is 8, which the run cannot have"),
        ("tuned/micro_batch_size", None, "tuned.micro_batch_size is None"),
        ("tuned", {}, "it lacks tuned.status"),
        ("tuned", {"status": "failed"}, "it lacks tuned.micro_batch_size, tuned.length, …"),
        ("tuned/micro_batch_size", 2, "ledger.tuned_micro_batch_size is not that of tuned"),
    ],
}


@pytest.mark.parametrize("part", WRONG)
def test_what_does_not_fit_the_run_is_refused(sound, prepared, tuned, part):
    sound, prepared, folder = (*tuned, "") if part == "of a search: " else (sound, prepared, part)
    refuse_unfit(copy.deepcopy(sound), prepared)
    for way, value, said in WRONG[part]:
        state = copy.deepcopy(sound)
        put((folder + way).strip("/"), value)(state)
        with pytest.raises(ValueError, match=said):
            refuse_unfit(state, prepared)


@pytest.mark.core("resume")
@pytest.mark.parametrize("way", ["--resume", "--resume-checkpoint"])
def test_a_refusal_leaves_the_run_as_it_was_and_a_sound_checkpoint_goes_on(run, capsys, way):
    """Wrong input: one line, exit status 2, not a byte changed; record and history stay resumable."""
    folder, flags = run
    path = folder / "checkpoint.pt"
    whole, state = path.read_bytes(), load_checkpoint(path)
    asked = [*flags, way] + [str(path)] * (way != "--resume")
    remedy = "--force starts again and keeps the run as" if way == "--resume" else "name a sound copy of it"

    def flip() -> None:
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])

    def lacking(*keys: str) -> Callable[[], None]:
        return lambda: save_checkpoint(path, without(state, *keys))

    for damage, said in (
        (flip, f"{path} is damaged: its SHA-256 differs from the one it was saved with"),
        (lacking("identity"), f"{path} cannot be continued: it lacks identity"),
        (lacking("trainer", "done"), "it lacks trainer.done"),
        (lambda: save_checkpoint(path, state | {"schema": 99}), "has schema 99; this version reads 3"),
    ):
        damage()
        before = contents(folder)
        message = refusal(capsys, asked)
        assert message.startswith("error: checkpoint ")
        assert said in message
        assert remedy in message
        assert contents(folder) == before
    path.write_bytes(whole)
    assert main([*asked, "--quiet"]) == 0
    assert json.loads((folder / "record.json").read_text())["time"]["resumed_at_step"] == 6


def test_what_a_killed_save_left_is_removed(run, tmp_path):
    """Temporary files of the run go when it goes on, and at each save; those of others stay."""
    path = tmp_path / "checkpoint.pt"
    names = ("checkpoint.pt.123", "other.pt.123", "checkpoint.pt.x.conf")
    left, *others = (tmp_path / f".{name}" for name in names)
    for name in (left, *others):
        name.write_bytes(b"half")
    save_checkpoint(path, {"value": 1})
    assert {found.name for found in tmp_path.iterdir() if found.is_file()} == {
        path.name,
        *(other.name for other in others),
    }
    folder, flags = run
    for name in (".checkpoint.pt.9", ".record.json.a1", ".history.jsonl.a2", ".nll.npz.a3"):
        (folder / name).write_bytes(b"half")
    assert main([*flags, "--resume", "--quiet"]) == 0
    assert not [found for found in folder.iterdir() if found.name.startswith(".")]
