"""An old number is never shown as the answer to new code."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bench.training.environment as code
from bench.data.cache import syntax_sha256
from bench.record import refuse_another_file
from bench.run.__main__ import main
from bench.run.prepare import Identifier
from bench.sweep.outcome import look
from bench.sweep.plan import make_plan
from bench.sweep.specification import parse_shorthand
from bench.training.environment import CHANGES_NUMBERS, coupler_sha256, project_sha256
from gnnmoe.config import GNNMoEConfig, Refused
from tests.bench._runs import act_at_step, interrupt, only_run, refusal, results_of

REPOSITORY = Path(__file__).parents[2]
SOURCE = '''"""A module."""
import math  # a comment

class Mean:
    """The mean of {x}."""

    scale: float = 1.5
    """An attribute."""

    def forward(self, x, k=2):
        """Return it."""
        return f"{x:>{k}}" if x < 3 else [x.mean(2), ""]
'''
SAYS_THE_SAME = [
    ("  # a comment", ""),
    ('"""A module."""\n', "# another comment\n\n"),
    ('"""Return it."""', '"""Return something else, on\n        two lines."""'),
    ('    """An attribute."""\n', ""),
    ("x.mean(2)", "(x\n                .mean( 2 ))"),
    ('f"{x:>{k}}"', "f'{x:>{k}}'"),
]
SAYS_ANOTHER_THING = [
    ("x < 3", "x <= 3"), ("x.mean(2)", "x.mean(1)"), ('""]', '"a"]'), ('""]', "]"), ("k=2", "k=3"),
    ("1.5", "True"), ("x.mean(2)", "x.sum(2)"), (":>{k}", ":<{k}"), ("scale: float", "scale: int"),
    ("import math", "import cmath as math"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), [*SAYS_THE_SAME, *SAYS_ANOTHER_THING])
def test_changes_of_what_is_computed_count_and_comments_docstrings_and_layout_do_not(old, new):
    """The hash is the same in Python 3.11.7, 3.12.1 and 3.13.0, which gives an f-string another tree."""
    assert SOURCE.count(old) == 1
    changed = syntax_sha256(SOURCE.replace(old, new).encode())
    assert (changed == syntax_sha256(SOURCE.encode())) is ((old, new) in SAYS_THE_SAME)
    assert syntax_sha256(SOURCE.encode())[:16] == "c4b026a4e920f0ce"


SHOWS_ONLY = (
    "bench/__init__.py bench/run/resume.py"
    " bench/config.py bench/files.py bench/interruption.py"
    " bench/cli.py bench/help.py bench/run/progress.py bench/run/trackers/__init__.py bench/record.py"
).split()
"""Modules of a run that change no number: flags (which the identity has), texts and files."""


def test_every_module_that_a_run_is_made_of_is_in_the_list_or_changes_no_number():
    listed = [REPOSITORY / entry for entry in CHANGES_NUMBERS]
    assert all(path.exists() for path in listed)
    covered = {path for entry in listed for path in ([entry] if entry.is_file() else entry.rglob("*.py"))}
    modules = {path for path in _modules_of("bench.run.session") if path.is_relative_to(REPOSITORY / "bench")}
    left = {path.relative_to(REPOSITORY).as_posix() for path in modules - covered}
    assert left == set(SHOWS_ONLY)


def _modules_of(name: str) -> set[Path]:
    """Return the files of a module of this project and of all that it imports, wherever the import stands."""
    found: set[Path] = set()
    waiting = [name]
    while waiting:
        path = REPOSITORY.joinpath(*waiting.pop().split("."))
        path = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if path.is_file() and path not in found:
            found.add(path)
            waiting += _imported(path)
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def hash_of(coupler: str, **options) -> str:
    return coupler_sha256(GNNMoEConfig(coupler_type=coupler, coupler_options=options))


def test_a_coupler_of_the_package_counts_with_what_it_is_made_of_and_no_other(monkeypatch):
    read: list[Path] = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or plain(path))

    def files(coupler: str, **options) -> set[str]:
        read.clear()
        hash_of(coupler, **options)
        return {path.relative_to(REPOSITORY / "gnnmoe").as_posix() for path in read}

    assert files("mean") == {"couplers/mean.py"}
    assert files("gate") == {"couplers/gate.py", "couplers/static.py"}
    assert files("GNN") == {"couplers/gnn.py", "couplers/stacked.py"}
    parts = {"hypergraph/propagation.py", "hypergraph/strategies.py", "hypergraph/backends.py"}
    assert {"couplers/hgnn.py", "layers/base.py", "layers/static.py", *parts} <= files("HGNN")
    assert "layers/edhnn.py" not in files("HGNN")
    assert files("dense", like="topk") == {"couplers/dense.py", "couplers/topk.py", "couplers/gate.py",
                                           "couplers/static.py"}  # fmt: skip
    read.clear()
    project_sha256.__wrapped__()
    names = {path.relative_to(REPOSITORY).as_posix() for path in read}
    of_all = {f"gnnmoe/{name}.py" for name in ("model", "couplers/base", "couplers/registry")}
    assert of_all | {"bench/training/step.py", "bench/data/cache.py", "bench/run/session.py"} <= names
    assert not {name for name in names if "plot" in name or "couplers/mean" in name or "sweeps" in name}


COUPLER = (REPOSITORY / "examples" / "twenty_line_coupler.py").read_text()


def test_a_file_counts_with_the_modules_that_it_imports_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "parts_of_mine").mkdir()
    for name in ("parts_of_mine/__init__.py", "parts_of_mine/inner.py", "beside_mine.py"):
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "parts_of_mine" / "maps.py").write_text("from . import inner\n")
    mine = tmp_path / "mine.py"
    lazily = "    def other(self):\n        import beside_mine\n\n    def forward"
    source = COUPLER.replace("    def forward", lazily)
    mine.write_text(f"import torch, numpy\nfrom parts_of_mine.maps import inner\n{source}")
    seen = [hash_of(f"{mine}:NormCoupler")]
    for name in ("parts_of_mine/__init__.py", "parts_of_mine/inner.py", "beside_mine.py"):
        (tmp_path / name).write_text("x = 2  # edited\n")
        seen.append(hash_of(f"{mine}:NormCoupler"))
    assert len(set(seen)) == len(seen)
    assert "parts_of_mine" in sys.modules
    assert "beside_mine" not in sys.modules  # what runs is imported by the run, and not for its hash
    for name in ("parts_of_mine", "parts_of_mine.maps", "parts_of_mine.inner"):
        monkeypatch.delitem(sys.modules, name)
    moved = mine.rename(tmp_path / "another_name.py")
    assert hash_of(f"{moved}:NormCoupler") == seen[-1]


FORWARD = "return self.combiner((weights * expert_outputs).sum(2))"
REFERENCE = "return self.combiner(torch.stack(total).sum(0))"


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(COUPLER)
    return path


def edit(path: Path) -> None:
    """Let the coupler compute something else; how it says so in reference() does not matter here."""
    assert FORWARD in path.read_text()
    path.write_text(path.read_text().replace(FORWARD, FORWARD.replace("weights *", "weights * 1.0 *")))


def test_an_edited_coupler_runs_again_and_an_edited_comment_does_not(tiny, mine, capsys):
    flags = [*tiny, "--coupler", f"{mine}:NormCoupler"]
    assert main(flags) == 0
    folder, first = only_run(results_of(flags))
    mine.write_text(COUPLER.replace("import torch\n", "import torch  # the library\n"))
    capsys.readouterr()
    assert main(flags) == 0
    assert "is finished; --force runs it again" in capsys.readouterr().out

    edit(mine)
    assert main([*flags, "--keep-stale"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "it is stale, and kept by --keep-stale: the coupler's own code has changed since." in said
    assert only_run(results_of(flags))[1] == first
    assert main(flags) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"run {first['run_id']} is stale: the coupler's own code has changed since. It runs again" in said
    second = only_run(results_of(flags))[1]
    assert second["run_id"] == first["run_id"]
    assert second["environment"]["coupler_sha256"] != first["environment"]["coupler_sha256"]
    assert json.loads(folder.with_name(f"{folder.name}.1").joinpath("record.json").read_text()) == first


def test_a_change_of_the_project_makes_every_run_stale_and_no_hash_makes_none(tiny, monkeypatch, capsys):
    assert main(tiny) == 0
    first = only_run(results_of(tiny))[1]
    path = results_of(tiny) / "default" / first["run_id"] / "record.json"
    [run] = plan(tiny).runs
    assert look(run, frozenset(), force=False).flags is None
    monkeypatch.setattr(code, "project_sha256", lambda: "another")
    made = plan(tiny)
    assert (made.configurations[0].ended(), made.configurations[0].stale) == ([None], [True])
    assert made.configurations[0].ended(keep_stale=True) == ["ok"]
    assert look(made.runs[0], frozenset(), force=False).flags == ("--force",)
    assert look(made.runs[0], frozenset(), False, keep_stale=True).flags is None

    hashes = ("coupler_sha256", "project_sha256")
    published = {name: value for name, value in first["environment"].items() if name not in hashes}
    path.write_text(json.dumps(first | {"environment": published}))
    assert plan(tiny).configurations[0].stale == [None]
    assert look(plan(tiny).runs[0], frozenset(), force=False).flags is None
    capsys.readouterr()
    assert main(tiny) == 0
    assert "it has no code hashes, so it may be stale" in " ".join(capsys.readouterr().out.split())
    path.write_text(json.dumps(first))
    assert main(tiny) == 0
    assert only_run(results_of(tiny))[1]["environment"]["project_sha256"] == "another"


def plan(flags: list[str], *points: str):
    """Plan a sweep of one run with these flags of ``bench.run``."""
    rest = [flag for flag in flags if flag != "--no-plots"]
    given = dict(zip(rest[::2], rest[1::2], strict=True))
    places = {name: given.pop(f"--{name.replace('_', '-')}") for name in ("data_dir", "results_dir")}
    points = points or ("coupler=HGNN",)
    texts = [f"{name[2:].replace('-', '_')}={value}" for name, value in given.items()]
    sweep = parse_shorthand([*texts, "plots=false", *points], seeds=1, study="default")
    return make_plan(sweep, {**places, "device": "cpu"}, Identifier())


def test_a_checkpoint_of_other_code_is_refused_or_continued_in_words(tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        act_at_step(patch, 3, interrupt)
        assert main(tiny) == 130
    first = only_run(results_of(tiny))[1]
    assert first["status"] == "interrupted"
    monkeypatch.setattr(code, "project_sha256", lambda: "another")
    for flags, message in (
        ([], "was interrupted, and the project's code has changed since; --resume --keep-stale continues"),
        (["--resume"], "was made by other code: the project's code has changed since. --force starts again"),
    ):
        assert message in refusal(capsys, [*tiny, *flags])
    assert look(plan(tiny).runs[0], frozenset(), force=False).flags == ("--force",)
    assert look(plan(tiny).runs[0], frozenset(), False, keep_stale=True).flags == ("--resume",)
    assert main([*tiny, "--resume", "--keep-stale"]) == 0
    last = only_run(results_of(tiny))[1]
    assert last["status"] == "ok"
    assert last["environment"]["project_sha256"] == first["environment"]["project_sha256"]  # it stays stale


def test_a_home_folder_that_is_not_known_is_no_traceback_beside_other_runs():
    ours, theirs = f"{Path(__file__)}:C", f"~no-such-user/{Path(__file__).name}:C"
    refuse_another_file([ours], "1", [([theirs], "2")])
    with pytest.raises(Refused, match=r"this home folder is not known"):
        refuse_another_file([theirs], "1", [([ours], "2")])


@pytest.mark.slow
def test_two_files_with_one_class_are_refused_in_one_study(tiny, mine, capsys):
    other = mine.with_name("other.py")
    other.write_text(COUPLER)
    flags = [*tiny, "--coupler"]
    assert main([*flags, f"{mine}:NormCoupler"]) == 0
    assert main([*flags, f"{other}:NormCoupler"]) == 0  # the same code under another name
    edit(other)
    message = refusal(capsys, [*flags, f"{other}:NormCoupler"])
    assert "the study has runs of a class NormCoupler from" in message
    with pytest.raises(ValueError, match="is another file; give the class another name"):
        plan(tiny, f"coupler={mine}:NormCoupler,{other}:NormCoupler")
    assert main([*flags, f"{other}:NormCoupler", "--study", "another"]) == 0
