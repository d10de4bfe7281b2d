"""What configurations are called in tables and plots: what is special about each, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from bench.config import ExecutionConfig
from gnnmoe.config import GNNMoEConfig

Settings = dict[str, Any]  # the value of every field of a config that can change a number, but the seed

OF_HYPERGRAPHS = ("hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights")
ONLY_IF_NEEDED = (
    "ffn_dim",
    "vocab_size",
    "coupler_options",
)  # follow from a match, from the data, from options
OF_MEMORY = ("micro_batch_size", "tune_batch_size", "fit_shape", "control_memory")  # where asked for
NO_SETTINGS = ("seed", "audit", "marginal", "profile")  # of the runs of one configuration, some may have them
SHORT = {
    "hgnn_learnable_edge_weights": {True: "learned weights", False: "no weights"},
    "initialization": {"original": "original start"},
}


def settings_of(config: dict[str, Any]) -> Settings:
    """Return the fields of a record's config that make a configuration: not places, seed, what is besides.

    Of the coupler's options those that count are left, by name and without their owner.
    """
    groups = [fields for group, fields in config.items() if group not in ("places", "memory", "execution")]
    groups.append(
        {name: value for name, value in config.get("memory", {}).items() if value and name in OF_MEMORY}
    )
    plain = asdict(ExecutionConfig())  # as all records are that say nothing of it
    groups.append(
        {name: value for name, value in config.get("execution", {}).items() if value != plain[name]}
    )
    settings = {name: value for fields in groups for name, value in fields.items() if name not in NO_SETTINGS}
    if settings.get("initialization") == GNNMoEConfig.initialization:  # as all records are that lack it
        del settings["initialization"]
    settings["coupler_option"] = _options(settings.get("coupler_option") or (), settings["coupler_type"])
    return settings


def labels(configurations: Sequence[Settings]) -> list[str]:
    """Return a label for each configuration: its coupler, and the fields in which it differs from others.

    Fields of hypergraphs are named where they vary among configurations of the same coupler; all others
    where they vary at all. Where two labels are still equal, every field in which those two differ is named;
    what then is equal though the configurations are not has a number. Equal configurations have equal labels.
    """
    couplers = dict.fromkeys(settings["coupler_type"] for settings in configurations)
    among = {name: _varying([s for s in configurations if s["coupler_type"] == name]) for name in couplers}
    everywhere = [name for name in _varying(configurations) if name not in ONLY_IF_NEEDED]
    named = [
        [name for name in everywhere if name not in OF_HYPERGRAPHS or name in among[s["coupler_type"]]]
        for s in configurations
    ]
    found = [_label(settings, fields) for settings, fields in zip(configurations, named, strict=True)]
    for label in {label for label in found if found.count(label) > 1}:
        places = [place for place, other in enumerate(found) if other == label]
        more = _varying([configurations[place] for place in places])
        for place in places:
            found[place] = _label(configurations[place], [*named[place], *more])
    return _numbered(found, configurations)


def _numbered(found: Sequence[str], configurations: Sequence[Settings]) -> list[str]:
    """Return the labels, with a number behind those that two different configurations would share."""
    own: dict[str, str] = {}  # configuration → label
    for label, settings in zip(found, configurations, strict=True):
        key = json.dumps(settings, sort_keys=True, default=str)
        number, name = 1, label
        while key not in own and name in own.values():
            number += 1
            name = f"{label} ({number})"
        own.setdefault(key, name)
    return [own[json.dumps(settings, sort_keys=True, default=str)] for settings in configurations]


def _label(settings: Settings, fields: Sequence[str]) -> str:
    parts = [str(settings["coupler_type"])]
    for name in dict.fromkeys(fields):
        if name != "coupler_type" and name in settings and (text := _part(name, settings.get(name))):
            parts.append(text)
    return " · ".join(parts)


def _part(name: str, value: Any) -> str:
    if name in SHORT:
        return SHORT[name].get(value, str(value))
    if name == "coupler_option":
        return " ".join("=".join(_parted(text)[1:]) for text in value)
    if value is None or isinstance(value, bool | int | float):
        return f"{name} {value}"
    return str(value) if isinstance(value, str) else f"{name} {value}"


def _varying(configurations: Sequence[Settings]) -> list[str]:
    names = dict.fromkeys(name for settings in configurations for name in settings)
    return [name for name in names if len({repr(settings.get(name)) for settings in configurations}) > 1]


def _options(options: Iterable[Any], coupler: str) -> list[str]:
    """Return the options of this coupler as ``name=value``, by name; one without owner wins, then the last.

    A coupler of a file also has a name that its path does not tell: it keeps what may be its own, with owner.
    """
    parted = [_parted(str(option)) for option in options]
    owned = {f"{owner}.{name}": value for owner, name, value in parted
             if ":" in coupler and owner not in (None, coupler)}  # fmt: skip
    owned |= {name: value for owner, name, value in parted if owner == coupler}
    owned |= {name: value for owner, name, value in parted if owner is None}
    return [f"{name}={value}" for name, value in sorted(owned.items())]


def _parted(option: str) -> tuple[str | None, str, str]:
    """Return owner, name and value of ``name=value`` or ``Coupler.name=value``; an owner can be a path."""
    key, _, value = option.partition("=")
    owner, dot, name = key.rpartition(".")
    return owner if dot else None, name, value
