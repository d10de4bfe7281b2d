"""A batch size that changes by epoch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gnnmoe.config import Refused

_FORM = 'write "epoch:size" pairs in rising order from epoch 0, such as "0:16,2:32"'


@dataclass(frozen=True)
class BatchSchedule:
    """The batch size of every epoch: ``sizes`` holds (first epoch, samples a batch), the first at epoch 0.

    Raises Refused for a schedule without epoch 0, out of order, or with a size below 1.
    """

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.sizes]
        if epochs[:1] != [0] or epochs != sorted(set(epochs)):
            raise Refused(f"batch schedule {self} has the epochs {epochs}; {_FORM}")
        small = [size for _, size in self.sizes if size < 1]
        if small:
            raise Refused(f"batch schedule {self} has the size {small[0]}; a size must be 1 or more")

    @classmethod
    def parse(cls, text: str) -> BatchSchedule:
        """Return the schedule of a text such as ``"0:16,2:32"``: 16 from epoch 0 on, 32 from epoch 2 on."""
        pairs = []
        for part in text.split(","):
            if not re.fullmatch(r"\s*[0-9]+\s*:\s*[0-9]+\s*", part):
                raise Refused(f"batch schedule {text!r}: {part!r} is no epoch:size; {_FORM}")
            epoch, size = part.split(":")
            pairs.append((int(epoch), int(size)))
        return cls(tuple(pairs))

    def __str__(self) -> str:
        return ",".join(f"{epoch}:{size}" for epoch, size in self.sizes)

    def size(self, epoch: int) -> int:
        """Return the samples a batch in ``epoch``."""
        return next(size for first, size in reversed(self.sizes) if first <= epoch)

    def simplified(self, epochs: int | None = None) -> BatchSchedule:
        """Return the schedule without what changes no size, in the first ``epochs`` where given."""
        reached = [pair for pair in self.sizes if epochs is None or pair[0] < max(1, epochs)]
        sizes = [None, *(size for _, size in reached)]
        return BatchSchedule(
            tuple(pair for pair, before in zip(reached, sizes, strict=False) if pair[1] != before)
        )
