"""Equal parameters or FLOPs: the free width of every model, solved for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gnnmoe.config import GNNMoEConfig
from gnnmoe.cost import QUANTITIES, Cost, matched_ffn_dim, model_cost
from gnnmoe.couplers import coupler_class
from gnnmoe.naming import unknown_name

DENSE = "dense"


@dataclass(frozen=True)
class Match:
    """Make every model cost as much, in ``quantity``, as the one with the coupler ``reference``."""

    quantity: str
    reference: str

    @classmethod
    def parse(cls, text: str) -> Match:
        """Return the match that ``"params HGNN"`` or ``"flops mean"`` asks for.

        Raises:
            ValueError: it has another form, or names an unknown quantity or coupler.
        """
        words = text.split() if isinstance(text, str) else []
        if len(words) != 2:
            raise ValueError(f'match is {text!r}; write a quantity and a coupler, such as "params HGNN".')
        quantity, reference = words
        if quantity not in QUANTITIES:
            raise ValueError(unknown_name("quantity to match", quantity, QUANTITIES))
        if reference == DENSE:
            raise ValueError("match: dense is as large as it is made; name a coupler that has experts.")
        coupler_class(reference)
        return cls(quantity, reference)


def matched(config: GNNMoEConfig, match: Match) -> tuple[int | None, Cost]:
    """Return the width of the experts that matches the reference, and the reference's cost.

    The reference is the same model with the reference's coupler and its default options; None for the
    reference itself. A dense model's one block is matched like an expert.

    Raises:
        ValueError: the quantity is flops and a coupler does not say its own.
    """
    reference = replace(config, coupler_type=match.reference, coupler_options={})
    if config.coupler_type == match.reference:
        reference = config
    target = model_cost(reference)
    if reference is config:
        return None, target
    options = {"match": "none"} if config.coupler_type == DENSE else config.coupler_options
    return matched_ffn_dim(replace(config, coupler_options=options), target, match.quantity), target
