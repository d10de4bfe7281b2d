"""Which couplers at which sizes: what ``--couplers`` and ``--sizes`` say. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gnnmoe.config import GNNMoEConfig, Refused, unknown_name

LETTERS = {"E": "num_experts", "D": "embed_dim", "B": "batch", "L": "max_seq_length"}


@dataclass(frozen=True)
class Size:
    """A model's config at one size, and the sequences of a batch."""

    config: GNNMoEConfig
    batch: int

    def __str__(self) -> str:
        values = {name: getattr(self.config, field, self.batch) for name, field in LETTERS.items()}
        return ", ".join(f"{name} {value}" for name, value in values.items())


def sizes(text: str | None, config: GNNMoEConfig, batch: int) -> list[Size]:
    """Return the sizes of ``E=4,D=256,B=32,L=128;E=8``; what one does not name is as in ``config``.

    Raises:
        Refused: saying which part was wrong and what is allowed.
    """
    if text is None:
        return [Size(config, batch)]
    return [_size(part.strip(), config, batch) for part in text.split(";")]


def _size(part: str, config: GNNMoEConfig, batch: int) -> Size:
    how = "write sizes as E=4,D=256,B=32,L=128, several with ; between them"
    values: dict[str, int] = {}
    for one in part.split(","):
        letter, equals, number = (piece.strip() for piece in one.partition("="))
        if not equals:
            raise Refused(f"--sizes: {one.strip() or part!r} is no size; {how}.")
        if letter not in LETTERS:
            raise Refused(f"--sizes: {unknown_name('size', letter, LETTERS)}")
        if letter in values:
            raise Refused(f"--sizes: {letter} stands twice in {part!r}.")
        if not number.isdecimal() or int(number) < 1:
            raise Refused(f"--sizes: {letter} is {number!r}; it must be a whole number of at least 1.")
        values[letter] = int(number)
    named = {LETTERS[letter]: value for letter, value in values.items()}
    batch = named.pop("batch", batch)
    return Size(replace(config, **named), batch)


def subjects(text: str | None, config: GNNMoEConfig) -> list[tuple[str, GNNMoEConfig]]:
    """Return the couplers of ``a,b,c``, or of ``all``, under their names; None is the config's own.

    A name is what ``--coupler`` takes, or that of a hypergraph layer of HGNN's.

    Raises:
        Refused: naming the unknown one and those there are.
    """
    from gnnmoe.couplers.hgnn import CONV_TYPES
    from gnnmoe.couplers.registry import coupler_names

    if text is None:
        return [(subject_name(config), config)]
    known = {name: replace(config, coupler_type=name) for name in coupler_names()}
    known |= {layer: replace(config, coupler_type="HGNN", hgnn_conv_type=layer) for layer in CONV_TYPES}
    if text.strip() == "all":
        asked = list(known.values())
    else:
        asked = []
        for name in (part.strip() for part in text.split(",")):
            if name not in known and ":" not in name:
                raise Refused(f"--couplers: {unknown_name('coupler', name, [*known, 'all'])}")
            asked.append(known[name] if name in known else replace(config, coupler_type=name))
    return list({subject_name(one): one for one in asked}.items())


def subject_name(config: GNNMoEConfig) -> str:
    """Return a coupler's name, of the hypergraph coupler with its layer and its hyperedges."""
    options = [f"{name}={value}" for name, value in config.coupler_options.items() if name != "backend"]
    if config.coupler_type != "HGNN":
        return " ".join([config.coupler_type, *options])
    layer = [] if config.hgnn_conv_type == "HypergraphConv" else [config.hgnn_conv_type]
    return " ".join(["HGNN", *layer, config.static_hyperedge_strategy, *options])
