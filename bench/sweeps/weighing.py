"""How many times the memory or the time of one training another one takes; matches by time are kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

import torch

from bench.config import RunConfig
from bench.data.cache import cache_folder, kept, key_of, replace_file
from bench.device import cpu_threads
from bench.measure.environment import device_name
from bench.measure.expected import Training, step_time_ratio
from bench.measure.predict import CannotPredict
from bench.run.identity import config_dict
from bench.sweeps.local import slots_for
from bench.sweeps.matching import Match, Matched, matched
from bench.training.code import code_hashes
from gnnmoe.config import GNNMoEConfig, Refused

FORMAT = 2  # one more whenever the same match would be answered or stored differently


@dataclass(frozen=True)
class Scales:
    """Weighs models as the flags of a run would train them on this device."""

    config: RunConfig
    device: torch.device
    _peaks: dict[str, int] = field(default_factory=dict)

    def weigh(self, quantity: str, ours: GNNMoEConfig, theirs: GNNMoEConfig) -> float:
        """Return ours over theirs: predicted peaks for memory, steps timed in turn for time.

        Raises:
            Refused: a coupler's memory cannot be predicted.
        """
        if quantity == "memory":
            return self._peak(ours) / self._peak(theirs)
        with cpu_threads(threads_of_a_run(self.device)):
            return step_time_ratio(*(Training(model, self.config, self.device) for model in (ours, theirs)))

    def _peak(self, model: GNNMoEConfig) -> int:
        key = repr(model)
        if key not in self._peaks:
            try:
                self._peaks[key] = Training(model, self.config, self.device).peak_bytes()
            except CannotPredict as error:
                raise Refused(f"match memory: {error}") from error
        return self._peaks[key]


def threads_of_a_run(device: torch.device) -> int:
    """Return how many threads a run of a sweep has on this device: as its slot says, else as here."""
    (slot,) = slots_for(device.type, 1)
    return int(slot.get("OMP_NUM_THREADS", torch.get_num_threads()))


def match_here(model: GNNMoEConfig, match: Match, reference: GNNMoEConfig, scales: Scales) -> Matched:
    """Return the match of one model; one by time that was found before on this machine is found again.

    No two measurements are equal, and another width would be another run: a sweep could not go on where
    it was stopped. Kept in the project's cache folder, for model, device, torch, a run's threads and code.

    Raises:
        Refused: as ``matched``; or the answer cannot be kept.
    """
    if match.quantity != "time":
        return matched(model, match, reference, scales.weigh)
    path = cache_folder() / f"match-{_key(model, match, reference, scales)}.json"
    known = kept(path, "match by time", lambda file: Matched(**json.load(file)))
    if known is not None:
        return known
    found = matched(model, match, reference, scales.weigh)
    text = json.dumps(asdict(found)).encode()
    try:
        replace_file(path, lambda file: file.write(text))
    except OSError as error:
        raise Refused(
            f"a match by time cannot be kept in {path.parent} ({error.strerror}), so that the sweep could "
            "not go on where it is stopped; name another folder in GNNMOE_CACHE_DIR."
        ) from error
    return found


def _key(model: GNNMoEConfig, match: Match, reference: GNNMoEConfig, scales: Scales) -> str:
    groups = config_dict(scales.config)
    place = [device_name(scales.device), str(torch.__version__), threads_of_a_run(scales.device)]
    training = {**groups["training"], "seed": None}
    asked = [
        asdict(match),
        model.to_dict(),
        reference.to_dict(),
        training,
        groups["memory"],
        groups["execution"],
    ]
    code = [code_hashes(model), code_hashes(reference)]
    return key_of(FORMAT, *asked, *place, *code)
