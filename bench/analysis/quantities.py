"""Ratios from a record's raw sums, so that a definition can be mended without running again.

Every function returns None where the record has no reading.
"""

from __future__ import annotations

import statistics

from bench.measure import rates
from bench.record import Marginal, Record, is_measured
from bench.record import exp_or_infinity as exp_or_infinity


def perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / N) over the tokens of ``split`` that were scored."""
    return _per(record, split, "tokens")


def word_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / N_word): for a model of subwords what ``perplexity`` is for one of words.

    None also where no whole word was scored.
    """
    return _per(record, split, "words")


def bits_per_byte(record: Record, split: str = "validation") -> float | None:
    """Return Σ nll / (ln 2 · bytes of the text scored); None also as ``why_no_bits_per_byte`` says."""
    scored = record.split(split)
    return scored.bits_per_byte if scored and is_measured(scored.bits_per_byte) else None


def why_no_bits_per_byte(record: Record, split: str = "validation") -> str | None:
    """Return why a split that was scored has no bits per byte; None where it has."""
    scored = record.split(split)
    if scored is None:
        return "not scored"
    return None if is_measured(scored.bits_per_byte) else scored.bits_per_byte.reason


def unknown_words_share(record: Record, split: str = "validation") -> float | None:
    """Return the share of the scored tokens that are ``<unk>`` in place of another word."""
    scored = record.split(split)
    return None if scored is None else scored.unknown_words / scored.tokens


def unigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of the training split's unigram on exactly the same tokens."""
    return _per(record, split, "tokens", "unigram_nll_sum")


def trigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of a Kneser-Ney trigram (discount 0.75) on exactly the same tokens."""
    return _per(record, split, "tokens", "kneser_ney_trigram_nll_sum")


def _per(record: Record, split: str, per: str, sum_of: str = "nll_sum") -> float | None:
    scored = record.split(split)
    nll, count = getattr(scored, sum_of, None), getattr(scored, per, 0)
    return None if nll is None or not count else exp_or_infinity(nll / count)


def tokens_per_second(record: Record) -> float | None:
    """Return the tokens of all timed steps over the seconds of all timed steps."""
    return record.speed.tokens_per_second if is_measured(record.speed) else None


def median_step_seconds(record: Record) -> float | None:
    """Return the median time of a training step in seconds."""
    return record.speed.median_step_seconds if is_measured(record.speed) else None


def utilisation(record: Record) -> float | None:
    """Return the model's FLOPs as a share of those of a large matrix product on the same device (MFU)."""
    speed, flops = record.speed, record.flops
    if not is_measured(speed) or not is_measured(flops) or not is_measured(speed.matrix_flops_per_second):
        return None
    flops_per_second = speed.tokens_per_second * flops.training_flops_per_token
    return rates.utilisation(flops_per_second, speed.matrix_flops_per_second)


def data_share(record: Record) -> float | None:
    """Return the median time of fetching a batch as a share of a median step: what waiting takes at most."""
    speed = record.speed
    if not is_measured(speed) or speed.fetch_seconds is None:
        return None
    return statistics.median(speed.fetch_seconds) / speed.median_step_seconds


def marginal(record: Record) -> Marginal | None:
    """Return what the coupler alone costs, timed in turn with the mean coupler."""
    speed = record.speed
    return speed.marginal if is_measured(speed) and is_measured(speed.marginal) else None


def peak_memory_bytes(record: Record) -> int | None:
    """Return the peak of allocated memory in a training step, in bytes."""
    memory = record.memory
    if not is_measured(memory) or not is_measured(memory.peak_allocated_bytes):
        return None
    return memory.peak_allocated_bytes
