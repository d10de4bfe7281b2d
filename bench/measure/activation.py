"""The memory of a forward pass that grows with the batch, to prove that a batch size is applied."""

from __future__ import annotations

import torch

from bench.gate.subject import global_random_state_kept
from bench.measure.meters import meter_for
from bench.measure.recovery import attempt
from bench.record import is_measured
from bench.training.shape import require_applied
from gnnmoe.model import GNNMoEModel


def activation_bytes(model: GNNMoEModel, rows: int, length: int, device: torch.device) -> int:
    """Return the peak in bytes of a forward pass with its graph, less the batch; model and state stay.

    Parameters and buffers are counted, so that only differences between sizes mean something.

    Raises:
        ValueError: the device's meter reads no allocated bytes.
    """
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    batch = {"input_ids": ids, "targets": ids.clone()}

    def forward() -> None:
        model(batch["input_ids"], targets=batch["targets"], return_logits=False)

    with global_random_state_kept(device):
        peak = meter_for(device).measure(forward, (model, [batch])).peak_allocated_bytes
    if not is_measured(peak):
        raise ValueError("activation memory cannot be read on this device.")
    assert isinstance(peak, int)
    return peak - 2 * ids.numel() * ids.element_size()


def require_batch_applied(model: GNNMoEModel, length: int, device: torch.device) -> None:
    """Hold the activation memory of one sequence against that of two, of which nothing stays.

    Raises:
        ParametersNotApplied: it does not rise.
    """
    # Where two run out of memory, they take more.
    attempt(lambda: require_applied(lambda rows: activation_bytes(model, rows, length, device)))
