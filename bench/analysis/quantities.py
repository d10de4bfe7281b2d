"""Ratios from a record's raw sums, so that a definition can be mended without running again.

Every function returns None where the record has no reading.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from bench.measure import rates
from bench.measure.quantity import exp_or_infinity as exp_or_infinity
from bench.measure.quantity import is_measured
from bench.records.schema import Record


def perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / N) over the tokens of ``split`` that were scored."""
    return _perplexity(record, split, "nll_sum")


def word_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / N_word): for a model of subwords what ``perplexity`` is for one of words.

    None also where no whole word was scored.
    """
    return _perplexity(record, split, "nll_sum", "words")


def bits_per_byte(record: Record, split: str = "validation") -> float | None:
    """Return Σ nll / (ln 2 · bytes of the text scored); None also as ``why_no_bits_per_byte`` says."""
    scored = _scored(record, split)
    if scored is None or why_no_bits_per_byte(record, split):
        return None
    return scored["nll_sum"] / (math.log(2) * scored["bytes"])


def why_no_bits_per_byte(record: Record, split: str = "validation") -> str | None:
    """Return why a split that was scored has no bits per byte; None where it has.

    A word that stands as ``<unk>`` was not predicted, but its bytes would count.
    """
    scored = _scored(record, split)
    if scored is None or "bytes" not in scored:
        return "not scored"
    if scored["unknown_words"]:
        return "unknown words were not predicted"
    return None if scored["bytes"] else "the scored tokens cover no byte of the text"


def unknown_words_share(record: Record, split: str = "validation") -> float | None:
    """Return the share of the scored tokens that are ``<unk>`` in place of another word."""
    scored = _scored(record, split)
    return None if scored is None else scored["unknown_words"] / scored["tokens"]


def unigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of the training split's unigram on exactly the same tokens."""
    return _perplexity(record, split, "unigram_nll_sum")


def trigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of a Kneser-Ney trigram (discount 0.75) on exactly the same tokens."""
    return _perplexity(record, split, "kneser_ney_trigram_nll_sum")


def _perplexity(record: Record, split: str, key: str, per: str = "tokens") -> float | None:
    scored = _scored(record, split)
    if scored is None or key not in scored or not scored.get(per):
        return None
    return exp_or_infinity(scored[key] / scored[per])


def _scored(record: Record, split: str) -> dict[str, Any] | None:
    """Return the raw sums of a split, None where it was not scored."""
    quality = record["quality"]
    return quality[split] if is_measured(quality) and is_measured(quality[split]) else None


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
