"""What Inductor keeps in memory of a coupler: the sizes in the code that it writes, which is not built.

Shapes: N tokens, E experts, M hyperedges, D width.
"""

from __future__ import annotations

import math
import re
from ast import literal_eval

import pytest
import torch

from tests.gnnmoe._support import make_coupler, normal

N, E, D = 480, 4, 32
ALLOCATION = re.compile(r"= empty_strided_cpu\((\([\d, ]*\)), \([\d, ]*\), torch\.(\w+)\)")


class _Written(Exception):
    """Both halves are written; nothing of them is to run."""


def buffers(monkeypatch, **fields) -> list[list[float]]:
    """Bytes of each buffer in forward and backward, in tensors (N, E, D) of bf16, for a bf16 step."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering

    codes = []

    class Unbuilt:
        __file__ = ""

        def call(self, *args):
            raise _Written

    def note(graph):
        codes.append(graph.codegen()[0].value)
        return Unbuilt()

    monkeypatch.setattr(GraphLowering, "compile_to_module", note)
    coupler = make_coupler(dtype=torch.float32, embed_dim=D, num_experts=E, gnn_layers=1, **fields)
    x = normal(E, 2, N // 2, D).bfloat16().permute(1, 2, 0, 3).requires_grad_(True)
    torch._dynamo.reset()
    with (
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        inductor_config.patch(fx_graph_cache=False),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(_Written),
    ):
        torch.compile(coupler, fullgraph=True)(x)
    torch._dynamo.reset()
    return [
        [math.prod(literal_eval(shape)) * getattr(torch, dtype).itemsize / (2 * N * E * D)
         for shape, dtype in ALLOCATION.findall(code)]
        for code in codes
    ]  # fmt: skip


@pytest.mark.slow
def test_hnhn_makes_no_buffer_larger_than_what_the_experts_write(monkeypatch):
    """Nothing of (N, M, D) with M 6, nor in parts: what is made, and not reused, is 4.5 such tensors."""
    found = buffers(monkeypatch, hgnn_conv_type="HNHN")
    assert len(found) == 2
    for half in found:
        assert max(half) <= 1, half
        assert sum(half) <= 4.5, half
