"""The speed of the loader, and a count of what it serves against what the arithmetic expects."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data.blocks import batch_bytes
from bench.data.corpus import Corpus
from bench.data.loader import BlockLoader, create_loader, set_epoch, validate_first_batch
from gnnmoe.head import IGNORED

LIMIT_MS = 5.0
"""Limit of the p95 of fetching a batch of 32 × 128; a larger batch may take longer in proportion."""
_LIMIT_TOKENS = 32 * 128


@dataclass(frozen=True)
class LoaderCheck:
    """One quantity: its expected value, and its value counted from the tensors."""

    name: str
    expected: int | float
    got: int | float
    at_most: bool = False

    @property
    def passed(self) -> bool:
        """Whether both are equal, or the value is below the limit if ``expected`` is a limit."""
        return self.got < self.expected if self.at_most else self.got == self.expected


@dataclass(frozen=True)
class LoaderProfile:
    """The times and checks of one profile.

    Shapes: ``fetch_seconds`` (batches,), from asking for a batch until the batch is on the device.
    """

    prepare_seconds: float
    fetch_seconds: np.ndarray
    tokens: int
    checks: tuple[LoaderCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def milliseconds(self) -> dict[str, float]:
        """Return mean, p50, p95 and max of fetching a batch."""
        ms = self.fetch_seconds * 1e3
        p50, p95 = np.percentile(ms, [50, 95])
        return {"mean": float(ms.mean()), "p50": float(p50), "p95": float(p95), "max": float(ms.max())}

    @property
    def tokens_per_second(self) -> float:
        """Target tokens per second of fetching."""
        return self.tokens / float(self.fetch_seconds.sum())


def profile_loader(
    corpus: Corpus,
    *,
    batch_size: int = 32,
    max_seq_length: int = 128,
    num_workers: int | str = 0,
    batches: int = 200,
    device: torch.device | None = None,
    corpus_seconds: float = 0.0,
) -> LoaderProfile:
    """Time ``batches`` training batches over as many epochs as needed, and count whole epochs.

    The counts cover one epoch of training with ``drop_last``, one without it, and one of validation. Fetching
    includes the copy to ``device``. ``corpus_seconds`` is added to the time of preparing.

    Raises:
        Refused: as ``create_loader`` does.
    """
    start = time.perf_counter()
    device = device or torch.device("cpu")
    options: dict[str, Any] = {
        "max_seq_length": max_seq_length,
        "num_workers": num_workers,
        "pin_memory": device.type == "cuda",
    }
    loader = create_loader(corpus, "train", batch_size, **options)
    validate_first_batch(loader)
    seconds = corpus_seconds + time.perf_counter() - start
    timed = list(_timed(loader, batches, device))
    fetch = np.array([taken for taken, _, _ in timed])
    limit = LIMIT_MS * max(1.0, batch_size * max_seq_length / _LIMIT_TOKENS)
    checks = [
        LoaderCheck(
            "bytes per batch", batch_bytes(batch_size, max_seq_length), max(size for _, _, size in timed)
        ),
        LoaderCheck("p95 ms per batch", limit, float(np.percentile(fetch, 95)) * 1e3, at_most=True),
    ]
    checks += _training_checks(corpus, loader, batch_size, "drop_last")
    every = create_loader(corpus, "train", batch_size, drop_last=False, **options)
    checks += _training_checks(corpus, every, batch_size, "all")
    windows = create_loader(corpus, "val", batch_size, **options)
    tokens = corpus.splits["validation"].num_tokens
    expected = [-(-tokens // max_seq_length), tokens]
    checks += _compare("validation", ["windows", "tokens"], expected, _count(windows)[1:])
    return LoaderProfile(seconds, fetch, sum(tokens for _, tokens, _ in timed), tuple(checks))


def _timed(loader: BlockLoader, batches: int, device: torch.device) -> Iterator[tuple[float, int, int]]:
    """Yield (seconds, target tokens, bytes) of each batch; an epoch's first time includes its order."""
    done, epoch = 0, 0
    while done < batches:
        set_epoch(loader, epoch)
        start = time.perf_counter()
        for batch in loader:
            fetched = _on(device, batch)
            taken = time.perf_counter() - start
            yield taken, int((batch["targets"] != IGNORED).sum()), _bytes(fetched)
            done += 1
            if done == batches:
                break
            start = time.perf_counter()
        epoch += 1


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if device.type == "cpu":
        return batch
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return moved


def _bytes(batch: dict[str, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in batch.values())


def _training_checks(corpus: Corpus, loader: BlockLoader, batch_size: int, name: str) -> list[LoaderCheck]:
    """Compare an epoch with the counts that follow from the number of tokens of the split."""
    length = loader.dataset_obj.length
    blocks = corpus.splits["train"].num_tokens // length
    samples = blocks - blocks % batch_size if loader.sampler_obj.drop_last else blocks
    expected = [-(-samples // batch_size), samples, samples * length]
    return _compare(f"train, {name}", ["batches", "samples", "tokens"], expected, _count(loader))


def _compare(what: str, names: list[str], expected: list[int], got: list[int]) -> list[LoaderCheck]:
    rows = zip(names, expected, got, strict=True)
    return [LoaderCheck(f"{what}: {name}", want, have) for name, want, have in rows]


def _count(loader: BlockLoader) -> list[int]:
    """Return the batches, samples and target tokens of one epoch, counted from the tensors."""
    counts = [0, 0, 0]
    for batch in loader:
        counts[0] += 1
        counts[1] += len(batch["input_ids"])
        counts[2] += int((batch["targets"] != IGNORED).sum())
    return counts
