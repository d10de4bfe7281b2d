"""Couplers that mix as they should and say one wrong thing of themselves; each with what is said of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from tests.check.couplers import Made


class Telling(Made):
    """The mean; what it says beside ``mixing`` is ``static``, and ``extra`` where there are inputs."""

    static: ClassVar[Any] = {}

    def extra(self, x) -> dict[str, Any]:
        return {}

    def communication(self, expert_outputs=None, layer_input=None):
        parts = super().communication(expert_outputs, layer_input) | self.static
        return parts if expert_outputs is None else parts | self.extra(expert_outputs)


class Honest(Telling):
    """Has one of each; the names of what is not there do no harm, and a scalar has no positions."""

    static: ClassVar[Any] = {"pairs": torch.ones(2), "scale": torch.ones(())}

    def extra(self, x):
        return {"rows": torch.ones(4, 7)}

    def member_names(self):
        return {"pairs": ["{0,1}", "{2,3}"], "absent": []}

    def inert_parameters(self):
        return {"combiner.0.bias": "so it is said"}

    def auxiliary_losses(self, expert_outputs, layer_input=None):
        return {"size": expert_outputs.square().mean()}

    def flops(self, tokens):
        return 2 * tokens


def says(value: Any):
    """A communication() that always gives ``value``."""
    return lambda self, expert_outputs=None, layer_input=None: value


def forgets(self, expert_outputs=None, layer_input=None):
    if expert_outputs is None:
        return {"weights": torch.ones(4)}
    return Telling.communication(self, expert_outputs, layer_input)


def losses(make):
    return lambda self, expert_outputs, layer_input=None: {"size": make(expert_outputs)}


def weighs(make):
    return lambda self, expert_outputs, layer_input=None: make(expert_outputs)


PAIRS = {"pairs": torch.ones(2)}
WRONG: dict[str, tuple[dict[str, Any], str]] = {  # class → its attributes, and what is said of it
    "ListOfParts": ({"communication": says([torch.ones(4)])},
                    "communication() gives a list; it must be a dict of tensors by name"),
    "ArrayPart": ({"static": {"weights": torch.ones(4).numpy()}},
                  "communication() gives 'weights': a ndarray; it must be a name and a tensor"),
    "NotANumber": ({"static": {"weights": torch.full((4,), torch.nan)}}, "communication(): weights is not"),
    "Attached": ({"static": property(lambda self: {"bias": self.combiner[0].bias.sum()})},
                 "communication(): bias is not detached; give bias.detach()"),
    "EveryToken": ({"extra": lambda self, x: {"norms": x.detach().norm(dim=(0, 3)).T}},
                   "the shape of norms changes with the tokens; give a mean over them"),
    "EverySequence": ({"extra": lambda self, x: {"norms": x.detach().norm(dim=(1, 3)).T}},
                      "the shape of norms changes with the tokens"),
    "Silent": ({"communication": says({})},
               "communication(x, u) has no mixing; start from super().communication(x, u)"),
    "ShortMixing": ({"extra": lambda self, x: {"mixing": torch.ones(3)}},
                    "mixing has shape (3,); it must be one share an expert, (4,)"),
    "Forgetful": ({"communication": forgets},
                  "communication(x, u) has no weights, which communication() has"),
    "Moving": ({"static": {"weights": torch.ones(4)}, "extra": lambda self, x: {"weights": torch.zeros(4)}},
               "communication: weights is not the same with inputs as without"),
    "Unnamed": ({"static": {"pairs": torch.ones(6)}},
                "pairs has 6 entries for 4 experts; name them in member_names()"),
    "OneNameTwice": ({"static": PAIRS, "member_names": lambda self: {"pairs": ["{0,1}", "{0,1}"]}},
                     "member_names(): pairs has 1 different names for 2 entries"),
    "NumbersForNames": ({"static": PAIRS, "member_names": lambda self: {"pairs": [0, 1]}},
                        "member_names(): pairs is [0, 1]; it must be a list of texts"),
    "NamesAlone": ({"member_names": lambda self: ["{0,1}"]},
                   "member_names() gives a list; it must be a dict of lists of names"),
    "RaisingNames": ({"member_names": lambda self: {}["no names"]},
                     "member_names() raised KeyError: 'no names'"),
    "WideWeights": ({"token_weights": weighs(lambda x: torch.ones(*x.shape[:2], 5))},
                    "token_weights(x, u) gives a tensor of shape (2, 2, 5); it must be None or a tensor"),
    "NoWeights": ({"token_weights": weighs(lambda x: 3)}, "token_weights(x, u) gives 3; it must be None"),
    "Logits": ({"token_weights": weighs(lambda x: x.mean(3) - 9)},
               "token_weights(x, u) has weights that are below 0 or not finite; each must be 0 or more"),
    "InertNobody": ({"inert_parameters": lambda self: {"combiner.9.bias": "it was there once"}},
                    "inert_parameters() names 'combiner.9.bias', which is no parameter; known: combiner.0."),
    "InertForNoReason": ({"inert_parameters": lambda self: {"combiner.0.bias": None}},
                         "inert_parameters() gives None for combiner.0.bias; it must be the reason"),
    "InertList": ({"inert_parameters": lambda self: ["combiner.0.bias"]},
                  "inert_parameters() gives a list; it must be a dict of reasons"),
    "LossOfEachToken": ({"auxiliary_losses": losses(lambda x: x.square().mean((2, 3)))},
                        "auxiliary_losses(x, u): size has shape (2, 2); it must be a scalar"),
    "InfiniteLoss": ({"auxiliary_losses": losses(lambda x: x.sum() * torch.inf)},
                     "auxiliary_losses(x, u): size is not finite"),
    "FloatLoss": ({"auxiliary_losses": losses(lambda x: 0.5)},
                  "auxiliary_losses(x, u) gives 'size': a float; it must be a name and a tensor"),
    "FloatFlops": ({"flops": lambda self, tokens: tokens / 2}, "flops(12) gives 6.0; it must be a whole"),
    "NegativeFlops": ({"flops": lambda self, tokens: -tokens}, "flops(12) gives -12; it must be a whole"),
    "HalfAShape": ({"expert_shape": lambda self: 4},
                   "expert_shape() gives 4; it must be two positive integers"),
}  # fmt: skip
for _name, (_own, _) in WRONG.items():
    globals()[_name] = type(_name, (Telling,), {"__module__": __name__, "__doc__": _name, **_own})
