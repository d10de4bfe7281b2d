"""What the device can do, measured in this process: the rates under every floor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.measure.environment import device_name
from bench.measure.floors import Rates
from bench.measure.timing import copy_bandwidth, matrix_rate

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


class Machine:
    """A device and its rates, each measured when it is first asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, device_name(device)
        self._bandwidth: float | None = None
        self._rates: dict[str, Rates] = {}

    def rates(self, precision: str) -> Rates:
        """Return FLOP/s of a matrix product in this precision, and bytes/s of a copy."""
        if self._bandwidth is None:
            self._bandwidth = copy_bandwidth(self.device)
        if precision not in self._rates:
            with products_in(precision):
                rate = matrix_rate(self.device, DTYPES[precision])
            self._rates[precision] = Rates(rate, self._bandwidth)
        return self._rates[precision]

    def to_record(self) -> dict[str, Any]:
        """Return what was measured of the device."""
        flops = {precision: rates.flops_per_second for precision, rates in self._rates.items()}
        return {"device": self.name, "copy_bytes_per_second": self._bandwidth,
                "matrix_flops_per_second": flops}  # fmt: skip

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let float32 matrix products run in TF32, or in float32 alone; bf16 is autocast's, in the forward."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
