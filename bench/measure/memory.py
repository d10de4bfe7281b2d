"""Memory of a training step: what a meter reads of it, what it is made of, and its peak before it runs.

*Allocated* is what tensors take, the quantity to compare couplers by. *Reserved* is what the allocator
holds from the device for them, the quantity that decides what fits. *Device-used* is what the device
reports in use, with the context, the libraries and other processes.

On CUDA the meter reads the allocator. Elsewhere a tracker sees every operation and sums up the live tensors.
The same tracker predicts a peak: it then sees a step on tensors that have shapes and no data.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from bench.config import ExecutionConfig, TrainingConfig
from bench.record import Memory, NotMeasured, not_measured
from bench.training.step import Execution, make_optimizer, training_step
from gnnmoe.config import GNNMoEConfig
from gnnmoe.model import GNNMoEModel

Owner = nn.Module | Optimizer | list[dict[str, Tensor]]
"""What holds memory before a step: a module, an optimizer, or batches."""
BLOCK_BYTES = 512  # the CUDA allocator hands out whole blocks of this size
PARTS = {"model": ("parameter", "buffer"), "gradients": ("gradient",), "optimizer": ("optstate",)}
EXACT_TOKENS = 4096  # a second or two; a quarter of it is several of the head's chunks of 256 rows
_KNOWN: dict[str, int] = {}
NOT_FAKEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


# --- meters ----------------------------------------------------------------------------------------


class Meter(Protocol):
    """Reads the memory of one step."""

    name: str

    def measure(self, step: Callable[[], object], owners: tuple[Owner, ...] = ()) -> Memory:
        """Run ``step`` once and return its memory, without ``by_phase``; an error of the step comes out.

        ``owners`` are the modules, optimizers and lists of batches that hold memory before the step.
        """
        ...


def meter_for(device: torch.device) -> Meter:
    """Return the meter for a device: its allocator on CUDA, elsewhere a tracker of tensors."""
    return CudaMeter(device) if device.type == "cuda" else TrackedMeter(device)


class TrackedMeter:
    """The sum of all live tensors, at every operation; what the allocator below adds is not seen."""

    name = "tracked_tensors"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, step: Callable[[], object], owners: tuple[Owner, ...] = ()) -> Memory:
        """Run ``step`` once and return its memory."""
        peak, parts = tracked_peaks(step, owners)
        allocator = not_measured("only a caching allocator reserves memory")
        return Memory(
            meter=self.name,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=allocator,
            peak_active_bytes=allocator,
            allocator_retries=allocator,
            device_used_bytes=not_measured(f"{self.device.type} memory is the host's"),
            nvml_used_bytes=not_measured("NVML knows NVIDIA's devices only"),
            peak_by_part_bytes=parts,
            process_peak_bytes=process_peak_bytes(),
            by_part=by_part(parts),
            by_phase=not_measured("of one step alone"),
        )


class CudaMeter:
    """The peaks of the CUDA allocator, which is emptied and reset before the step.

    Source: ``torch.cuda.memory_stats``. Its retries are counted since the process began, so the meter takes
    their difference.
    """

    name = "cuda_allocator"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def measure(self, step: Callable[[], object], owners: tuple[Owner, ...] = ()) -> Memory:
        """Reset, wait, run ``step`` once, wait, and return its memory."""
        device = self.device
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # else an earlier, larger step's cache would count as reserved
        torch.cuda.reset_peak_memory_stats(device)
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        parts = held_bytes(owners)
        with GradientsAtPeak(owners, device) as gradients:
            step()
            torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        peak = torch.cuda.max_memory_allocated(device)
        parts["gradient"] = gradients.at_peak_bytes
        parts["rest"] = peak - sum(parts.values())
        free, total = torch.cuda.mem_get_info(device)
        return Memory(
            meter=self.name,
            peak_allocated_bytes=peak,
            peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
            peak_active_bytes=stats.get("active_bytes.all.peak", not_measured("the allocator does not say")),
            allocator_retries=stats.get("num_alloc_retries", 0) - retries,
            device_used_bytes=total - free,
            nvml_used_bytes=nvml_used_bytes(device),
            peak_by_part_bytes=parts,
            process_peak_bytes=process_peak_bytes(),
            by_part=by_part(parts),
            by_phase=not_measured("of one step alone"),
        )


def process_peak_bytes() -> int | NotMeasured:
    """Return the peak resident size of the process since its start, in bytes (Linux's VmHWM).

    Not ``ru_maxrss`` of ``getrusage``: a child inherits that number from the process that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE)
    return int(found[1]) * 1024 if found else not_measured("the system has no /proc/self/status with VmHWM")


def nvml_used_bytes(device: torch.device) -> int | NotMeasured:
    """Return the bytes of a CUDA device that are in use by NVML's account, if nvidia-ml-py is installed."""
    try:
        return int(torch.cuda.device_memory_used(device))
    except ModuleNotFoundError:
        return not_measured("nvidia-ml-py is not installed; pip install 'gnnmoe[gpu]'")
    except Exception as error:  # NVML may be shut off, as in some containers; the run must not end by it
        return not_measured(f"NVML does not answer: {error}")


# --- what the peak is made of ----------------------------------------------------------------------


def by_part(peak_by_part_bytes: dict[str, int]) -> dict[str, int]:
    """Return the bytes at the moment of the peak in four parts, whose sum is the peak.

    Activations are everything outside the other three parts: what the forward keeps for the backward, the
    temporaries of both, and the batches. A peak at the end of the forward has no gradients yet.
    """
    parts = {name: sum(peak_by_part_bytes.get(key, 0) for key in keys) for name, keys in PARTS.items()}
    return {**parts, "activations": sum(peak_by_part_bytes.values()) - sum(parts.values())}


def built_bytes(owners: tuple[Owner, ...], device: torch.device) -> int:
    """Return the bytes that model, optimizer and batches hold, before the first step or between steps."""
    return sum(held_bytes(owners, BLOCK_BYTES if device.type == "cuda" else 1).values())


def held_bytes(owners: tuple[Owner, ...], block: int = BLOCK_BYTES) -> dict[str, int]:
    """Return the bytes that stay allocated through a whole step, by part; each storage counts once.

    The parts are parameter, buffer, optstate (the optimizer's state as it is before the step) and other (the
    batches). Each storage is rounded up to whole blocks.
    """
    found: dict[str, dict[int, int]] = {"parameter": {}, "buffer": {}, "optstate": {}, "other": {}}

    def add(part: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        found[part][storage.data_ptr()] = _in_blocks(storage.nbytes(), block)

    for owner in owners:
        if isinstance(owner, nn.Module):
            for parameter in owner.parameters():
                add("parameter", parameter)
            for buffer in owner.buffers():
                add("buffer", buffer)
        elif isinstance(owner, list):
            for batch in owner:
                for tensor in batch.values():
                    add("other", tensor)
        else:
            for state in owner.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        add("optstate", value)
    return {part: sum(sizes.values()) for part, sizes in found.items()}


class GradientsAtPeak:
    """Watches a step on CUDA: how many bytes of gradients the owners' parameters hold at its peak.

    The allocator does not say what a block is for. But its peak is known at any moment without a wait, and
    gradients arrive one by one. So the peak moved either before or after each gradient.
    """

    def __init__(self, owners: tuple[Owner, ...], device: torch.device) -> None:
        self.at_peak_bytes = 0
        self._device, self._peak, self._held = device, 0, 0
        self._seen: set[Tensor] = set()
        modules = [owner for owner in owners if isinstance(owner, nn.Module)]
        self._parameters = {p for module in modules for p in module.parameters() if p.requires_grad}

    def __enter__(self) -> GradientsAtPeak:
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._parameters]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self._look()
        for handle in self._handles:
            handle.remove()

    def _arrived(self, parameter: Tensor) -> None:
        self._look()
        if parameter not in self._seen and parameter.grad is not None:  # later pieces add to the same
            self._seen.add(parameter)
            self._held += _in_blocks(parameter.grad.untyped_storage().nbytes(), BLOCK_BYTES)

    def _look(self) -> None:
        peak = torch.cuda.max_memory_allocated(self._device)
        if peak > self._peak:
            self._peak, self.at_peak_bytes = peak, self._held


def _in_blocks(size: int, block: int) -> int:
    return -(-size // block) * block


# --- the tracker -----------------------------------------------------------------------------------


def tracked_peaks(step: Callable[[], object], owners: tuple[Owner, ...]) -> tuple[int, dict[str, int]]:
    """Run ``step`` once; return its peak in bytes, and the bytes of that peak by part.

    The tracker counts each storage once: what ``owners`` hold before the step, and all that operations
    return. It does not see temporaries inside one operation of torch. Parts are parameter, buffer, gradient,
    activation, temp (of the backward), optstate and other (batches).
    """
    modules_and_optimizers = [owner for owner in owners if not isinstance(owner, list)]
    tensors = [t for owner in owners if isinstance(owner, list) for batch in owner for t in batch.values()]
    tracker = _PeakTracker()
    tracker.track_external(*modules_and_optimizers, *tensors)
    with tracker, _see_inside_operators():
        step()
    by_part: dict[str, int] = {}
    for parts in tracker.get_tracker_snapshot("peak").values():
        for part, size in parts.items():
            name = str(getattr(part, "value", part)).lower()
            by_part[name] = by_part.get(name, 0) + int(size)
    return by_part.pop("total"), by_part


class _NoHook:
    def remove(self) -> None:
        """Do nothing."""


class _PeakTracker(MemTracker):
    """A tracker of the whole peak only; torch's tracker also keeps the peak of each module.

    It also accepts frozen parameters, and models that are called more than once in a step.
    """

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        for parameter in module.parameters():
            if not parameter.requires_grad:  # torch's tracker would fail to put its hook there
                self._param_to_grad_hook_handles.setdefault(parameter, (_NoHook(), _NoHook()))
        return super()._track_module_params_and_buffers(module, install_grad_hooks)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if not self._mod_tracker.is_bw and len(self._mod_tracker.parents) == 2:  # "Global" and itself
            self.reset_mod_stats()  # a step in pieces calls the model again, which torch refuses
        super()._pre_fw_hook(module, inputs)

    def _update_peak_stats(self, peak_state: Any) -> None:
        del peak_state
        for device, parts in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < parts["Total"]:
                self._peak_mem[device] = parts["Total"]
                self._peak_mem_snap[device] = dict(parts)


def _see_inside_operators() -> TorchDispatchMode:
    """Return a mode that runs operators written in Python step by step, so that outer modes see inside.

    The chunked head of torch 2.13 is such an operator. As a whole, its chunks of logits would be missed.
    """

    class SeeInside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            del types
            operator = OPDEFS.get(func._schema.name) if hasattr(func, "_schema") else None
            return (operator._init_fn if operator else func)(*args, **(kwargs or {}))

    return SeeInside()


# --- the prediction ---------------------------------------------------------------------------------


class CannotPredict(RuntimeError):
    """A coupler reads the numbers in its tensors, so its memory is known only by running it."""


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

    The step is that of ``training_step``: forward, backward, clipping and update with the optimizer's state
    in place, in pieces of ``micro_batch_size`` if given. Form and precision are those of ``execution`` (its
    defaults if None), uncompiled. On the CPU (the default device) the result equals what ``TrackedMeter``
    reads of the real step (under autocast to 0.1%). For another device it is the allocated bytes with
    cuBLAS's workspaces, but without the allocator's reserve and the context. No tensor gets memory, and no
    random number is drawn.

    The head works in chunks, so the time grows with the tokens. Above ``EXACT_TOKENS`` the peak is
    extrapolated along a line through two smaller batches: at each moment of a step the memory is a linear
    function of the batch size. The peak is therefore convex, and lies on the line unless another moment of
    the step becomes the peak further out.

    Source: ``torch.distributed._tools.mem_tracker`` under ``torch._subclasses.FakeTensorMode``.

    Raises:
        CannotPredict: the coupler's operations depend on the numbers in its tensors.
        ValueError: ``length`` is more than the model's ``max_seq_length``.
    """
    how = Execution(execution or ExecutionConfig(), device or torch.device("cpu"))
    step = _FakeStep(model_config, length, training, how)
    library = 2 * cublas_workspace_bytes(how.device)  # one each for the threads of forward and backward
    split = micro_batch_size is not None and micro_batch_size < batch_size
    if batch_size * length <= EXACT_TOKENS:
        return step.peak(batch_size, micro_batch_size) + library
    if not split:
        return step.along_a_line(batch_size, pieces=1) + library
    assert micro_batch_size is not None
    tokens_alone = (batch_size - 2 * micro_batch_size) * length  # ids and targets of the pieces that wait
    return step.along_a_line(micro_batch_size, pieces=2) + 2 * 8 * tokens_alone + library


def cublas_workspace_bytes(device: torch.device) -> int:
    """Return the bytes that a thread's cuBLAS handle takes from torch's allocator with its first product.

    Source: ``getChosenWorkspaceSize`` in PyTorch's ``aten/src/ATen/cuda/CublasHandlePool.cpp``; the
    32 MiB were also seen on an H100. ``CUBLAS_WORKSPACE_CONFIG`` changes it.
    """
    if device.type != "cuda":
        return 0
    return 32 * 2**20 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 8320 * 2**10


@dataclass(frozen=True)
class _FakeStep:
    """Training steps of one model at one length, on tensors without data."""

    config: GNNMoEConfig
    length: int
    training: TrainingConfig
    execution: Execution

    def along_a_line(self, rows: int, pieces: int) -> int:
        """Return the peak of ``pieces`` pieces of ``rows`` rows; it is exact for few rows."""
        high = max(2, EXACT_TOKENS // (pieces * self.length))
        if rows <= high:
            return self._known(rows, pieces)
        low = high // 2
        top, bottom = self._known(high, pieces), self._known(low, pieces)
        return top + (top - bottom) * (rows - high) // (high - low)

    def _known(self, rows: int, pieces: int) -> int:
        """Return a peak, computed once: a search asks for many sizes on one line."""
        key = repr((self, rows, pieces))
        if key not in _KNOWN:
            _KNOWN[key] = self.peak(rows * pieces, rows)
        return _KNOWN[key]

    def peak(self, batch_size: int, micro_batch_size: int | None) -> int:
        """Return the peak of a step, which runs on tensors without data."""
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
        model(ids[:1, :1])  # a real step finds what a coupler makes on its first call

        def step() -> None:
            training_step(model, batch, optimizer, self.training.max_grad_norm, micro_batch_size)

        return tracked_peaks(step, (model, optimizer, [batch]))[0]
