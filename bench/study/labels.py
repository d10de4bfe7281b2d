"""Labels of configurations: the name of the coupler, and the flags in which a configuration differs.

The plan of a sweep and the report of its study both use ``labels``, so they name a configuration alike.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.config import ExecutionConfig, FlagTable
from bench.record import OF_CLASSES, RecordedConfig
from gnnmoe.config import GNNMoEConfig
from gnnmoe.discovery import short_name
from gnnmoe.hypergraph.strategies import place_of

Key = tuple[str, str | None]
"""The hash of the configuration and the hash of the coupler's code; None where that hash is not known."""

OPTIONS, STRATEGY = "coupler_option", "static_hyperedge_strategy"
OF_HYPERGRAPHS = ("hgnn_conv_type", STRATEGY, "hgnn_learnable_edge_weights")
"""Flags that only the couplers with a hypergraph read."""
DERIVED = (
    "ffn_dim vocab_size coupler_options warmup_steps eval_every speed_warmup_steps speed_steps"
).split()
"""Fields that follow from --match, from the data, from the coupler's options or from the length of the
training, or change no loss: named only if needed."""
OF_MEMORY = ("micro_batch_size", "tune_batch_size", "fit_shape", "control_memory")
"""Memory flags that are part of a configuration where they are set."""
IN_NO_IDENTITY = (
    "seed audit marginal profile speed allow_failed_check min_steps_per_epoch strict_curriculum"
).split()
"""Fields in which the runs of one configuration may differ."""
DIGITS = 8
"""Digits of a hash in a label; a label has more digits where 8 do not tell two hashes apart."""
OF_SAMPLES = ("num_train_samples", "num_eval_samples")
"""Fields of which None means all."""
SHORT = {
    "hgnn_learnable_edge_weights": {True: "learned weights", False: "no weights"},
    "initialization": {"original": "original start"},
}


def flags_that_count(config: RecordedConfig) -> FlagTable:
    """Return the fields of a record's config that make a configuration, without places and the seed.

    The options of the coupler are listed by name, without the name of the coupler.
    """
    groups = [config.model, config.data, config.training, config.measure]
    groups.append({name: value for name, value in config.memory.items() if value and name in OF_MEMORY})
    plain = asdict(ExecutionConfig())
    groups.append({name: value for name, value in config.execution.items() if value != plain[name]})
    found = {name: value for group in groups for name, value in group.items() if name not in IN_NO_IDENTITY}
    if found.get("initialization") == GNNMoEConfig.initialization:
        del found["initialization"]
    found[OPTIONS] = _options(found.get(OPTIONS) or (), found["coupler_type"])
    return found


def _options(options: Iterable[Any], coupler: str) -> list[str]:
    """Return the options of this coupler as ``name=value``, sorted by name.

    If an option is given several times, the last value counts, and an option without a coupler's name wins.
    The class of a coupler from a file may have a name of its own, so options for other names are kept whole.
    """
    parted = [_parted(str(option)) for option in options]
    owned = {
        f"{owner}.{name}": value
        for owner, name, value in parted
        if ":" in coupler and owner not in (None, coupler)
    }
    owned |= {name: value for owner, name, value in parted if owner == coupler}
    owned |= {name: value for owner, name, value in parted if owner is None}
    return [f"{name}={value}" for name, value in sorted(owned.items())]


def _parted(option: str) -> tuple[str | None, str, str]:
    """Return coupler, name and value of ``name=value`` or ``Coupler.name=value``; a coupler can be a path."""
    key, _, value = option.partition("=")
    owner, dot, name = key.rpartition(".")
    return owner if dot else None, name, value


def name_parts(config: RecordedConfig) -> list[str]:
    """Return the coupler of a run, its layer and strategy where it is HGNN, and the options that were given.

    A thing from a file goes by its own name, without its place.
    """
    model = config.model
    parts = {name: model[name] for name in ("coupler_type", "hgnn_conv_type", STRATEGY)}
    if model["coupler_type"] != "HGNN":
        parts = {"coupler_type": model["coupler_type"]}
    parts[OPTIONS] = _options(model[OPTIONS], model["coupler_type"])
    return [part_text(name, value) for name, value in parts.items() if value]


def files_named(config: RecordedConfig) -> str:
    """Return the files of the coupler, the layer and the strategy in words; empty if none is from a file."""
    values = [str(config.model.get(name, "")) for name in (*OF_CLASSES, STRATEGY)]
    found = [value.partition(".py:")[0] + ".py" for value in values if ".py:" in value]
    return " and ".join(dict.fromkeys(found))


def labels(configurations: Sequence[FlagTable], keys: Sequence[Key]) -> list[str]:
    """Return a label for each configuration: its coupler, and the fields that differ between configurations.

    1. A field of hypergraphs is named where it varies among the configurations of one coupler. Any other
       field is named where it varies at all.
    2. Where labels are still equal, every field in which these configurations differ is named.
    3. Where labels are still equal although the keys differ, the first digits of the keys are added.

    Configurations with equal keys have equal labels.
    """
    by_coupler: dict[str, list[FlagTable]] = defaultdict(list)
    for flags in configurations:
        by_coupler[flags["coupler_type"]].append(flags)
    among = {coupler: set(_varying(found)) for coupler, found in by_coupler.items()}
    everywhere = [name for name in _varying(configurations) if name not in DERIVED]
    named = [
        [name for name in everywhere if name not in OF_HYPERGRAPHS or name in among[flags["coupler_type"]]]
        for flags in configurations
    ]
    found = [_label(flags, names) for flags, names in zip(configurations, named, strict=True)]
    places_of: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(found):
        places_of[label].append(place)
    for places in places_of.values():
        more = _varying([configurations[place] for place in places])
        for place in places:
            found[place] = _label(configurations[place], [*named[place], *more])
    texts: dict[Key, str] = {}
    for key, text in zip(keys, found, strict=True):
        texts.setdefault(key, text)
    marked = _told_apart(texts)
    return [marked[key] for key in keys]


def _varying(configurations: Sequence[FlagTable]) -> list[str]:
    names = dict.fromkeys(name for flags in configurations for name in flags)
    return [name for name in names if len({repr(flags.get(name)) for flags in configurations}) > 1]


def _label(flags: FlagTable, names: Sequence[str]) -> str:
    parts = [part_text("coupler_type", flags["coupler_type"])]
    for name in dict.fromkeys(names):
        if name != "coupler_type" and name in flags and (text := part_text(name, flags[name])):
            parts.append(text)
    return " · ".join(parts)


def part_text(name: str, value: Any) -> str:
    """Return a field and its value as a part of a label: ``learning_rate 0.004``, ``learned weights``.

    The text is empty for a field that was not given, such as ``max_steps`` beside ``epochs``.
    """
    if value is None:
        return f"{name} all" if name in OF_SAMPLES else ""
    if name in SHORT:
        return SHORT[name].get(value, str(value))
    if name in OF_CLASSES:
        return short_name(str(value))
    if name == STRATEGY and (place := place_of(str(value))):
        return short_name(place) + value[len(place) :]
    if name == OPTIONS:
        return " ".join("=".join(_parted(text)[1:]) for text in value)
    return value if isinstance(value, str) else f"{name} {value}"


def _told_apart(texts: Mapping[Key, str]) -> dict[Key, str]:
    """Return a label for each key: its text, with digits of the key where several keys have the text."""
    keys_of: dict[str, list[Key]] = defaultdict(list)
    for key, text in texts.items():
        keys_of[text].append(key)
    found: dict[Key, str] = {}
    for key, text in texts.items():
        parts, alike = [text], keys_of[text]
        if len({configuration for configuration, _ in alike}) > 1:
            parts.append(f"configuration {_digits(key[0], [other[0] for other in alike])}")
        codes = [code for configuration, code in alike if configuration == key[0]]
        if len(codes) > 1:
            parts.append(f"code {_digits(key[1], codes)}")
        found[key] = " · ".join(parts)
    times = Counter(found.values())
    for key, label in found.items():
        if times[label] > 1:  # the text of another configuration ends with the digits of this key
            times[label] -= 1
            found[key] = f"{texts[key]} · configuration {key[0]} · code {key[1]}"
    return found


def _digits(text: str | None, among: Iterable[str | None]) -> str:
    """Return the first digits of a hash, as many as tell it from the other hashes."""
    if text is None:
        return "not known"
    others = {other for other in among if other not in (None, text)}
    length = DIGITS
    while length < len(text) and any(other.startswith(text[:length]) for other in others):
        length += 1
    return text[:length]
