"""The quantities of a run: how each is read from a record, named, shown and compared. Also number formats.

Tables, plots, the page and ``compare`` take a quantity from its entry in ``QUANTITIES``; a new quantity needs
one entry. A reading is None where the record has none. Ratios are computed from the record's raw sums, so
that a definition can be corrected without a new run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.measure import rates
from bench.record import (
    Diagnostics,
    Marginal,
    NotMeasured,
    Record,
    SplitQuality,
    Time,
    exp_or_infinity,
    is_measured,
    number,
)
from bench.study.hypotheses import OF_EXPERTS

Interval = tuple[float, float]
Column = Literal["", "figures", "where measured", "shown"]
"""Where a table has a quantity: nowhere; in its csv; also in its text if a run has the quantity; in both."""


def signed(value: float | None, digits: int = 4) -> str:
    """Return a number with its sign: +0.0123."""
    return number(value, digits, sign="+")


def digits_for(width: float) -> int:
    """Return the digits after the point that show two digits of a difference this large, from 2 to 6."""
    return 2 if width <= 0 or not math.isfinite(width) else min(6, max(2, 1 - math.floor(math.log10(width))))


def percent(ratio: float | None, digits: int = 1) -> str:
    """Return by how many percent a ratio is above or below 1: +12.3%."""
    return "" if ratio is None else f"{signed(100 * (ratio - 1), digits)}%"


def share(value: float | None) -> str:
    """Return a share of 1 in percent: 31.4%."""
    return "" if value is None else f"{100 * value:.1f}%"


def span(interval: Interval | None, digits: int = 1, sign: bool = False) -> str:
    """Return an interval: [1.0, 2.0]."""
    show = signed if sign else number
    return "" if interval is None else f"[{', '.join(show(end, digits) for end in interval)}]"


def perplexities(interval: Interval | None) -> Interval | None:
    """Return exp of an interval of losses in nats."""
    return None if interval is None else (exp_or_infinity(interval[0]), exp_or_infinity(interval[1]))


def with_interval(loss: float | None, interval: Interval | None) -> str:
    """Return the perplexity of a mean loss in nats, with its interval: 123.4 [120.1, 126.8]."""
    value = None if loss is None else exp_or_infinity(loss)
    return f"{number(value)} {span(perplexities(interval))}".strip()


def mebibytes(value: float | None, sign: bool = False) -> str:
    """Return bytes in MiB: 160.5 MiB."""
    return "" if value is None else f"{(signed if sign else number)(value / 2**20, 1)} MiB"


def millions(value: float | None) -> str:
    """Return a count in millions: 15.58 M."""
    return "" if value is None else f"{number(value / 1e6, 2)} M"


def milliseconds(value: float | None) -> str:
    """Return seconds in milliseconds: 12.3 ms."""
    return "" if value is None else f"{number(1e3 * value, 1)} ms"


def whole(value: float | None) -> str:
    """Return a number without decimals: 12,345."""
    return number(value, 0)


def p_value(value: float | None) -> str:
    """Return a p-value with three decimals, or "< 0.001"."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 run, 2 runs."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def in_parts(time: Time) -> str:
    """Return " in 2 parts" for the time of a run that was stopped and resumed, else nothing."""
    parts = len(time.parts)
    return f" in {parts} parts" if parts > 1 else ""


def _per_token(nll_sum: float | None, scored: SplitQuality) -> float | None:
    return None if nll_sum is None else exp_or_infinity(nll_sum / scored.tokens)


def loss_nats(record: Record, split: str = "validation") -> float | None:
    """Return the mean loss in nats per token."""
    scored = record.split(split)
    return scored and scored.loss_nats


def perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / N) over the N scored tokens of ``split``."""
    scored = record.split(split)
    return scored and _per_token(scored.nll_sum, scored)


def word_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return exp(Σ nll / number of words), which compares subword models with word models.

    None also where no whole word was scored.
    """
    scored = record.split(split)
    return exp_or_infinity(scored.nll_sum / scored.words) if scored and scored.words else None


def unigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of the training split's unigram on the same tokens."""
    scored = record.split(split)
    return scored and _per_token(scored.unigram_nll_sum, scored)


def trigram_perplexity(record: Record, split: str = "validation") -> float | None:
    """Return the perplexity of a Kneser-Ney trigram (discount 0.75) on the same tokens."""
    scored = record.split(split)
    return scored and _per_token(scored.kneser_ney_trigram_nll_sum, scored)


def bits_per_byte(record: Record, split: str = "validation") -> float | None:
    """Return Σ nll / (ln 2 · bytes of the scored text); None also where ``why_no_bits_per_byte`` says why."""
    scored = record.split(split)
    return scored.bits_per_byte if scored and is_measured(scored.bits_per_byte) else None


def why_no_bits_per_byte(record: Record, split: str = "validation") -> str | None:
    """Return why there are no bits per byte; None where there are."""
    scored = record.split(split)
    if scored is None:
        return "not scored"
    return None if is_measured(scored.bits_per_byte) else scored.bits_per_byte.reason


def unknown_words_share(record: Record, split: str = "validation") -> float | None:
    """Return the share of the scored tokens that are ``<unk>`` in place of a word."""
    scored = record.split(split)
    return scored and scored.unknown_words / scored.tokens


def tokens_per_second(record: Record) -> float | None:
    """Return the tokens of all timed steps per second of all timed steps."""
    return record.speed.tokens_per_second if is_measured(record.speed) else None


def median_step_seconds(record: Record) -> float | None:
    """Return the median time of a training step in seconds."""
    return record.speed.median_step_seconds if is_measured(record.speed) else None


def utilisation(record: Record) -> float | None:
    """Return the model's FLOP/s as a share of those of a large matrix product on the same device (MFU)."""
    speed, flops = record.speed, record.flops
    if not is_measured(speed) or not is_measured(flops) or not is_measured(speed.matrix_flops_per_second):
        return None
    flops_per_second = speed.tokens_per_second * flops.training_flops_per_token
    return rates.utilisation(flops_per_second, speed.matrix_flops_per_second)


def data_share(record: Record) -> float | None:
    """Return the median time to fetch a batch as a share of a median step."""
    speed = record.speed
    if not is_measured(speed) or speed.fetch_seconds is None:
        return None
    return statistics.median(speed.fetch_seconds) / speed.median_step_seconds


def marginal(record: Record) -> Marginal | None:
    """Return the cost of the coupler alone, timed alternately with the mean coupler."""
    speed = record.speed
    return speed.marginal if is_measured(speed) and is_measured(speed.marginal) else None


def peak_memory_bytes(record: Record) -> int | None:
    """Return the peak of allocated memory in a training step, in bytes."""
    memory = record.memory
    if not is_measured(memory) or not is_measured(memory.peak_allocated_bytes):
        return None
    return memory.peak_allocated_bytes


def parameters(record: Record) -> int | None:
    """Return the number of parameters of the model."""
    return record.parameters.total if is_measured(record.parameters) else None


def coupler_parameters(record: Record) -> int | None:
    """Return the number of parameters of all couplers of the model."""
    return record.parameters.coupler if is_measured(record.parameters) else None


def training_flops_per_token(record: Record) -> float | None:
    """Return the FLOPs per token of a training step."""
    return record.flops.training_flops_per_token if is_measured(record.flops) else None


def of_experts(record: Record, name: str) -> float | NotMeasured:
    """Return a figure of ``record.diagnostics`` by its name, or the reason why there is none."""
    found = record.diagnostics
    return getattr(found, name) if is_measured(found) else found


class Rise(NamedTuple):
    """By how much the loss rises when the mean of the other experts replaces one expert."""

    nats: float
    standard_error: float
    layer: int
    expert: int


def rises(found: Diagnostics) -> list[Rise]:
    """Return the rise of the loss for every expert of every layer."""
    return [
        Rise(nats, error, number, expert)
        for number, layer in enumerate(found.layers)
        for expert, (nats, error) in enumerate(
            zip(layer.ablation_nats, layer.ablation_standard_error, strict=True)
        )
    ]


def largest_rise(found: Diagnostics) -> Rise:
    """Return the largest rise of the loss over all experts and layers."""
    return max(rises(found), key=lambda rise: rise.nats)


def _diagnostics_share(record: Record) -> float | None:
    return record.diagnostics.share_of_run if is_measured(record.diagnostics) else None


@dataclass(frozen=True)
class Quantity:
    """One quantity of a run."""

    name: str
    """The name of its column in csv files, with the unit."""
    title: str
    """The heading of its column in tables for people."""
    read: Callable[[Record], float | None]
    show: Callable[[float | None], str] = number
    better: Literal["lower", "higher", ""] = ""
    """Which direction is better; empty where neither is."""
    runs: Column = ""
    """Its column in the table of runs."""
    comparison: Column = ""
    """Its column in the table of a comparison, as the mean over seeds."""
    of_model: bool = False
    """Whether it is equal for all runs of a configuration, also for failed runs."""
    limit: str = ""
    """Its name in ``compare`` and ``--fail-if``; empty: it is not compared."""
    axis: str = ""
    """The label of its axis in plots, and its name in sentences."""
    scale: float = 1.0
    """By which a value is multiplied on that axis."""

    @property
    def axis_label(self) -> str:
        """The label of its axis, with the direction that is better."""
        return f"{self.axis}; {self.better} is better" if self.better else self.axis


def _of_test(read: Callable[[Record, str], float | None]) -> Callable[[Record], float | None]:
    return lambda record: read(record, "test")


def _of_experts(name: str, title: str, words: str, digits: int = 2) -> Quantity:
    """Return a quantity of the experts, which is compared by its difference: no direction is better."""

    def read(record: Record) -> float | None:
        value = of_experts(record, name)
        return value if is_measured(value) else None

    def show(value: float | None) -> str:
        return number(value, digits)

    return Quantity(name, title, read, show, runs="figures", comparison="figures", axis=words)


EXPERTS = {
    found.name: found
    for found in (
        _of_experts("expert_cosine", "cosine", "cosine of experts' updates"),
        _of_experts("expert_cka", "CKA", "CKA of experts' updates"),
        _of_experts("effective_rank", "effective rank", "effective rank of experts' updates"),
        _of_experts("ablation_nats", "mean rise (nats)", "rise of the loss without an expert (nats)", 4),
        _of_experts("mutual_information", "mutual information (nats)", "mutual information (nats)", 3),
        _of_experts("effective_experts", "effective experts", "effective number of experts"),
    )
}
"""The quantities of what the experts learned, by name: those of a hypothesis (``OF_EXPERTS``)."""
assert tuple(EXPERTS) == OF_EXPERTS
UNKNOWN_WORDS = Quantity(
    "unknown_words_share", "unknown words", unknown_words_share, share, runs="where measured"
)
TEST_UNKNOWN_WORDS = Quantity(
    "test_unknown_words_share", "unknown words, test", _of_test(unknown_words_share), share, runs="figures"
)
TOKENS_PER_SECOND = Quantity(
    "tokens_per_second",
    "tokens/s",
    tokens_per_second,
    whole,
    "higher",
    limit="tokens/s",
    axis="tokens/s in training",
    runs="shown",
    comparison="shown",
)
STEP_SECONDS = Quantity(
    "median_step_seconds",
    "step",
    median_step_seconds,
    milliseconds,
    "lower",
    limit="step_time",
    axis="median training step (ms)",
    scale=1e3,
)
PEAK_MEMORY = Quantity(
    "peak_memory_bytes",
    "peak memory",
    peak_memory_bytes,
    mebibytes,
    "lower",
    limit="memory",
    axis="peak memory (MiB)",
    scale=2**-20,
    runs="shown",
    comparison="shown",
)
PARAMETERS = Quantity(
    "parameters",
    "parameters",
    parameters,
    whole,
    "lower",
    limit="parameters",
    axis="parameters (millions)",
    scale=1e-6,
    runs="figures",
    comparison="shown",
    of_model=True,
)
TRAINING_FLOPS = Quantity(
    "training_flops_per_token",
    "FLOPs per token",
    training_flops_per_token,
    millions,
    "lower",
    axis="training FLOPs per token (millions)",
    scale=1e-6,
    runs="figures",
    comparison="shown",
    of_model=True,
)
QUANTITIES = (
    Quantity("perplexity", "perplexity", perplexity, number, "lower", runs="shown"),
    Quantity("loss", "loss", loss_nats, number, "lower", runs="figures"),
    Quantity(
        "test_perplexity",
        "test perplexity",
        _of_test(perplexity),
        number,
        "lower",
        limit="test_perplexity",
        runs="figures",
    ),
    UNKNOWN_WORDS,
    TEST_UNKNOWN_WORDS,
    Quantity("bits_per_byte", "bits per byte", bits_per_byte, number, "lower", runs="figures"),
    TOKENS_PER_SECOND,
    Quantity("matrix_utilisation", "MFU", utilisation, share, "higher", runs="where measured"),
    STEP_SECONDS,
    PEAK_MEMORY,
    PARAMETERS,
    Quantity(
        "coupler_parameters",
        "coupler parameters",
        coupler_parameters,
        whole,
        comparison="figures",
        of_model=True,
    ),
    TRAINING_FLOPS,
    *EXPERTS.values(),
    Quantity("diagnostics_share_of_run", "time for the experts", _diagnostics_share, share, runs="figures"),
)
"""Every quantity, in the order in which tables have their columns."""
