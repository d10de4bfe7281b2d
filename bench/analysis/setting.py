"""What must be equal for the numbers of two runs to stand in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.analysis.numbers import share
from bench.record import Record, is_measured


@dataclass(frozen=True)
class Setting:
    """What must be equal for numbers to share a table; None where a run did not get far enough to tell."""

    corpus: tuple[Any, ...] | None
    """Name, configuration, tokenizer, hash."""
    device: tuple[Any, ...] | None
    """Type, name, on a CPU the number of threads, and the ranks: sums and speeds differ with both."""
    protocol: tuple[Any, ...] | None
    """Tokens scored, length, stride and unknown words of the final validation."""
    used: tuple[Any, ...] | None
    """Batch sizes that were used, and lengths: several where a controller changed it."""
    asked: tuple[Any, ...] | None = None
    """Batch size and length that were asked for: not always what was used, since a size can be tuned."""

    @classmethod
    def of(cls, record: Record, allow_unequal: bool) -> Setting:
        """Return the setting of a run; with ``allow_unequal`` protocol and used sizes count as equal."""
        protocol, used = (None, None) if allow_unequal else (_protocol(record), _used(record))
        wanted = None if allow_unequal else asked(record)
        return cls(_corpus(record), _device(record), protocol, used, wanted)

    @property
    def unknown(self) -> int:
        """How many parts a run did not get far enough to tell."""
        return self._parts().count(None)

    def fits(self, other: Setting) -> bool:
        """Whether the two agree in everything that both know."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return all(a is None or b is None or a == b for a, b in pairs)

    def _parts(self) -> list[tuple[Any, ...] | None]:
        return [self.corpus, self.device, self.protocol, self.used]

    def corpus_words(self) -> str:
        """Return the corpus in words, empty where it is not known."""
        if not self.corpus:
            return ""
        name, config_name, tokenizer, sha256 = self.corpus
        return f"{' '.join(part for part in (name, config_name) if part)} ({tokenizer}, {sha256[:12]})"

    def device_words(self) -> str:
        """Return the device in words, empty where it is not known."""
        if not self.device:
            return ""
        kind, name, threads, ranks = self.device
        one = f"{name}, {threads} thread{'s' * (threads > 1)}" if threads else f"{kind}: {name}"
        return f"{one}, {ranks} ranks" if ranks > 1 else one

    def scored_words(self) -> str:
        """Return what was scored in words, empty where nothing was."""
        if not self.protocol:
            return ""
        tokens, length, stride, unknown = self.protocol
        words = f" ({share(unknown / tokens)} of them unknown words)" if unknown else ""
        return f"{tokens:,} tokens{words} at length {length}, stride {stride}"

    def words(self) -> str:
        """Return the setting in words."""
        parts = [self.corpus_words(), self.device_words()]
        if self.protocol:
            parts.append(f"scored on {self.scored_words()}")
        if self.used:
            sizes, lengths = (" and ".join(map(str, numbers)) for numbers in self.used)
            parts.append(f"batch {sizes} × {lengths}")
        elif self.asked:
            parts.append("batch {} × {} asked for".format(*self.asked))
        return " · ".join(filter(None, parts)) or "nothing measured"


def asked(record: Record) -> tuple[Any, ...]:
    """Return the batch size and the length that a run asked for."""
    return record.config.batch_size, record.config.max_seq_length


def _corpus(record: Record) -> tuple[Any, ...] | None:
    data = record.data
    return (data.name, data.config_name, data.tokenizer, data.sha256) if is_measured(data) else None


def _device(record: Record) -> tuple[Any, ...] | None:
    environment = record.environment
    if not is_measured(environment):
        return None
    threads = environment.threads if environment.device_type == "cpu" else None
    return environment.device_type, environment.device_name, threads, environment.world_size


def _protocol(record: Record) -> tuple[Any, ...] | None:
    scored = record.split()
    return scored and (scored.tokens, scored.length, scored.stride, scored.unknown_words)


def _used(record: Record) -> tuple[Any, ...] | None:
    """Return the batch sizes and the lengths that were used; None where the run did not train."""
    used = record.used
    sizes = {epoch.batch_size for epoch in used.ledger.epochs} if is_measured(used) else set()
    if not sizes or not is_measured(used):
        return None
    return tuple(sorted(sizes)), tuple(used.lengths or [record.config.max_seq_length])
