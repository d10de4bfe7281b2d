"""The contract of a coupler: its input, its output, and what it reports; and the check of that contract.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig, Refused, brief
from gnnmoe.discovery import forget_inherited

COUPLER_FIELDS = ("gnn_layers", "hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights")
"""The fields of the config that only some couplers read."""


class Coupler(nn.Module, ABC):
    """Mixes the outputs of E experts, token by token: (B, L, E, D) → (B, L, D).

    A subclass takes the config and its own options, keyword-only and with defaults:
    ``def __init__(self, config, *, k: int = 2)``. It keeps no state between calls and never mixes tokens. The
    leak check (``python -m bench.check``) tests this before every run.

    A subclass needs ``forward`` alone. With its own ``forward`` it inherits no ``reference`` and ``flops``.
    """

    name: ClassVar[str] = ""
    """Set by ``@register_coupler``."""
    config_fields: ClassVar[tuple[str, ...] | None] = None
    """The fields among ``COUPLER_FIELDS`` that the coupler reads; None: perhaps all. Two configs that differ
    only in other fields are one run. Subclasses do not inherit it, nor the two methods below."""

    @classmethod
    def fields_read(cls, options: dict[str, Any]) -> tuple[str, ...] | None:
        """Return the ``config_fields`` that count with these options."""
        return cls.config_fields

    @classmethod
    def canonical_options(cls, config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
        """Return ``options`` in one form for all that give the same model, without those that do nothing."""
        return options

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forget_inherited(cls, Coupler, ("reference", "flops"))

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.combiner = combiner(config.embed_dim)

    @abstractmethod
    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix ``expert_outputs`` (B, L, E, D), of any stride, into (B, L, D).

        ``layer_input`` (B, L, D) is the input of the experts. Couplers that route tokens need it.
        """

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor | None:
        """Compute the same as ``forward`` naively from the formula; loops are fine.

        None where the coupler has no reference implementation.
        """
        return None

    def expert_shape(self) -> tuple[int, int]:
        """Return the number of experts of a layer and their hidden width; ``dense`` has other values."""
        return self.config.num_experts, self.config.expert_width

    def auxiliary_losses(
        self, expert_outputs: Tensor, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return scalar losses to add in training, by name, without side effects; most have none."""
        return {}

    def flops(self, tokens: int) -> int | None:
        """Return the FLOPs of ``forward`` for this many tokens: 2 per multiply-add of a matrix product.

        None where the coupler has no formula; ``torch.utils.flop_counter`` then counts them.
        """
        return None

    def static_communication(self) -> dict[str, Tensor]:
        """Return tensors that are the same for every token (hyperedge weights, adjacency), by name."""
        return {}

    def communication(
        self, expert_outputs: Tensor | None = None, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return how experts communicate: small, detached tensors by name.

        Always the static parts. With ``expert_outputs`` (B, L, E, D) also ``mixing`` (E): the share of each
        expert in the output, averaged over these tokens.
        """
        parts = {name: value.detach() for name, value in self.static_communication().items()}
        if expert_outputs is not None:
            parts["mixing"] = effective_mixing(self, expert_outputs, layer_input)
        return parts

    def token_weights(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor | None:
        """Return the weight of each expert for each token (B, L, E), 0 or more.

        None where the coupler has no weights that depend on the token.
        """
        return None

    def get_expert_communication_matrices(self) -> list[Tensor]:
        """Return the static parts of ``communication`` as a list, as the original experiments did."""
        return list(self.communication().values())

    def inert_parameters(self) -> dict[str, str]:
        """Return the parameters that cannot have a gradient by construction: name → the reason."""
        return {}

    def member_names(self) -> dict[str, list[str]]:
        """Return, for an entry of ``communication``, a name for each position of its first axis.

        An entry without names has one value (or row) per expert.
        """
        return {}


def linear_flops(rows: int, in_features: int, out_features: int) -> int:
    """Return the FLOPs of a matrix product (rows, in) × (in, out), as ``flop_counter`` counts them."""
    return 2 * rows * in_features * out_features


def combiner(embed_dim: int) -> nn.Sequential:
    """Return Linear–GELU–LayerNorm, which follows the readout of every coupler."""
    return nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU(), nn.LayerNorm(embed_dim))


def effective_mixing(coupler: Coupler, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of ‖∂y/∂x_e‖ (Frobenius norm), normalised for each token: shape (E,).

    A token whose output depends on no expert counts as zeros; without such tokens the sum is 1. For a coupler
    that maps a weighted sum of a token's experts, this is the mean over tokens of |weight| / Σ |weights|. It
    costs one backward pass for each of the D outputs.
    """
    inputs = expert_outputs.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        output = coupler(inputs, None if layer_input is None else layer_input.detach())
        dtype = _accumulation_dtype(inputs.device)
        squared = torch.zeros(inputs.shape[:3], device=inputs.device, dtype=dtype)
        for column in output.flatten(0, 1).sum(0).unbind():
            (gradient,) = torch.autograd.grad(
                column, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            squared += gradient.to(squared.dtype).square().sum(-1)
    norm_BLE = squared.sqrt()
    total_BL1 = norm_BLE.sum(-1, keepdim=True).clamp_min(torch.finfo(norm_BLE.dtype).tiny)
    return (norm_BLE / total_BL1).mean((0, 1)).to(expert_outputs.dtype)


def _accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# --- the check of the contract ---------------------------------------------------------------------------

EMPTY = inspect.Parameter.empty
OPTION_TYPES = (bool, int, float, str, type(None))
FIELDS_ARE = f"None, or a tuple of some of {', '.join(COUPLER_FIELDS)}"
METHODS = (
    "forward reference auxiliary_losses communication token_weights flops fields_read canonical_options"
).split()
"""The methods that the harness calls: their parameters must be those of ``Coupler``."""


def check_contract(cls: Any, name: str | None = None) -> None:
    """Refuse a class that does not look like a coupler; the leak check judges what it computes.

    ``name`` is the name of the class in the message.

    Raises:
        Refused: the class breaks the contract; names the first broken clause and says what to do.
    """
    breach = _breach(cls)
    if breach is not None:
        if name is None:
            name = f"{cls.__module__}:{cls.__qualname__}" if inspect.isclass(cls) else repr(cls)
        raise Refused(f"coupler {name!r} breaks the contract: {breach}")


def _breach(cls: Any) -> str | None:
    if not (inspect.isclass(cls) and issubclass(cls, Coupler)):
        return "it is not a subclass of gnnmoe.Coupler; derive it from that class."
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        return f"it does not implement {' and '.join(missing)}; every abstract method must be written."
    return _in_constructor(cls) or _in_methods(cls) or _in_fields(cls)


def _in_constructor(cls: type[Coupler]) -> str | None:
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            return (
                f"__init__ takes **{parameter.name}, which would swallow a misspelt option; "
                "name each option as a keyword-only parameter with a default."
            )
        if parameter.kind is parameter.VAR_POSITIONAL:
            return (
                f"__init__ takes *{parameter.name}, which no option can reach; "
                "name each option as a keyword-only parameter with a default."
            )
    own = parameters[1:]
    if not own or own[0].name != "config" or own[0].kind is own[0].KEYWORD_ONLY:
        found = repr(own[0].name) if own and own[0].kind is not own[0].KEYWORD_ONLY else "missing"
        return (
            f"the first parameter of __init__ after self is {found}; it must be config, "
            "as in __init__(self, config, *, k=2)."
        )
    for option in own[1:]:
        breach = _in_option(option)
        if breach is not None:
            return breach
    return None


def _in_option(option: inspect.Parameter) -> str | None:
    if option.name in ("device", "dtype"):
        return (
            f"__init__ has an option {option.name!r}; remove it: the model is moved as a whole, "
            f"by .to({option.name})."
        )
    if option.kind is not option.KEYWORD_ONLY:
        return (
            f"__init__ takes {option.name!r} by position; make it keyword-only, "
            f"as in __init__(self, config, *, {option.name}=...)."
        )
    if option.default is EMPTY:
        return f"option {option.name!r} of __init__ has no default; give it one."
    if type(option.default) not in OPTION_TYPES:
        return (
            f"the default of option {option.name!r} of __init__ is of type {type(option.default).__name__}; "
            "options are read from the command line: make it a bool, int, float, str or None."
        )
    return None


def _in_methods(cls: type[Coupler]) -> str | None:
    for method in METHODS:
        found, wanted = _signature(cls, method), _signature(Coupler, method)
        if found is None:
            return f"{method} is no method; write it as one."
        if _is_classmethod(Coupler, method) and not _is_classmethod(cls, method):
            return f"{method} is no classmethod; put @classmethod above it."
        if found != wanted:
            return (
                f"{method} takes {found}; it must take {wanted} after self, by these names, and nothing else."
            )
    return None


def _signature(cls: type[Coupler], method: str) -> inspect.Signature | None:
    """Return the parameters that a caller of the method gives (all after self), without annotations."""
    try:
        parameters = list(inspect.signature(getattr(cls, method)).parameters.values())
    except (TypeError, ValueError):
        return None
    bound = isinstance(inspect.getattr_static(cls, method), staticmethod | classmethod)
    own = parameters if bound else parameters[1:]
    return inspect.Signature([parameter.replace(annotation=EMPTY) for parameter in own])


def _is_classmethod(cls: type[Coupler], method: str) -> bool:
    return isinstance(inspect.getattr_static(cls, method), classmethod)


def _in_fields(cls: type[Coupler]) -> str | None:
    if are_fields(cls.config_fields):
        return None
    return f"config_fields is {brief(cls.config_fields)}; it must be {FIELDS_ARE}."


def are_fields(value: Any) -> bool:
    """Return whether ``value`` is allowed as ``config_fields``."""
    return value is None or (isinstance(value, tuple) and all(name in COUPLER_FIELDS for name in value))
