"""Whether a record holds what the analysis reads, so that a damaged one is told and not stumbled over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

from bench.measure.quantity import is_measured
from bench.records.schema import KEYS, SCHEMA_VERSION
from gnnmoe.config import Refused

CODE = ("project_sha256", "coupler_sha256", "code_sha256", "git_commit", "git_changes_sha256")
SUMS = ("unigram_nll_sum", "kneser_ney_trigram_nll_sum")


@dataclass(frozen=True)
class _Place:
    """A value of a record, and where it stands: quality.validation.tokens."""

    key: str
    value: Any

    @property
    def measured(self) -> bool:
        return is_measured(self.value)

    def __getitem__(self, name: str) -> _Place:
        place = f"{self.key}.{name}" if self.key else name
        if name not in self.fields():
            raise Refused(f"it lacks {place}")
        return _Place(place, self.value[name])

    def has(self, name: str) -> bool:
        """Whether there is such a field, and it is not null."""
        return self.fields().get(name) is not None

    def fields(self) -> dict[str, Any]:
        return self.value if isinstance(self.value, dict) else self.refuse("an object")

    def list(self) -> list[Any]:
        return self.value if isinstance(self.value, list) else self.refuse("a list")

    def number(self, positive: bool = False) -> None:
        known = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not known or not _is_finite(self.value) or (positive and self.value <= 0):
            self.refuse("a number above 0" if positive else "a finite number")

    def count(self) -> None:
        if type(self.value) is not int or self.value < 0:
            self.refuse("a whole number, 0 or more")

    def text(self, optional: bool = False) -> None:
        if not isinstance(self.value, str) and not (optional and self.value is None):
            self.refuse("a text")

    def refuse(self, must: str) -> NoReturn:
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
        raise Refused(f"{self.key or 'it'} is {shown}; it must be {must}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False


def check_record(record: Any) -> None:
    """Refuse a record that lacks something that the analysis reads.

    Raises:
        Refused: names the key, what it is and what it must be.
    """
    place = _Place("", record)
    version = place.fields().get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        place["schema_version"].refuse(f"{SCHEMA_VERSION!r}, the only one that this program reads")
    missing = [key for key in KEYS if key not in place.fields()]
    if missing:
        raise Refused(f"it lacks {', '.join(missing)}: it is of another schema")
    for name in ("run_id", "configuration", "status", "command"):
        place[name].text()
    for name in ("error", "run_name"):
        place[name].text(optional=True)
    if type(record["seed"]) is not int:
        place["seed"].refuse("a whole number")
    _check_config(place["config"])
    _check_origin(place)
    _check_sizes(place)
    _check_quality(place["quality"])
    _check_cost(place)
    _check_communication(place["communication"])


def _check_config(config: _Place) -> None:
    for name in config.fields():
        config[name].fields()
    config["model"]["coupler_type"].text()
    config["model"]["num_experts"].number()
    if config["model"].has("coupler_option"):
        config["model"]["coupler_option"].list()
    config["training"].fields()


def _check_origin(record: _Place) -> None:
    """Check what says when, where and with what a run was made."""
    time, data, environment, gate = (record[key] for key in ("time", "data", "environment", "gate"))
    if time.has("start"):
        time["start"].text()
    if time.has("seconds"):
        _numbers(time["seconds"])
    if time.has("parts"):
        for number, value in enumerate(time["parts"].list()):
            part = _Place(f"time.parts.{number}", value)
            part["command"].text()
            part["start"].text()
            part["end"].text(optional=True)
            _numbers(part["seconds"])
    for name in ("name", "config_name", "tokenizer", "sha256"):
        if data.has(name):
            data[name].text()
    if environment.measured:
        environment["device_type"].text()
        environment["device_name"].text()
        if environment["threads"].value is not None:
            environment["threads"].number()
        for name in CODE:
            if environment.has(name):
                environment[name].text()
        if environment.has("packages"):
            environment["packages"].fields()
    if gate.measured:
        gate["passed"]
        for name in gate["checks"].fields():
            gate["checks"][name].fields()


def _check_sizes(record: _Place) -> None:
    """Check the size of the model, and what was used in its training."""
    parameters, flops, used, tuned = (record[key] for key in ("parameters", "flops", "used", "tuned"))
    if parameters.measured:
        parameters["total"].number(positive=True)
        parameters["coupler"].number()
    if flops.measured:
        flops["training_flops_per_token"].number()
    if tuned.measured:
        tuned.fields()
    if used.measured:
        used["batch_shapes"].fields()
        used["steps"].number()
        epochs = used["ledger"]["epochs"]
        for number, epoch in enumerate(epochs.list()):
            _Place(f"{epochs.key}.{number}", epoch)["batch_size"].number(positive=True)


def _check_quality(quality: _Place) -> None:
    if not quality.measured:
        return
    for split in (quality["validation"], quality["test"]):
        if split.measured:
            split["nll_sum"].number()
            for name in ("tokens", "length", "stride"):
                split[name].number(positive=True)
            for name in SUMS:
                if name in split.fields():
                    split[name].number()
            split["unknown_words"].count()
            for name in ("words", "bytes"):
                if name in split.fields():
                    split[name].count()
    if quality.has("best_step"):
        quality["best_step"].number()


def _check_cost(record: _Place) -> None:
    speed, memory = record["speed"], record["memory"]
    if speed.measured:
        _check_times(speed, "step_seconds", "step_tokens")
        if speed.has("fetch_seconds"):
            _check_times(speed, "fetch_seconds")
        if speed.has("matrix_flops_per_second") and speed["matrix_flops_per_second"].measured:
            speed["matrix_flops_per_second"].number(positive=True)
        if speed.has("marginal") and speed["marginal"].measured:
            _check_times(speed["marginal"], "step_seconds", "reference_step_seconds")
            for name in ("parameters", "training_flops_per_token"):
                speed["marginal"][name].number()
            if speed["marginal"]["peak_allocated_bytes"].measured:
                speed["marginal"]["peak_allocated_bytes"].number()
    if memory.measured and memory["peak_allocated_bytes"].measured:
        memory["peak_allocated_bytes"].number(positive=True)


def _check_times(place: _Place, first: str, *others: str) -> None:
    """Check lists of positive numbers, not empty and of one length."""
    lists = [place[name] for name in (first, *others)]
    for one in lists:
        for value in one.list() or one.refuse("a list of numbers, not empty"):
            _Place(f"{one.key}, a part,", value).number(positive=True)
        if len(one.value) != len(lists[0].value):
            one.refuse(f"as long as {lists[0].key}, {len(lists[0].value)}")


def _check_communication(communication: _Place) -> None:
    if not communication.measured:
        return
    for name in communication.fields():
        layer = communication[name]
        if not name.removeprefix("layer_").isdecimal():
            layer.refuse("under the name of a layer, layer_0")
        for part in ("hyperedge_weights", "mixing"):
            if part in layer.fields():
                _numbers(layer[part])


def _numbers(place: _Place) -> None:
    for name in place.fields():
        place[name].number()
