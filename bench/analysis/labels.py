"""What configurations are called in tables and plots: what is special about each, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Settings = dict[str, Any]  # the value of every field of a config that can change a number, but the seed

OF_HYPERGRAPHS = ("hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights")
ONLY_IF_NEEDED = (
    "ffn_dim",
    "vocab_size",
    "coupler_options",
)  # follow from a match, from the data, from options
SHORT = {"hgnn_learnable_edge_weights": {True: "learned weights", False: "no weights"}}


def settings_of(config: dict[str, Any]) -> Settings:
    """Return the fields of a record's config that make a configuration: all but seed and places."""
    groups = [fields for group, fields in config.items() if group != "places"]
    settings = {name: value for fields in groups for name, value in fields.items() if name != "seed"}
    coupler = settings["coupler_type"]
    settings["coupler_option"] = [text for text in map(str, settings.get("coupler_option") or ())
                                  if _concerns(text, coupler)]  # fmt: skip
    return settings


def labels(configurations: Sequence[Settings]) -> list[str]:
    """Return a label for each configuration: its coupler, and the fields in which it differs from others.

    Fields of hypergraphs are named where they vary among configurations of the same coupler; all others
    where they vary at all. Where two labels are still equal, every field in which those two differ is named.
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
    return found


def _label(settings: Settings, fields: Sequence[str]) -> str:
    parts = [str(settings["coupler_type"])]
    for name in dict.fromkeys(fields):
        if name != "coupler_type" and (text := _part(name, settings.get(name))):
            parts.append(text)
    return " · ".join(parts)


def _part(name: str, value: Any) -> str:
    if name in SHORT:
        return SHORT[name].get(value, str(value))
    if name == "coupler_option":
        return " ".join(text.partition(".")[2] if "." in text.partition("=")[0] else text for text in value)
    if value is None or isinstance(value, bool | int | float):
        return f"{name} {value}"
    return str(value) if isinstance(value, str) else f"{name} {value}"


def _varying(configurations: Sequence[Settings]) -> list[str]:
    names = dict.fromkeys(name for settings in configurations for name in settings)
    return [name for name in names if len({repr(settings.get(name)) for settings in configurations}) > 1]


def _concerns(option: str, coupler: str) -> bool:
    """Whether an option, ``name=value`` or ``Coupler.name=value``, is one of this coupler's."""
    owner, dot, _ = option.partition("=")[0].rpartition(".")
    return not dot or owner == coupler
