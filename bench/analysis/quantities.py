"""Ratios from a record's raw sums, so that a definition can be mended without running again.

Every function returns None where the record has no reading.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from bench.measure import rates
from bench.measure.quantity import is_measured
from bench.records.schema import Record


def perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / N) over the tokens of ``split`` that were scored."""
    return _perplexity(record, split, "nll_sum")


def word_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / N_word): for a model of subwords what ``perplexity`` is for one of words."""
    return _perplexity(record, split, "nll_sum", "words")


def byte_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / bytes of the text scored)."""
    return _perplexity(record, split, "nll_sum", "bytes")


def bits_per_byte(record: Record, split: str = "validation") -> float | None:
    """Return Σ nll / (ln 2 · bytes of the text scored)."""
    value = byte_perplexity(record, split)
    return None if value is None else math.log2(value)


def unigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of the training split's unigram on exactly the same tokens."""
    return _perplexity(record, split, "unigram_nll_sum")


def trigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of a Kneser-Ney trigram (discount 0.75) on exactly the same tokens."""
    return _perplexity(record, split, "kneser_ney_trigram_nll_sum")


def _perplexity(record: Record, split: str, key: str, per: str = "tokens") -> float | None:
    quality = record["quality"]
    if not is_measured(quality) or not is_measured(quality[split]) or not {key, per} <= quality[split].keys():
        return None
    return exp_or_infinity(quality[split][key] / quality[split][per])


def exp_or_infinity(nats: float) -> float:
    """Return exp(nats), infinity where no float is so large."""
    return math.exp(nats) if nats < 700 else math.inf


def tokens_per_second(record: Record) -> float | None:
    """Return the tokens of all timed steps over the seconds of all timed steps."""
    speed = record["speed"]
    if not is_measured(speed):
        return None
    return rates.tokens_per_second(speed["step_tokens"], speed["step_seconds"])


def median_step_seconds(record: Record) -> float | None:
    """Return the median time of a training step in seconds."""
    speed = record["speed"]
    return statistics.median(speed["step_seconds"]) if is_measured(speed) else None


def utilisation(record: Record) -> float | None:
    """Return the model's FLOPs as a share of those of a large matrix product on the same device (MFU)."""
    rate, tokens, flops = (
        of_speed(record, "matrix_flops_per_second"),
        tokens_per_second(record),
        record["flops"],
    )
    if rate is None or tokens is None or not is_measured(flops):
        return None
    return rates.utilisation(tokens * flops["training_flops_per_token"], rate)


def data_share(record: Record) -> float | None:
    """Return the median time of fetching a batch as a share of a median step: what waiting takes at most."""
    fetches, step = of_speed(record, "fetch_seconds"), median_step_seconds(record)
    return None if not fetches or step is None else statistics.median(fetches) / step


def of_speed(record: Record, name: str) -> Any:
    """Return a part of the speed pass; records from before it had that part, and others, have None."""
    part = record["speed"].get(name) if is_measured(record["speed"]) else None
    return part if is_measured(part) else None


def peak_memory_bytes(record: Record) -> int | None:
    """Return the peak of allocated memory in a training step, in bytes."""
    memory = record["memory"]
    if not is_measured(memory) or not is_measured(memory["peak_allocated_bytes"]):
        return None
    return memory["peak_allocated_bytes"]
