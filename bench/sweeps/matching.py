"""Equal parameters, FLOPs, memory or time: the free width of every model, solved for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from gnnmoe.config import GNNMoEConfig, Refused, unknown_name
from gnnmoe.cost import QUANTITIES as BY_FORMULA
from gnnmoe.cost import matched_ffn_dim, model_cost
from gnnmoe.couplers.registry import coupler_class

DENSE = "dense"
TOLERANCES = {"memory": 0.001, "time": 0.02}  # of the reference: the prediction is exact, a clock is not
QUANTITIES = (*BY_FORMULA, *TOLERANCES)
OF_A_COUPLER = (
    "coupler_type", "coupler_options", "ffn_dim", "hgnn_conv_type", "static_hyperedge_strategy",
    "hgnn_learnable_edge_weights",
)  # fmt: skip
"""Fields in which a model may differ from the reference that it is matched to."""
MOST_TRIALS, MOST_WIDTHS = 16, 64  # widths that are tried, and times the width to begin with
Weigh = Callable[[str, GNNMoEConfig, GNNMoEConfig], float]
"""From memory or time, a model and the reference to how many times as much of it the model takes."""


@dataclass(frozen=True)
class Match:
    """Make every model cost as much, in ``quantity``, as the first one with the coupler ``reference``."""

    quantity: str
    reference: str

    @classmethod
    def parse(cls, text: str) -> Match:
        """Return the match that ``"params HGNN"`` or ``"time mean"`` asks for.

        Raises:
            Refused: it has another form, or names an unknown quantity or coupler.
        """
        words = text.split() if isinstance(text, str) else []
        if len(words) != 2:
            raise Refused(f'match is {text!r}; write a quantity and a coupler, such as "params HGNN".')
        quantity, reference = words
        if quantity not in QUANTITIES:
            raise Refused(unknown_name("quantity to match", quantity, QUANTITIES))
        if reference == DENSE:
            raise Refused("match: dense is as large as it is made; name a coupler that has experts.")
        coupler_class(reference)
        return cls(quantity, reference)


@dataclass(frozen=True)
class Matched:
    """What matching one model came to."""

    ffn_dim: int | None
    """The width of its experts; None for the reference itself, which stays as it is."""
    off_by: float
    """By which share it costs more than the reference all the same."""


def reference_for(config: GNNMoEConfig, match: Match, models: Iterable[GNNMoEConfig]) -> GNNMoEConfig:
    """Return the model that ``config`` is to cost as much as.

    It is the first of the sweep's ``models`` with the reference's coupler that is the same in all that is not
    the coupler's; where there is none, the same model with that coupler and its default options.
    """

    def rest(model: GNNMoEConfig) -> dict[str, object]:
        return {name: value for name, value in model.to_dict().items() if name not in OF_A_COUPLER}

    for model in models:
        if model.coupler_type == match.reference and rest(model) == rest(config):
            return model
    return replace(config, coupler_type=match.reference, coupler_options={})


def matched(config: GNNMoEConfig, match: Match, reference: GNNMoEConfig, weigh: Weigh) -> Matched:
    """Return the width of the experts that makes a model cost as much as the reference.

    A dense model's one block is matched like an expert.

    Raises:
        Refused: the quantity is flops and a coupler does not say its own; it is memory and a coupler's
            cannot be predicted; or no width of up to 64 times the model's own is enough.
    """
    if config == reference:
        return Matched(None, 0.0)
    options = {"match": "none"} if config.coupler_type == DENSE else config.coupler_options
    config = replace(config, coupler_options=options)
    if match.quantity in BY_FORMULA:
        target = model_cost(reference)
        width = matched_ffn_dim(config, target, match.quantity)
        asked, got = (
            getattr(cost, match.quantity) for cost in (target, model_cost(replace(config, ffn_dim=width)))
        )
        return Matched(width, got / asked - 1)
    return _nearest(
        lambda width: weigh(match.quantity, replace(config, ffn_dim=width), reference),
        config.expert_width, TOLERANCES[match.quantity],
    )  # fmt: skip


def _nearest(ratio: Callable[[int], float], start: int, tolerance: float) -> Matched:
    """Return the width at which a ratio that rises with it is nearest to 1, or near enough.

    The range that holds it is cut where a straight line through its ends meets 1: the peak of memory is
    made of pieces of straight lines, and time of a little more. After a cut that leaves more than half of
    it comes one through the middle.
    """
    found: dict[int, float] = {}
    low, high, width, middle = 0, None, start, False
    while len(found) < MOST_TRIALS:
        found[width] = ratio(width)
        if abs(found[width] - 1) <= tolerance:
            break
        before = None if high is None else high - low
        if found[width] < 1:
            low = width
        else:
            high = width
        if high is None:
            width = 2 * low
            if width > MOST_WIDTHS * start:
                raise Refused(f"experts {low:,} wide still cost less than the reference; match params.")
        elif high - low == 1:
            break
        else:
            middle = not middle and before is not None and 2 * (high - low) > before
            width = (low + high) // 2 if middle or low == 0 else _between(low, high, found)
    best = min(found, key=lambda width: abs(found[width] - 1))
    return Matched(best, found[best] - 1)


def _between(low: int, high: int, found: dict[int, float]) -> int:
    share = (1 - found[low]) / (found[high] - found[low])
    return min(max(low + round(share * (high - low)), low + 1), high - 1)
