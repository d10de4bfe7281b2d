"""What configurations are called in tables and plots: what is special about each, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.config import ExecutionConfig
from bench.record import RecordedConfig
from gnnmoe.config import GNNMoEConfig

Settings = dict[str, Any]  # the value of every field of a config that can change a number, but the seed

OF_HYPERGRAPHS = ("hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights")
ONLY_IF_NEEDED = (
    "ffn_dim",
    "vocab_size",
    "coupler_options",
)  # follow from a match, from the data, from options
OF_MEMORY = ("micro_batch_size", "tune_batch_size", "fit_shape", "control_memory")  # where asked for
NO_SETTINGS = (
    "seed", "audit", "marginal", "profile", "allow_failed_check", "min_steps_per_epoch", "strict_curriculum",
)  # fmt: skip
"""Fields that the runs of one configuration may differ in: they are in no identity."""
Key = tuple[str, str | None]
"""The configuration by its hash, and the hash of the coupler's code, None where it is not known."""
DIGITS = 8
"""Of a hash in a label; more where they do not tell it apart."""
SHORT = {
    "hgnn_learnable_edge_weights": {True: "learned weights", False: "no weights"},
    "initialization": {"original": "original start"},
}


def settings_of(config: RecordedConfig) -> Settings:
    """Return the fields of a record's config that make a configuration: not places, seed, what is besides.

    Of the coupler's options those that count are left, by name and without their owner.
    """
    groups = [config.model, config.data, config.training, config.measure]
    groups.append({name: value for name, value in config.memory.items() if value and name in OF_MEMORY})
    plain = asdict(ExecutionConfig())  # named where it is another one
    groups.append({name: value for name, value in config.execution.items() if value != plain[name]})
    settings = {name: value for fields in groups for name, value in fields.items() if name not in NO_SETTINGS}
    if settings.get("initialization") == GNNMoEConfig.initialization:
        del settings["initialization"]
    settings["coupler_option"] = _options(settings.get("coupler_option") or (), settings["coupler_type"])
    return settings


def labels(configurations: Sequence[Settings], keys: Sequence[Key]) -> list[str]:
    """Return a label for each configuration: its coupler, and the fields in which it differs from others.

    Fields of hypergraphs are named where they vary among configurations of the same coupler; all others
    where they vary at all. Where two labels are still equal, every field in which those two differ is named.
    What then is equal, though ``keys`` differ, is told apart by their first digits: by the code of the
    coupler where the configuration is the same, else by the configuration. Equal keys have equal labels.
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
    texts: dict[Key, str] = {}  # one a key, also where two tables have it
    for key, text in zip(keys, found, strict=True):
        texts.setdefault(key, text)
    marked = _told_apart(texts)
    return [marked[key] for key in keys]


def _told_apart(texts: Mapping[Key, str]) -> dict[Key, str]:
    """Return a label for each key: its text, with digits of the key where several have the text."""
    found: dict[Key, str] = {}
    for key, text in texts.items():
        alike = [other for other in texts if texts[other] == text]
        parts = [text]
        if len({configuration for configuration, _ in alike}) > 1:
            parts.append(f"configuration {_digits(key[0], [other[0] for other in alike])}")
        codes = [code for configuration, code in alike if configuration == key[0]]
        if len(codes) > 1:
            parts.append(f"code {_digits(key[1], codes)}")
        found[key] = " · ".join(parts)
    for key, label in list(found.items()):
        if list(found.values()).count(label) > 1:  # another text says the digits of this key
            found[key] = f"{texts[key]} · configuration {key[0]} · code {key[1]}"
    return found


def _digits(text: str | None, among: Iterable[str | None]) -> str:
    """Return the first digits of a hash, as many as tell it from the others."""
    if text is None:
        return "not known"
    others = {other for other in among if other not in (None, text)}
    length = DIGITS
    while length < len(text) and any(other.startswith(text[:length]) for other in others):
        length += 1
    return text[:length]


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
