"""How a batch is cut: micro-batch × accumulation × ranks = the configured batch, always."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from gnnmoe.config import Refused


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, rising."""
    return [size for size in range(1, number + 1) if number % size == 0]


def accumulations(
    batch_sizes: Sequence[int], micro_batch_size: int, world_size: int = 1, name: str = "micro_batch_size"
) -> list[int]:
    """Return how many micro-batches a rank runs for one update, for each of several global batch sizes.

    Raises:
        Refused: they do not multiply up to a batch; names the nearest micro-batch that does.
    """
    named = " and ".join(map(str, dict.fromkeys(batch_sizes)))
    share, rest = divmod(gcd(*batch_sizes), world_size)
    if rest:
        raise Refused(f"a batch of {named} cannot be shared evenly by {world_size} ranks.")
    if micro_batch_size < 1 or share % micro_batch_size:
        nearest = min(divisors(share), key=lambda size: abs(size - micro_batch_size))
        ranks = f" on {world_size} ranks" if world_size > 1 else ""
        raise Refused(
            f"{name} is {micro_batch_size}, which does not divide the batch of {named}{ranks}; "
            f"the nearest that does is {nearest}."
        )
    return [size // (micro_batch_size * world_size) for size in batch_sizes]


def next_smaller(batch_size: int, micro_batch_size: int) -> int | None:
    """Return the largest divisor of the batch that is half the micro-batch or less; None below 1."""
    smaller = [size for size in divisors(batch_size) if size <= micro_batch_size // 2]
    return smaller[-1] if smaller else None
