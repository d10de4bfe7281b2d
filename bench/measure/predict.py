"""The peak memory of a training step, without running it: on tensors that have shapes and no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from bench.config import ExecutionConfig, TrainingConfig
from bench.measure.tracked import tracked_peaks
from bench.training.step import Execution, make_optimizer, training_step
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel

EXACT_TOKENS = 4096  # a second or two; a quarter of it is several of the head's chunks of 256 rows
_KNOWN: dict[str, int] = {}
NOT_FAKEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


class CannotPredict(RuntimeError):
    """A coupler reads its numbers, so that its memory is known only by running it."""


def predict_peak(
    model_config: GNNMoEConfig,
    batch_size: int,
    length: int,
    training: TrainingConfig,
    *,
    micro_batch_size: int | None = None,
    device: torch.device | None = None,
    execution: ExecutionConfig | None = None,
) -> int:
    """Return the peak in bytes of one full training step on a batch (batch_size, length).

    Forward, backward, clipping and update with the optimizer's state in place, as ``training_step``
    does them, in pieces where a ``micro_batch_size`` says so, in the form and precision that
    ``execution`` says (its defaults where None), uncompiled. On the CPU (the default device) it
    equals what ``TrackedMeter`` reads of the real step (under autocast to 0.1 %); for another
    device it is the allocated bytes, cuBLAS's workspaces included, without the allocator's reserve
    and the context. No tensor is given memory, and no random number is drawn.

    The head works in chunks, so the time grows with the tokens. Above ``EXACT_TOKENS`` the peak is
    drawn out along a line through two smaller batches: the memory at each moment of a step is a
    linear function of the batch size, so the peak is a convex one, and the line lies on it but for
    a moment that takes over further out.

    Source: ``torch.distributed._tools.mem_tracker`` under ``torch._subclasses.FakeTensorMode``.

    Raises:
        CannotPredict: the coupler's operations depend on the numbers in its tensors.
        ValueError: ``length`` is more than the model's ``max_seq_length``.
    """
    how = Execution(execution or ExecutionConfig(), device or torch.device("cpu"))
    step = _Step(model_config, length, training, how)
    library = 2 * cublas_workspace_bytes(how.device)  # the forward's thread and the backward's have one each
    split = micro_batch_size is not None and micro_batch_size < batch_size
    if batch_size * length <= EXACT_TOKENS:
        return step.peak(batch_size, micro_batch_size) + library
    if not split:
        return step.along_a_line(batch_size, pieces=1) + library
    assert micro_batch_size is not None
    tokens_alone = (batch_size - 2 * micro_batch_size) * length  # of the pieces that wait: ids and targets
    return step.along_a_line(micro_batch_size, pieces=2) + 2 * 8 * tokens_alone + library


def cublas_workspace_bytes(device: torch.device) -> int:
    """Return what a thread's cuBLAS handle takes from torch's allocator with its first product.

    Source: ``getChosenWorkspaceSize`` in PyTorch's ``aten/src/ATen/cuda/CublasHandlePool.cpp``; the
    32 MiB were also seen on an H100. ``CUBLAS_WORKSPACE_CONFIG`` changes it.
    """
    if device.type != "cuda":
        return 0
    return 32 * 2**20 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 8320 * 2**10


@dataclass(frozen=True)
class _Step:
    config: GNNMoEConfig
    length: int
    training: TrainingConfig
    execution: Execution

    def along_a_line(self, rows: int, pieces: int) -> int:
        """Return the peak of ``pieces`` of so many rows; exactly where they are few."""
        high = max(2, EXACT_TOKENS // (pieces * self.length))
        if rows <= high:
            return self._known(rows, pieces)
        low = high // 2
        top, bottom = self._known(high, pieces), self._known(low, pieces)
        return top + (top - bottom) * (rows - high) // (high - low)

    def _known(self, rows: int, pieces: int) -> int:
        """Return a peak, worked out once: a search asks for many sizes on one line."""
        key = repr((self, rows, pieces))
        if key not in _KNOWN:
            _KNOWN[key] = self.peak(rows * pieces, rows)
        return _KNOWN[key]

    def peak(self, batch_size: int, micro_batch_size: int | None) -> int:
        """Return the peak of a step, by doing it on tensors without data."""
        with torch.device("meta"):
            model = self.execution.model(self.config, seed=0)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):  # the model comes in from outside
                return self._fake_peak(model, batch_size, micro_batch_size)
        except NOT_FAKEABLE as error:
            raise CannotPredict(
                f"the peak of coupler {self.config.coupler_type} cannot be predicted, since it reads the "
                f"numbers in its tensors ({type(error).__name__}: {error}); measure it instead."
            ) from error

    def _fake_peak(self, model: GNNMoEModel, batch_size: int, micro_batch_size: int | None) -> int:
        device = self.execution.device
        model = model.to_empty(device=device)
        optimizer = make_optimizer(model, self.training)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        ids = torch.empty(batch_size, self.length, dtype=torch.int64, device=device)
        batch = {"input_ids": ids, "targets": torch.empty_like(ids)}
        model(ids[:1, :1])  # what a coupler makes on its first call is there in a real step

        def step() -> None:
            training_step(model, batch, optimizer, self.training.max_grad_norm, micro_batch_size)

        return tracked_peaks(step, (model, optimizer, [batch]))[0]
