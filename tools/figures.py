"""Print figures of the structure: how many files and lines there are, how many files one run passes through.

    python tools/figures.py             in the root of the repository
    python tools/figures.py --harness   only the time of the harness over that of a bare loop (S5), and S6

Code lines are lines without blanks, comments and docstrings. A file counts as entered when a function of it
is called while ``bench.run`` trains four steps on the embedded text, with plots. An import circle is a group
of files that import one another, wherever the imports stand.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import runpy
import statistics
import sys
import tempfile
import threading
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

REPOSITORY = Path(__file__).resolve().parents[1]
PRODUCT, TESTS = ("gnnmoe", "bench"), ("tests",)
RUN = "bench.run --coupler HGNN --data-source embedded --max-steps 4 --eval-every 2 --num-eval-samples 8"
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}  # fmt: skip


def files(folders: tuple[str, ...]) -> list[Path]:
    """Return the Python files of these folders."""
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def code_lines(path: Path) -> set[int]:
    """Return the numbers of a file's code lines."""
    source = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None  # docstrings, and those of variables
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines -= set(range(value.lineno, (value.end_lineno or 0) + 1))
    return lines


def lines_of(path: Path, *kinds: type[ast.AST]) -> Iterator[int]:
    """Yield how many code lines each node of these kinds has."""
    lines = code_lines(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds):
            yield len(lines & set(range(node.lineno, node.end_lineno + 1)))  # pyright: ignore


def spread(values: list[int]) -> str:
    """Return median, 90th percentile and maximum."""
    values = sorted(values)
    return f"{statistics.median(values):.0f} / {values[int(0.9 * (len(values) - 1))]} / {values[-1]}"


def circles() -> list[list[str]]:
    """Return the groups of files of the product that import one another."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
               for path in files(PRODUCT)}  # fmt: skip
    reached: dict[str, set[str]] = {}
    for name, path in modules.items():
        reached[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                reached[name] |= inside or {node.module}
            elif isinstance(node, ast.Import):
                reached[name] |= {alias.name for alias in node.names} & modules.keys()
    for middle in modules:  # Warshall
        for found in reached.values():
            if middle in found:
                found |= reached[middle]
    groups = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in modules}
    return [list(group) for group in sorted(groups) if len(group) > 1]


def entered() -> tuple[set[str], set[CodeType]]:
    """Return the files of the product that one run enters, and the functions that it calls."""
    called: set[CodeType] = set()

    def note(frame, event, _):
        if event == "call":
            called.add(frame.f_code)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.environ["GNNMOE_CACHE_DIR"] = f"{folder}/cache"
        os.environ.pop("GNNMOE_DATA_DIR", None)
        sys.path[0] = str(REPOSITORY)
        sys.argv = [*RUN.split(), "--results-dir", f"{folder}/results"]
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            runpy.run_module("bench.run", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code:
                raise
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # pyright: ignore
    own = tuple(str(REPOSITORY / folder) + os.sep for folder in PRODUCT)
    functions = {code for code in called if code.co_filename.startswith(own)
                 and code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")}  # fmt: skip
    return {code.co_filename for code in functions}, functions


def harness() -> None:
    """Print the time of a step of the harness over one of a bare loop, and the share of fetching a batch."""
    sys.path[0] = str(REPOSITORY)
    import torch

    from bench.config import PlacesConfig
    from bench.speed.machine import Machine
    from bench.speed.suites import cpu_jobs
    from tools.speed_targets import verdicts

    [job] = [job for job in cpu_jobs(PlacesConfig()) if job.name == "harness"]
    for found in verdicts(job.rows(Machine(torch.device("cpu")))):
        if found.value is not None:
            print(f"{found.target.name} {found.target.measure}: {found.value:.4f} {found.how}")


def main() -> None:
    """Print every figure in a line of its own."""
    if sys.argv[1:] == ["--harness"]:
        return harness()
    product, tests = files(PRODUCT), files(TESTS)
    imports = [sum(lines_of(path, ast.Import, ast.ImportFrom)) for path in product]
    functions = [length for path in product for length in lines_of(path, ast.FunctionDef)]
    lengths = [len(path.read_text().splitlines()) for path in product]
    found, groups = entered(), circles()
    print(f"files entered by one run: {len(found[0])}, functions called: {len(found[1])}")
    print(f"files at the root of bench/: {len(list((REPOSITORY / 'bench').glob('*.py')))}")
    print(f"product: {len(product)} files, {sum(len(code_lines(path)) for path in product):,} code lines")
    print(f"tests: {len(tests)} files, {sum(len(code_lines(path)) for path in tests):,} code lines")
    print(f"import lines of the product: {sum(imports):,}")
    print(f"lines of a file: {spread(lengths)} (median / 90th percentile / maximum)")
    print(f"code lines of a function: {spread(functions)}, {len(functions):,} functions")
    print(f"dict[str, Any]: {sum(path.read_text().count('dict[str, Any]') for path in product)}")
    print(f"import circles: {len(groups)}", *(" ↔ ".join(group) for group in groups), sep="\n  ")


if __name__ == "__main__":
    main()
