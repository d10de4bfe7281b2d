"""Answers of earlier batch-size searches, kept in the project's cache folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Any

import torch

from bench.data.cache import cache_folder, kept, key_of, replace_file
from bench.measure.code import code_hashes
from bench.measure.environment import device_name
from bench.measure.search_process import Request
from bench.training.batch_size import SearchResult


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
    place, known = place_of(request), kept(path, "batch size of an earlier search", _read) or []
    for found in known:
        if found["place"] == asdict(place):
            return SearchResult.from_record(found["result"]), True
    others = {found["place"]["device_name"] for found in known} - {place.device_name}
    if others and not any(found["place"]["device_name"] == place.device_name for found in known):
        say(f"the batch size was tuned before on {', '.join(sorted(others))}; searching again on this device")
    made = make()
    if made.of_the_moment or not keep:
        return made, False
    text = json.dumps([*known, {"place": asdict(place), "result": made.to_record()}][-20:])
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
