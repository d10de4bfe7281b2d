"""Floating-point operations of a training step, counted on its matrix products."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gnnmoe.model import GNNMoEModel


def training_flops_per_token(model: GNNMoEModel) -> float:
    """Return the FLOPs of forward and backward for each token of one sequence of full length.

    Counted by ``torch.utils.flop_counter`` on a copy on the CPU, with plain logits and plain
    attention: the chunked head and the fused attention are operators that the counter does not
    know. Attention counts whole, as is usual, although half of it is masked.
    """
    copied = copy.deepcopy(model).cpu().eval()
    length = copied.config.max_seq_length
    ids = torch.zeros(1, length, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = copied(ids)["logits"]
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops() / length
