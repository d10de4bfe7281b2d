"""Small faults in the code, and whether the tests find them: shows whether later tests are as strong.

Run from the root of the repository. WORK is a new folder outside it, for a clone and everything in between.

    python tools/mutants.py list           choose 300 mutants by a fixed seed, write tools/mutants.json
    python tools/mutants.py run WORK       test the mutants in a clone of HEAD; once stopped, it goes on
    python tools/mutants.py fold WORK      put the verdicts of WORK into tools/mutants.json
    python tools/mutants.py compare WORK   show the mutants that were killed in the list and are not in WORK

A mutant is one changed operator, comparison, constant, statement or return value in a function. The function
and the statement's text before and after name it, so that it is found again where the code has moved. ``run``
takes one folder of tests after the other. It runs the folder with coverage. Then it tests every mutant that
is not killed yet by the tests that run its line or use a fixture that runs it, the quickest first, as many
as take TESTS_SECONDS of CPU time. Verdicts: killed (by a test, or by the time limit), survived, not covered
(no test runs the line), not found (the code is no longer there). On an idle core it takes about two hours.
It needs the packages of the extra ``dev``, and coverage. The tests in LEFT_OUT are not used: they need a
browser, a cluster or several processes, or look at the source.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LIST = REPOSITORY / "tools/mutants.json"
SEED, NUMBER = 20, 300
TESTS_SECONDS, CPU_SECONDS, WALL_SECONDS, MOST_BYTES = 20, 120, 900, 16 << 30
MUTATED = [
    "gnnmoe/**/*.py", "bench/training/*.py", "bench/record.py", "bench/run/prepare.py", "bench/tune/*.py",
    "bench/measure/ledger.py", "bench/measure/rates.py", "bench/report/statistics.py",
    "bench/report/comparison.py", "bench/report/quantities.py",
]  # fmt: skip
FOLDERS = "gnnmoe", "report", "check", "data"
"""Of tests, those that come first: quick ones."""
LEFT_OUT = ["tests/notebooks", "*in_browser*", "*test_ray*", "*test_slurm*", "*test_cluster*", "*_ranks*",
            "*torchrun*", "*killed_sweep*", "*equal_records*", "*launcher*", "*test_layout*"]  # fmt: skip
LOADED = ("torch", "scipy.stats", "pandas", "hypothesis", "matplotlib.pyplot", "torch_geometric.nn", "tyro",
          "rich.console", "tabulate", "jinja2")  # fmt: skip
"""Packages that each test run would load, and that are loaded once."""
QUIET = {"print", "warn", "fail", "log", "debug", "info", "warning", "error", "add_note", "unlink", "rmdir",
         "rmtree", "kill", "__repr__", "__str__", "extra_repr"}  # fmt: skip
"""Functions that make texts for people, or delete: neither their bodies nor their arguments are changed."""
OTHER: dict[type, Any] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Lt: ast.LtE,
    ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault: in which file and function, and its statement's text without and with it."""

    file: str
    function: str
    before: str
    after: str


@dataclass(frozen=True)
class Place:
    """Where a mutant is: lines, columns in bytes, the text put there, and the first line of the statement."""

    file: str
    span: tuple[int, int, int, int]
    text: str
    statement: int

    def applied(self, source: bytes) -> bytes:
        """Return the file's content with the fault in it."""
        first, start, last, end = self.span
        lines = source.split(b"\n")
        changed = lines[first - 1][:start] + self.text.encode() + lines[last - 1][end:]
        return b"\n".join([*lines[: first - 1], changed, *lines[last:]])


# --- the mutants of a source tree --------------------------------------------------------------------


def mutants(root: Path, patterns: Sequence[str]) -> Iterator[tuple[Mutant, Place]]:
    """Yield every mutant of the files."""
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        yield from _within(ast.parse(path.read_bytes()), path.relative_to(root).as_posix(), "", False)


def _within(parent: ast.AST, file: str, name: str, called: bool) -> Iterator[tuple[Mutant, Place]]:
    """Yield the mutants in ``parent``, which stands in ``name``: in a function, if ``called``."""
    for child in ast.iter_child_nodes(parent):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            if child.name not in QUIET:
                own = f"{name}.{child.name}".lstrip(".")
                yield from _within(child, file, own, isinstance(child, ast.FunctionDef))
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            if called and isinstance(child, ast.stmt):
                yield from _of_statement(child, file, name)
            yield from _within(child, file, name, called)


def _of_statement(statement: ast.stmt, file: str, function: str) -> Iterator[tuple[Mutant, Place]]:
    head = copy.copy(statement)
    for block in {"body", "orelse", "finalbody", "handlers", "cases"} & set(head._fields):
        setattr(head, block, [ast.Pass()] if block == "body" else [])
    before = ast.unparse(head).removesuffix("\n    pass")
    for old, new in _changes(head):
        after = ast.unparse(copy.deepcopy(head, {id(old): new})).removesuffix("\n    pass")
        if after != before:
            text = ast.unparse(new)
            text = text if isinstance(new, ast.stmt | ast.Constant) else f"({text})"
            span = (old.lineno, old.col_offset, old.end_lineno or 0, old.end_col_offset or 0)
            yield Mutant(file, function, before, after), Place(file, span, text, statement.lineno)


def _changes(head: ast.stmt) -> Iterator[tuple[Any, ast.AST]]:
    """Yield every part of a statement that can be changed, with what it can be instead."""
    if _is_quiet(head):
        return
    targets = head.targets if isinstance(head, ast.Assign) else []
    stored = any(isinstance(one, ast.Attribute | ast.Subscript) for one in targets)
    dropped = ast.AugAssign | ast.Continue | ast.Break
    if (
        stored
        or isinstance(head, dropped)
        or (isinstance(head, ast.Expr) and isinstance(head.value, ast.Call))
    ):
        yield head, ast.Pass()
    if isinstance(head, ast.Return) and not isinstance(head.value, ast.Constant | None):
        yield head, ast.Return(ast.Constant(None))
    yield from _expressions(head)


def _expressions(node: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or _is_quiet(node):
        return
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    yield from _expressions(part)
    match node:
        case ast.BinOp(left, op, right) if type(op) in OTHER and not (_is_text(left) or _is_text(right)):
            yield node, ast.BinOp(left, OTHER[type(op)](), right)
        case ast.BoolOp(op, values):
            yield node, ast.BoolOp(OTHER[type(op)](), values)
        case ast.Compare(left, [op, *ops], comparators):
            yield node, ast.Compare(left, [OTHER[type(op)](), *ops], comparators)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, operand
        case ast.Constant(bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield node, ast.Constant(value + 1)
        case ast.If(test) | ast.While(test) | ast.IfExp(test) if isinstance(
            test, ast.Name | ast.Attribute | ast.Call
        ):
            yield test, ast.UnaryOp(ast.Not(), test)


def _is_quiet(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node
    called = call.func if isinstance(call, ast.Call) else None
    return getattr(called, "attr", getattr(called, "id", None)) in QUIET


def _is_text(node: ast.expr) -> bool:
    texts = isinstance(node, ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp)
    return texts or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def choose() -> list[Mutant]:
    """Return the mutants, at most one of each statement, in the order of the files."""
    found = [mutant for mutant, _ in mutants(REPOSITORY, MUTATED)]
    clear = [mutant for mutant, count in Counter(found).items() if count == 1]
    random.Random(SEED).shuffle(clear)
    one_each = {(one.file, one.function, one.before): one for one in clear}
    return sorted(list(one_each.values())[:NUMBER], key=found.index)


def find(mutant: Mutant, places: dict[tuple[str, str], list[tuple[Mutant, Place]]]) -> Place | None:
    """Return where a mutant is now: in its function, else in one of its name, else the only such text."""
    same = places.get((mutant.before, mutant.after), [])
    last = mutant.function.rpartition(".")[2]
    for alike in (
        [place for one, place in same if one == mutant],
        [place for one, place in same if one.function == mutant.function],
        [place for one, place in same if one.function.rpartition(".")[2] == last],
    ):
        if alike:
            return alike[0]
    return same[0][1] if len(same) == 1 else None


# --- which tests run a line: hooks for pytest, `-p tools.mutants` ------------------------------------

_tests: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "passed": False, "fixtures": []})
_contexts: list[str] = [""]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Give the lines that a test runs the test's name."""
    definitions = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009, no public name
    _tests[item.nodeid]["fixtures"] = [_fixture(one) for several in definitions for one in several]
    _enter(item.nodeid)
    try:
        return (yield)
    finally:
        _leave()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef):
    """Give the lines that a fixture runs the fixture's name, and keep how long it took."""
    _enter(_fixture(fixturedef))
    start = _cpu_seconds()
    try:
        return (yield)
    finally:
        _tests[_fixture(fixturedef)]["seconds"] = _cpu_seconds() - start
        _leave()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Keep how long a test took by itself, in CPU time."""
    start = _cpu_seconds()
    try:
        return (yield)
    finally:
        _tests[item.nodeid]["seconds"] = _cpu_seconds() - start


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep whether a test passed."""
    if report.when == "call":
        _tests[report.nodeid]["passed"] = report.passed


def pytest_sessionfinish() -> None:
    """Write what is known of the tests beside the coverage data."""
    Path(f"{os.environ['COVERAGE_FILE']}.json").write_text(json.dumps(_tests))


def _fixture(definition: pytest.FixtureDef) -> str:
    return f"fixture {definition.baseid}::{definition.argname}"


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # with the children that have ended


def _enter(context: str) -> None:
    _contexts.append(context)
    _switch()


def _leave() -> None:
    _contexts.pop()
    _switch()


def _switch() -> None:
    from coverage import Coverage

    running = Coverage.current()
    assert running is not None, "run this by `coverage run -m pytest`"
    running.switch_context(_contexts[-1])


# --- the verdicts --------------------------------------------------------------------------------------


class Tests:
    """The tests of one folder: what they run, how long they take, and what they say of a mutant."""

    def __init__(self, clone: Path, folder: str) -> None:
        self.clone, self._folder = clone, folder
        self._data = clone.with_name(f"coverage.{folder or 'tests'}")
        about = clone.with_name(f"{self._data.name}.json")
        if not about.is_file():
            self._cover()
        from coverage import CoverageData

        self._lines = CoverageData(str(self._data))
        self._lines.read()
        self._about: dict[str, dict[str, Any]] = json.loads(about.read_text())
        self._users, self._sound = defaultdict(set), set()
        for test, known in self._about.items():
            for fixture in known["fixtures"]:
                self._users[fixture].add(test)

    def _cover(self) -> None:
        command = [sys.executable, "-m", "coverage", "run", "--source=gnnmoe,bench", "-m", "pytest", "-q",
                   "-p", "tools.mutants", "-p", "no:cacheprovider", "-m", "not gpu"]  # fmt: skip
        left_out = [f"--ignore-glob=*/{one}" if "*" in one else f"--ignore={one}" for one in LEFT_OUT]
        paths = (
            sorted(self.clone.glob("tests/test_*.py")) if self._folder == "" else [f"tests/{self._folder}"]
        )
        with self.clone.with_name(f"{self._data.name}.txt").open("w") as shown:
            subprocess.run(
                [*command, *left_out, *map(str, paths)],
                env={**os.environ, "COVERAGE_FILE": str(self._data)},
                cwd=self.clone, stdout=shown, stderr=shown, check=False,
            )  # fmt: skip

    def tests_of(self, place: Place) -> tuple[list[str], int]:
        """Return the tests that run a mutant, the quickest first, and how many TESTS_SECONDS leave out."""
        contexts = self._lines.contexts_by_lineno(str(self.clone / place.file))
        of_lines = {
            name for line in range(place.span[0], place.span[2] + 1) for name in contexts.get(line, [])
        }
        found = of_lines or set(contexts.get(place.statement, []))
        found = found.union(*(self._users.get(name, set()) for name in found))
        tests = sorted((one for one in found if self._about.get(one, {}).get("passed")), key=self.seconds)
        spent, ready = 0.0, set[str]()
        for number, test in enumerate(tests):
            spent += self.seconds(test, ready)
            ready.update(self._about[test]["fixtures"])
            if number and spent > TESTS_SECONDS:
                return tests[:number], len(tests) - number
        return tests, 0

    def seconds(self, test: str, ready: Collection[str] = ()) -> float:
        """Return how long a test takes with its fixtures, but for those that are ready."""
        fixtures = [
            name for name in self._about[test]["fixtures"] if name not in ready and name in self._about
        ]
        return self._about[test]["seconds"] + sum(self._about[name]["seconds"] for name in fixtures)

    def verdict(self, place: Place) -> dict[str, Any]:
        """Return what the tests say of a mutant; a test that fails without it too is not asked again."""
        path = self.clone / place.file
        source, times = path.read_bytes(), path.stat()
        while (found := self.tests_of(place))[0]:
            tests, more = found
            start = time.monotonic()
            try:
                path.write_bytes(place.applied(source))
                by = failing(tests, self.clone)
            finally:
                path.write_bytes(source)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            seconds = round(time.monotonic() - start, 1)
            if not by:
                return {"verdict": "survived", "tests": len(tests), "more": more, "seconds": seconds}
            if by not in self._about or by in self._sound or not failing([by], self.clone):
                self._sound.add(by)
                return {"verdict": "killed", "by": by, "seconds": seconds}
            self._about[by]["passed"] = False
        return {"verdict": "not covered"}


class Chosen:
    """A plugin of pytest that runs the chosen tests in their order and notes the first that fails."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.order = {test: number for number, test in enumerate(tests)}
        self.failed = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the chosen tests."""
        items[:] = sorted(
            (one for one in items if one.nodeid in self.order), key=lambda one: self.order[one.nodeid]
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure."""
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file of tests that cannot be read."""
        self.failed = self.failed or (report.nodeid if report.failed else "")


def failing(tests: Sequence[str], clone: Path) -> str:
    """Return the test that fails, or why the tests ended early, or nothing; they run in a fork."""
    answer = clone.with_name("answer.txt")
    answer.write_text("end of the process")
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(clone)
        sys.path[0] = str(clone)
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        with clone.with_name("last.txt").open("w") as shown:
            os.dup2(shown.fileno(), 1)
            os.dup2(shown.fileno(), 2)
        chosen = Chosen(tests)
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        flags = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=short"]
        status = pytest.main([*flags, *files], plugins=[chosen])
        answer.write_text(chosen.failed or f"pytest: {int(status)}" if status else "")
        os._exit(0)
    end = time.monotonic() + WALL_SECONDS
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "time limit"
        time.sleep(0.05)
    return answer.read_text()


def cloned(work: Path) -> Path:
    """Return the clone in ``work``, as it was committed, and let child processes import from it."""
    clone = work / "clone"
    if not clone.is_dir():
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(clone)], check=True)
        compiled = [sys.executable, "-m", "compileall", "-q", "gnnmoe", "bench", "tests"]
        subprocess.run(compiled, cwd=clone, check=True)
    subprocess.run(["git", "checkout", "--quiet", "--", "."], cwd=clone, check=True)
    os.environ.update(
        PYTHONPATH=str(clone), MPLBACKEND="Agg", PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1"
    )
    return clone


def run(work: Path) -> None:
    """Test every mutant that has no verdict in ``work`` yet."""
    clone, places = cloned(work), defaultdict(list)
    for name in LOADED:
        importlib.import_module(name)
    for mutant, place in mutants(clone, ["gnnmoe/**/*.py", "bench/**/*.py"]):
        places[mutant.before, mutant.after].append((mutant, place))
    found = {number: find(mutant, places) for number, mutant in enumerate(listed())}
    folders = {path.parent.name for path in clone.glob("tests/*/test_*.py")}
    for folder in [name for name in FOLDERS if name in folders] + sorted(folders - {*FOLDERS}) + [""]:
        tests, done = Tests(clone, folder), verdicts(work, folder)
        left = {number: place for number, place in found.items() if number not in done}
        first = {number: tests.tests_of(place)[0][:1] if place else [] for number, place in left.items()}
        for number in sorted(left, key=lambda one: sum(map(tests.seconds, first[one]))):
            place = left[number]
            said = tests.verdict(place) if place else {"verdict": "not found"}
            with (work / "verdicts.jsonl").open("a") as file:
                file.write(json.dumps({"number": number, "folder": folder, **said}) + "\n")
            print(folder, number, said, flush=True)


def listed() -> list[Mutant]:
    """Return the mutants of tools/mutants.json."""
    names = Mutant.__dataclass_fields__
    return [Mutant(**{name: one[name] for name in names}) for one in json.loads(LIST.read_text())["mutants"]]


def verdicts(work: Path, folder: str | None = None) -> dict[int, dict[str, Any]]:
    """Return what is known in ``work`` by the mutant's number; with a folder, what it need not test."""
    path = work / "verdicts.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for said in map(json.loads, path.read_text().splitlines() if path.is_file() else []):
        number, of, verdict = said.pop("number"), said.pop("folder"), said["verdict"]
        if folder is None or of == folder or verdict in ("killed", "not found"):
            worse = ["not covered", "survived", "killed", "not found"].index
            found[number] = max(found.get(number, said), said, key=lambda one: worse(one["verdict"]))
    return found


def commit_of(folder: Path) -> str:
    """Return the commit that is checked out."""
    shown = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    )
    return shown.stdout.strip()


def write(content: dict[str, Any], found: Sequence[dict[str, Any]]) -> None:
    """Write tools/mutants.json, one mutant a line."""
    lines = ",\n".join(json.dumps(one) for one in found)
    head = json.dumps(content, indent=2).removesuffix("\n}")
    LIST.write_text(f'{head},\n  "mutants": [\n{lines}\n]\n}}\n')


def main() -> int:
    """Do what the first word says; return 1 where ``compare`` finds a mutant that is no longer killed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["list", "run", "fold", "compare"])
    parser.add_argument("work", nargs="?", type=Path)
    given = parser.parse_args()
    if given.command == "list":
        write({"seed": SEED, "commit": commit_of(REPOSITORY)}, [asdict(one) for one in choose()])
        return 0
    if given.work is None:
        parser.error(f"{given.command} needs a folder: WORK")
    work = given.work.resolve()
    if given.command == "run":
        run(work)
        return 0
    stored, new = json.loads(LIST.read_text()), verdicts(work)
    if given.command == "fold":
        names = Mutant.__dataclass_fields__
        merged = [
            {**{name: one[name] for name in names}, **new.get(number, {})}
            for number, one in enumerate(stored["mutants"])
        ]
        counts = dict(Counter(one.get("verdict", "not tested") for one in merged))
        write({"seed": stored["seed"], "commit": commit_of(work / "clone"), "verdicts": counts}, merged)
        print(counts)
        return 0
    lost = [(number, one) for number, one in enumerate(stored["mutants"])
            if one.get("verdict") == "killed" and new.get(number, {}).get("verdict") != "killed"]  # fmt: skip
    for number, one in lost:
        print(f"{number}: {new.get(number, {}).get('verdict', 'not tested')}, was killed by {one['by']}")
        print(f"  {one['file']}, {one['function']}\n  - {one['before']}\n  + {one['after']}")
    print(f"{len(lost)} of {sum(one.get('verdict') == 'killed' for one in stored['mutants'])} are not killed")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
