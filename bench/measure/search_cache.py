"""Answers of earlier batch-size searches, kept in the project's cache folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bench.data.cache import cache_folder, replace_file
from bench.measure.code import code_hashes
from bench.measure.environment import device_name
from bench.measure.search_process import Request
from bench.training.batch_size import SearchResult

FORMAT = 1  # one more whenever the same request would be answered or stored differently


@dataclass(frozen=True)
class Place:
    """What an answer depends on besides the request: it is searched again wherever one of these differs."""

    device_name: str
    torch: str
    threads: int
    coupler_sha256: str
    project_sha256: str


def place_of(request: Request) -> Place:
    """Return where this process would search."""
    name = device_name(torch.device(request.setup.device))
    code = code_hashes(request.setup.model)
    return Place(name, str(torch.__version__), torch.get_num_threads(), **code)


def cached_search(
    request: Request, make: Callable[[], SearchResult], say: Callable[[str], object], *, keep: bool = True
) -> tuple[SearchResult, bool]:
    """Return the answer to ``request``, and whether it is one that was kept; else it is made, and kept
    where the caller may ``keep`` it.

    The key holds the model's config with its length, the dtype, the optimizer's settings, the limit
    and the search's own settings; beside it stands the ``Place``. An answer for the same key from
    another device is not used, and ``say`` is told so. Neither what ``make`` raises is kept, nor a
    search that ended for want of time or of free memory of the host.
    """
    path = cache_folder() / f"batch-size-{_key(request)}.json"
    place, known = place_of(request), _read(path)
    for found in known:
        if found["place"] == asdict(place):
            return SearchResult.from_record(found["result"]), True
    others = {found["place"]["device_name"] for found in known} - {place.device_name}
    if others and not any(found["place"]["device_name"] == place.device_name for found in known):
        say(f"the batch size was tuned before on {', '.join(sorted(others))}; searching again on this device")
    made = make()
    if made.of_the_moment or not keep:
        return made, False
    kept = [*known, {"place": asdict(place), "result": made.to_record()}]
    text = json.dumps(kept[-20:])
    try:
        replace_file(path, lambda file: file.write(text.encode()))  # pyright: ignore[reportArgumentType]
    except OSError as error:
        say(f"the batch size found cannot be kept in {path.parent} ({error.strerror})")
    return made, False


def _key(request: Request) -> str:
    known_by = {"format": FORMAT, "dtype": "float32", "optimizer": "fused AdamW", **asdict(request)}
    return sha256(json.dumps(known_by, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the answers in a file; none where there is no file or it is broken."""
    try:
        known = json.loads(path.read_text())
        return [found for found in known if SearchResult.from_record(found["result"]) and found["place"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
