"""A study with one damaged file: every command answers or refuses, and never ends in a traceback.

A small study is made once: three finished runs, an interrupted run with its checkpoint, a report, a
published copy, the cache, and the files that commands read. Then one file is damaged, and the commands run.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench
import bench.report.__main__ as report
import bench.run.__main__ as run
import bench.speed.__main__ as speed
import bench.sweep.__main__ as sweep
from bench.data.cache import replace_file
from bench.speed.show import MARKS
from bench.study.hypotheses import load_hypotheses, state
from bench.sweep.executors.base import Executor, Task
from bench.training.checkpoint import load_checkpoint, save_checkpoint
from gnnmoe.config import Refused
from tests.bench._runs import act_at_step, interrupt
from tests.bench.conftest import TINY

FEW, MANY = 3, 30
SPEED = Path(__file__).parents[1] / "results/reference/speed/h100-experts/speed.json"
MOST_SECONDS, MOST_LINES, WIDTH = 10.0, 3, 80
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
Command = Callable[[list[str]], int]

# --- the study, and the commands that read it

RUN = "\n".join(f"{name.strip('-')} = {value}" for name, value in zip(TINY[:-1:2], TINY[1:-1:2], strict=True))
HGNN = 'coupler = "HGNN"\nstatic_hyperedge_strategy = "file:{edges}"'
SWEEP = f"""
seeds = 2
hypotheses = "hypotheses.toml"
[base]
{RUN}
plots = false
[[union]]
base.coupler = "mean"
[[union]]
[union.base]
{HGNN}
"""
HYPOTHESES = """[[hypothesis]]
statement = "HGNN is better than the mean"
better = { coupler = "HGNN" }
than = { coupler = "mean" }
"""


class InProcess(Executor):
    """Runs the command of a task in this process, which saves the seconds that a child takes to start."""

    slots = 1

    def __init__(self, *_: object) -> None:
        self._ended: dict[str, int] = {}

    def start(self, task: Task) -> None:
        """Run the task to its end."""
        with task.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            words = list(task.command[task.command.index("bench.run") + 1 :])
            self._ended[task.run_id] = status_of(run.main, words)

    def ended(self) -> dict[str, int]:
        """Return the tasks that ended since the last call."""
        ended, self._ended = self._ended, {}
        return ended

    def stop(self, run_id: str, *, at_once: bool = False) -> None:
        """Do nothing: no task runs when this is called."""


def status_of(command: Command, words: list[str]) -> int:
    """Return the exit status of a command in this process."""
    try:
        return command(words)
    except SystemExit as end:
        return int(end.code or 0)


def frames(words: list[str]) -> int:
    """Read a study as in a notebook."""
    try:
        bench.load(words[0])
        bench.history(words[0])
    except Refused as error:
        print(f"error: {error}")
        return 2
    return 0


class Place:
    """The folder of the study and of all files beside it."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root, self.data = root, data
        self.finished = self.interrupted = ""

    def __getitem__(self, name: str) -> str:
        return str(self.root / name)

    def write_files(self) -> None:
        """Write the files that the commands read."""
        edges = self["edges.json"]
        texts = {"sweep.toml": SWEEP.replace("{edges}", edges), "hypotheses.toml": HYPOTHESES,
                 "run.toml": f"{RUN}\n{HGNN.replace('{edges}', edges)}\nplots = false\n",
                 "edges.json": "[[0, 1], [1, 2, 3]]\n"}  # fmt: skip
        for name, text in texts.items():
            (self.root / name).write_text(text)
        (self.root / "speed").mkdir()
        shutil.copy(SPEED, self.root / "speed")
        (self.root / "speed/page.md").write_text("\n".join(MARKS))

    def runs(self) -> dict[str, str]:
        """Return the status of each run by its id."""
        records = (self.root / "results" / "made").glob("*/record.json")
        return {path.parent.name: json.loads(path.read_text())["status"] for path in records}

    def commands(self) -> dict[str, tuple[Command, list[str]]]:
        """Return each command by a name, with its words; the commands that train are last."""
        results = ["--results-dir", self["results"]]
        places = [*results, "--data-dir", str(self.data), "--study", "made"]
        planned, own = [self["sweep.toml"], *places], ["--config", self["run.toml"], *places]
        published = self["published"]
        return {
            "ls": (report.main, ["ls", *results]),
            "ls STUDY": (report.main, ["ls", "made", *results]),
            "show": (report.main, ["show", self.finished, *results]),
            "show interrupted": (report.main, ["show", self.interrupted, *results]),
            "report": (report.main, ["made", "--no-plots", *results]),
            "compare": (report.main, ["compare", "made:mean", "made:HGNN", *results]),
            "verify": (report.main, ["made", "--verify", *results]),
            "verify published": (report.main, [published, "--verify"]),
            "report published": (report.main, [published, "--no-plots", "--out", self["out"]]),
            "publish": (report.main, ["made", "--publish", published, *results]),
            "speed --table": (speed.main, ["--table", self["speed"], "--page", self["speed/page.md"]]),
            "frames": (frames, [self["results/made"]]),
            "sweep --dry-run": (sweep.main, [*planned, "--dry-run"]),
            "run": (run.main, own),
            "sweep": (sweep.main, planned),
            "resume": (run.main, [*own, "--coupler", "mean", "--seed", "1", "--resume"]),
        }

    def make(self) -> None:
        """Make the study; its last run is interrupted."""
        self.root.mkdir()
        self.write_files()
        commands = self.commands()
        *_, (_, own), _, (_, resume) = commands.values()
        for words in (own, [*own, "--coupler", "mean"], [*own, "--seed", "1"]):
            assert status_of(run.main, words) == 0
        with pytest.MonkeyPatch.context() as patch:
            act_at_step(patch, 4, interrupt)
            assert status_of(run.main, resume[:-1]) == 130
        by_status = {status: run_id for run_id, status in self.runs().items()}
        self.finished, self.interrupted = by_status["ok"], by_status["interrupted"]
        state(load_hypotheses(self.root / "hypotheses.toml"), self.root / "results" / "made")
        for name in ("report", "publish", "sweep --dry-run"):
            assert status_of(*commands[name]) == 0, name


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_data_dir) -> Iterator[Place]:
    """The study; ``sound`` beside it is a copy that no test changes."""
    found = Place(tmp_path_factory.mktemp("damage") / "place", small_data_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_plan", in_process(sweep.run_plan))
        patch.setenv("GNNMOE_CACHE_DIR", found["cache"])
        patch.setattr("bench.sweep.work.POLL_SECONDS", 0.0)
        found.make()
        found.root.rename(found.root.with_name("sound"))
        yield found


def in_process(run_plan: Callable[..., int]) -> Callable[..., int]:
    """Return ``run_plan`` with the executor ``InProcess``."""

    def running(*arguments: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep, "make_executor", InProcess)
            return run_plan(*arguments)

    return running


# --- damage

NASTY: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, 2**31 - 1, 2**63, float("nan"), float("inf"), 1e308, 1e-308, "x", "512",
    "", "\x1b[31mred", "\ud800", "x" * 100_000, [], {}, [[]], {"x": 1}, [None], ["x"],
    {"value": None, "reason": 1},
    json.loads("[" * 90 + "]" * 90),
]  # fmt: skip
WHOLE = [
    b" ", b"null", b"3", b'"x"', b"{}", b'{"": {}}', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000,
    b'{"seed": ' + b"9" * 5000 + b"}", b"\xff\xfe\x00", b"\x00" * 1000, b'"\\ud800"', b'"\x1b[31m"', b"NaN",
    b"\xef\xbb\xbf{}", b"PK\x03\x04 cut short", b"\x1f\x8b\x08 cut short", b"a = [" * 5000, b"a = nan\n",
    b"seeds = 1979-05-27\n", b"\x80\x04K\x03.",
]  # fmt: skip
LARGE = 2**28


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Return container and key of each value in nested dicts and lists."""
    keys = range(len(value)) if isinstance(value, list) else list(value) if isinstance(value, dict) else ()
    return [found for key in keys for found in ((value, key), *places_in(value[key]))]


def mutated(value: Any, draw: random.Random) -> str:
    """Change or delete one place in a nested value; say which."""
    where = places_in(value)
    if not where:
        return "nothing"
    container, key = draw.choice(where)
    if draw.random() < 0.25:
        del container[key]
        return f"without {key}"
    container[key] = draw.choice(NASTY)
    return f"{key} = {str(container[key])[:40]}"


def in_json(path: Path, draw: random.Random) -> str:
    value = json.loads(path.read_text())
    what = mutated(value, draw)
    path.write_text(json.dumps(value))
    return what


def in_lines(path: Path, draw: random.Random) -> str:
    """Change one line of JSON in the middle of a file, which may be compressed."""
    packed = path.suffix == ".gz"
    lines = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).splitlines()
    place = draw.randrange(len(lines))
    row, what = json.loads(lines[place]), "another line"
    if draw.random() < 0.7:
        what = mutated(row, draw)
        lines[place] = json.dumps(row).encode()
    else:
        lines[place] = draw.choice(WHOLE).replace(b"\n", b"")
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if packed else data)
    return f"line {place}: {what}"


def in_arrays(path: Path, draw: random.Random) -> str:
    """Change one array of an npz file."""
    arrays = dict(np.load(io.BytesIO(path.read_bytes())))
    name = draw.choice(sorted(arrays))
    old = arrays[name]
    changes: dict[str, Callable[[], Any]] = {
        "no array": lambda: None,
        "text": lambda: old.astype(str),
        "complex": lambda: old.astype(complex),
        "objects": lambda: np.array([{}], dtype=object),
        "bool": lambda: old.astype(bool),
        "one number": lambda: np.array(1),
        "empty": lambda: old[:0],
        "shorter": lambda: old[:-1],
        "square": lambda: np.ones((3, 3)),
        "NaN": lambda: np.full(old.shape, np.nan),
        "huge": lambda: np.full(old.shape, 2**31 - 1),
        "negative": lambda: np.full(old.shape, -1),
        "dates": lambda: np.zeros(old.shape, "datetime64[s]"),
    }
    what = draw.choice(sorted(changes))
    arrays[name] = changes[what]()
    if what == "no array":
        del arrays[name]
    if "cache" in path.parts:
        replace_file(path, lambda file: np.savez(file, **arrays))  # pyright: ignore
    else:
        np.savez(path, **arrays)
    return f"{name}: {what}"


def in_state(path: Path, draw: random.Random) -> str:
    """Change one value of a checkpoint, whose SHA-256 is then right."""
    state = load_checkpoint(path)
    where = [(holder, key) for holder, key in places_in(state) if key != "schema"]
    shallow = [found for found in where if found[0] is state or found[0] is state.get("trainer")]
    holder, key = draw.choice(shallow if draw.random() < 0.5 else where)
    how = draw.choice(["deleted", "nasty", "tensor"])
    if how == "deleted":
        del holder[key]
    else:
        values = [value for value in NASTY if value != "\ud800"]  # torch cannot save it
        holder[key] = torch.ones(3, 5) if how == "tensor" else draw.choice(values)
    save_checkpoint(path, {name: value for name, value in state.items() if name != "schema"})
    return f"{key}: {how}"


def cut_short(path: Path, draw: random.Random) -> str:
    size = draw.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def flipped(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"a bit of byte {place}"


def another(path: Path, draw: random.Random) -> str:
    data = draw.choice(WHOLE)
    path.write_bytes(data)
    return f"now {data[:20]!r}"


def no_plain_file(path: Path, draw: random.Random) -> str:
    """Put something in place of the file that is no file of a normal size."""
    kinds: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "circle": lambda: path.symlink_to(path.name),
        "to nothing": lambda: path.symlink_to("nowhere"),
        "256 MiB": lambda: (path.touch(), os.truncate(path, LARGE)),
        "missing": lambda: None,
    }
    what = draw.choice(sorted(kinds))
    path.unlink()
    kinds[what]()
    return what


INSIDE = {".json": in_json, ".jsonl": in_lines, ".gz": in_lines, ".npz": in_arrays, ".pt": in_state}
ANY = (cut_short, flipped, another, no_plain_file)
READ = ("results/made/*/*", "results/made/*.json", "results/made/report/options.json", "published/*",
        "published/*/*",        "cache/**/*", "*.json", "*.toml", "speed/*")  # fmt: skip


ALWAYS_READ = ("record.json", "nll.npz", "articles.npz", "communication.npz", "options.json",
               "published.json", "hypotheses.json", "hypotheses.toml", "sweep.toml",
               "edges.json", "speed.json")  # fmt: skip


def damage(place: Place, draw: random.Random) -> tuple[Path, str]:
    """Damage one file that commands read; return its path and what was done."""
    found = [path for path in place.root.glob(draw.choice(READ)) if path.is_file() and path.stat().st_size]
    suffixes = sorted({path.suffix for path in found})
    kind = draw.choice(suffixes)
    path = draw.choice(sorted(path for path in found if path.suffix == kind))
    inside = INSIDE.get(kind)
    change = inside if inside and draw.random() < 0.6 else draw.choice(ANY)
    return path, f"{change.__name__} {change(path, draw)}"


# --- what must hold


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    name: str
    status: int | None
    said: str
    seconds: float
    wrote: bool

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with it."""
        if self.status not in (0, 1, 2):
            yield f"ended with {self.status}: {self.said[-1500:]}"
        elif "Traceback" in self.said:
            yield f"a traceback: {self.said[-1500:]}"
        if found := CONTROL.search(self.said):
            yield f"a raw {found[0]!r}: {self.said[-500:]!r}"
        if self.seconds > MOST_SECONDS:
            yield f"{self.seconds:.1f} s of the processor"
        if self.status == 2:
            message = self.said[self.said.find("error: ") :]
            lines = sum(max(1, -(-len(line) // WIDTH)) for line in message.strip().splitlines())
            if not message.startswith("error: ") or lines > MOST_LINES:
                yield f"a refusal of {lines} lines: {self.said!r}"
            if self.wrote:
                yield f"a refusal that wrote: {self.said!r}"


def asked(place: Place, name: str) -> Answer:
    """Run a command."""
    command, words = place.commands()[name]
    before, printed, began = files_of(place), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = status_of(command, words)
        except BaseException:
            status = None
            printed.write(traceback.format_exc())
    said = printed.getvalue().replace(str(place.root.parent), "/tmp")
    return Answer(name, status, said, time.process_time() - began, files_of(place) != before)


def files_of(place: Place) -> dict[Path, tuple[int, int]]:
    """Return size and time of each file, except of the cache."""
    found = (path for path in place.root.rglob("*") if "cache" not in path.parts and not path.is_dir())
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def trial(place: Place, seed: int, counts: Counter[str]) -> list[str]:
    """Damage one file, run the commands and return what is wrong, in words."""
    draw = random.Random(seed)
    shutil.rmtree(place.root, ignore_errors=True)
    shutil.copytree(place.root.with_name("sound"), place.root)
    path, what = damage(place, draw)
    *names, in_a_sweep, alone = place.commands()
    trains = (
        draw.choice([in_a_sweep, alone]) if place.interrupted in path.parts or draw.random() < 0.3 else None
    )
    answers = [asked(place, name) for name in [*names, *filter(None, [trains])]]
    counts.update(f"exit status {answer.status}" for answer in answers)
    faults = [f"{answer.name}: {why}" for answer in answers for why in answer.faults()]
    said = re.sub(r"\s", "", "".join(answer.said for answer in answers))
    if path.name in ALWAYS_READ and what.startswith(another.__name__) and path.name not in said:
        faults.append("no command named the file")
    return [f"seed {seed}, {path.relative_to(place.root)}, {what}, {fault}" for fault in faults]


def test_a_damaged_file_never_ends_in_a_traceback(place):
    faults = [fault for seed in range(FEW) for fault in trial(place, seed, Counter())]
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
def test_none_of_many_damaged_files_ends_in_a_traceback(place):
    counts: Counter[str] = Counter()
    faults = [fault for seed in range(1000, 1000 + MANY) for fault in trial(place, seed, counts)]
    print(MANY, "damaged files", dict(counts), len(faults), "faults")
    assert not faults, "\n\n".join(faults[:20])
