"""Couplers that mix as they should and say one wrong thing of themselves."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tests.check.couplers import Made


class Telling(Made):
    """The mean; what it says beside ``mixing`` is ``static``, and ``extra`` where there are inputs."""

    static: ClassVar[Any] = {}
    extra: ClassVar[Any] = {}

    def communication(self, expert_outputs=None, layer_input=None):
        parts = super().communication(expert_outputs, layer_input) | self.static
        return parts if expert_outputs is None else parts | self.extra


class Honest(Telling):
    """Has one of each; the names of what is not there do no harm, and a scalar has no positions."""

    static: ClassVar[Any] = {"pairs": torch.ones(2), "scale": torch.ones(())}
    extra: ClassVar[Any] = {"rows": torch.ones(4, 7)}

    def member_names(self):
        return {"pairs": ["{0,1}", "{2,3}"], "absent": []}

    def inert_parameters(self):
        return {"combiner.0.bias": "so it is said"}

    def auxiliary_losses(self, expert_outputs, layer_input=None):
        return {"size": expert_outputs.square().mean()}

    def flops(self, tokens):
        return 2 * tokens


class ListOfParts(Made):
    """Forgets the names."""

    def communication(self, expert_outputs=None, layer_input=None):
        return [torch.ones(4)]


class ArrayPart(Telling):
    """Gives an array."""

    static: ClassVar[Any] = {"weights": torch.ones(4).numpy()}


class NotANumber(Telling):
    """Divides by zero."""

    static: ClassVar[Any] = {"weights": torch.full((4,), torch.nan)}


class Attached(Made):
    """Does not detach."""

    def communication(self, expert_outputs=None, layer_input=None):
        parts = super().communication(expert_outputs, layer_input)
        return parts | {"bias": self.combiner[0].bias.sum()}  # pyright: ignore


class EveryToken(Made):
    """Gives a row for each token."""

    def communication(self, expert_outputs=None, layer_input=None):
        parts = super().communication(expert_outputs, layer_input)
        return (
            parts if expert_outputs is None else parts | {"norms": expert_outputs.detach().norm(dim=(0, 3)).T}
        )


class EverySequence(Made):
    """Gives a column for each sequence."""

    def communication(self, expert_outputs=None, layer_input=None):
        parts = super().communication(expert_outputs, layer_input)
        return (
            parts if expert_outputs is None else parts | {"norms": expert_outputs.detach().norm(dim=(1, 3)).T}
        )


class Silent(Made):
    """Has no mixing."""

    def communication(self, expert_outputs=None, layer_input=None):
        return {}


class ShortMixing(Telling):
    """Leaves an expert out."""

    extra: ClassVar[Any] = {"mixing": torch.ones(3)}


class Forgetful(Made):
    """Loses its static part where there are inputs."""

    def communication(self, expert_outputs=None, layer_input=None):
        parts = super().communication(expert_outputs, layer_input)
        return parts | ({"weights": torch.ones(4)} if expert_outputs is None else {})


class Moving(Telling):
    """Its static part depends on the tokens."""

    static: ClassVar[Any] = {"weights": torch.ones(4)}
    extra: ClassVar[Any] = {"weights": torch.zeros(4)}


class Unnamed(Telling):
    """Six values for four experts, of which nobody knows what they are."""

    static: ClassVar[Any] = {"pairs": torch.ones(6)}


class Misnamed(Telling):
    """One name too few."""

    static: ClassVar[Any] = {"pairs": torch.ones(3)}

    def member_names(self):
        return {"pairs": ["{0,1}", "{2,3}"]}


class OneNameTwice(Telling):
    """Two values of one name, of which a record would keep one."""

    static: ClassVar[Any] = {"pairs": torch.ones(2)}

    def member_names(self):
        return {"pairs": ["{0,1}", "{0,1}"]}


class NumbersForNames(Telling):
    """Names that are no texts."""

    static: ClassVar[Any] = {"pairs": torch.ones(2)}

    def member_names(self) -> Any:
        return {"pairs": [0, 1]}


class NamesAlone(Made):
    """Names without saying of what."""

    def member_names(self) -> Any:
        return ["{0,1}"]


class InertNobody(Made):
    """Declares what it does not have."""

    def inert_parameters(self):
        return {"combiner.9.bias": "it was there once"}


class InertForNoReason(Made):
    """Does not say why."""

    def inert_parameters(self) -> Any:
        return {"combiner.0.bias": None}


class InertList(Made):
    """Gives names without reasons."""

    def inert_parameters(self) -> Any:
        return ["combiner.0.bias"]


class LossOfEachToken(Made):
    """Forgets the mean."""

    def auxiliary_losses(self, expert_outputs, layer_input=None):
        return {"size": expert_outputs.square().mean((2, 3))}


class InfiniteLoss(Made):
    """Too much."""

    def auxiliary_losses(self, expert_outputs, layer_input=None):
        return {"size": expert_outputs.sum() * torch.inf}


class FloatLoss(Made):
    """Gives a number in place of a tensor."""

    def auxiliary_losses(self, expert_outputs, layer_input=None) -> Any:
        return {"size": 0.5}


class FloatFlops(Made):
    """Halves its FLOPs."""

    def flops(self, tokens) -> Any:
        return tokens / 2


class NegativeFlops(Made):
    """Earns FLOPs."""

    def flops(self, tokens):
        return -tokens


class HalfAShape(Made):
    """Has no width."""

    def expert_shape(self) -> Any:
        return 4


class RaisingNames(Made):
    """Fails where nobody looked before."""

    def member_names(self):
        raise KeyError("no names")
