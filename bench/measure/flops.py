"""Floating-point operations of a training step, counted on its matrix products."""

from __future__ import annotations

import copy

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gnnmoe.model import GNNMoEModel

STEP = 3  # forwards: the backward has two products of the size of each one of the forward


@torch.no_grad()
def training_flops_per_token(model: GNNMoEModel) -> float:
    """Return the FLOPs of forward and backward for each token of one sequence of full length.

    Three times a forward, counted by ``torch.utils.flop_counter`` on a copy on the CPU, with plain logits
    and plain attention: the chunked head and the fused attention are operators that the counter does not
    know. What a backward computes again to save memory is none of the model's FLOPs. Attention counts
    whole, as is usual, although half of it is masked.
    """
    copied = copy.deepcopy(model).cpu().eval()
    length = copied.config.max_seq_length
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copied(torch.zeros(1, length, dtype=torch.int64))
    return STEP * counter.get_total_flops() / length
