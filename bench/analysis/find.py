"""Studies and runs by name: a folder, a study of the results folder, or the beginning of a run's id."""

from __future__ import annotations

import re
from pathlib import Path

from bench.analysis.study import Run
from bench.record import read_record
from gnnmoe.config import Refused, unknown_name

REFERENCE = "reference"  # results/reference holds studies, as results does


def studies_in(results_dir: Path) -> list[Path]:
    """Return the folders of studies: those of the results folder and of its folder of reference studies."""
    folders = [*results_dir.glob("*"), *results_dir.glob(f"{REFERENCE}/*")]
    return sorted(path for path in folders if path.is_dir() and any(path.glob("*/record.json")))


def study_folder(name: str, results_dir: Path) -> Path | None:
    """Return the folder of a study by its name or path, None where there is none."""
    places = [results_dir / name, results_dir / REFERENCE / name, Path(name)]
    known = [path for path in places if name and path.is_dir() and any(path.glob("*/record.json"))]
    return known[0] if known else None


def the_study(name: str, results_dir: Path) -> Path:
    """Return the folder of a study by its name or path.

    Raises:
        Refused: there is none; names those there are.
    """
    found = study_folder(name, results_dir)
    if found is None:
        names = [path.relative_to(results_dir).as_posix() for path in studies_in(results_dir)]
        raise Refused(f"{unknown_name('study', name, names)} Studies are looked for in {results_dir}.")
    return found


def find_runs(name: str, results_dir: Path) -> list[Run]:
    """Return the one run whose id begins with ``name``, in any study; ``STUDY/ID`` says in which.

    Raises:
        Refused: no run has it, or several have, or its record cannot be read.
    """
    study, _, run_id = name.rpartition("/")
    folder = study_folder(study, results_dir)
    studies = studies_in(results_dir) if not study else [folder] if folder else []
    wanted = re.fullmatch(r"[0-9a-f]{2,12}(\.\d+)?", run_id)
    folders = [path for place in studies if wanted for path in sorted(place.glob(f"{run_id}*"))
               if (path / "record.json").is_file()]  # fmt: skip
    exact = [path for path in folders if path.name == run_id]
    current = exact or [path for path in folders if "." not in path.name] or folders
    if not current:
        raise Refused(
            f"no study and no run in {results_dir} is called {name!r}; of the 12 hex digits of a run's id "
            "the first few are enough. python -m bench.report ls lists what there is."
        )
    if len(current) > 1:
        places = ", ".join(f"{path.parent.name}/{path.name}" for path in current[:5])
        raise Refused(f"{name!r} stands for {len(current)} runs: {places}{', …' * (len(current) > 5)}; "
                         "name one of them so.")  # fmt: skip
    return [Run(current[0], read_record(current[0]))]
