"""The part of a coupler that mixes experts: what it hands to the combiner that all couplers share.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.gate.subject import Inputs, call
from gnnmoe.couplers.base import Coupler, combiner

NOT_USED = "it does not use the shared combiner"
NOT_LAST = "the shared combiner is not its last step"


class Readout:
    """A coupler up to its combiner, as a function (B, L, E, D), (B, L, D) → (B, L, D).

    It is the combiner's input where the coupler calls the shared combiner exactly once and returns
    what that gives; else it is the coupler's own output, and ``why_output`` says why.
    """

    def __init__(self, coupler: Coupler, inputs: Inputs) -> None:
        self.coupler = coupler
        self.why_output = NOT_USED
        if _is_shared(getattr(coupler, "combiner", None), inputs[1].shape[-1]):
            with torch.no_grad():
                output, calls = self._observed_call(inputs)
            if len(calls) == 1 and calls[0][0].numel() == output.numel():
                returned = torch.equal(calls[0][1].reshape(output.shape), output)
                self.why_output = "" if returned else NOT_LAST

    def __call__(self, expert_outputs: Tensor, layer_input: Tensor) -> Tensor:
        """Return the readout (B, L, D), with its gradients.

        Raises:
            CheckFailed: the coupler's output is not finite, or of another shape.
        """
        if self.why_output:
            return call(self.coupler, (expert_outputs, layer_input))
        output, calls = self._observed_call((expert_outputs, layer_input))
        return calls[0][0].view_as(output)

    def _observed_call(self, inputs: Inputs) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the output, and what the combiner took and gave at each of its calls."""
        calls: list[tuple[Tensor, Tensor]] = []

        def observe(_: nn.Module, taken: tuple[Tensor, ...], given: Tensor) -> None:
            calls.append((taken[0], given))

        handle = self.coupler.combiner.register_forward_hook(observe)
        try:
            return call(self.coupler, inputs), calls
        finally:
            handle.remove()


def _is_shared(module: object, embed_dim: int) -> bool:
    """Return whether ``module`` is built as ``gnnmoe.couplers.combiner`` builds it."""
    return isinstance(module, nn.Sequential) and str(module) == str(combiner(embed_dim))
