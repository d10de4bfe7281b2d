"""What must be equal for the numbers of two runs to stand in one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.measure.quantity import is_measured
from bench.records.schema import Record


@dataclass(frozen=True)
class Setting:
    """What must be equal for numbers to share a table; None where a run did not get far enough to tell."""

    corpus: tuple[Any, ...] | None
    """Name, configuration, tokenizer, hash."""
    device: tuple[Any, ...] | None
    """Type, name, and on a CPU the number of threads: sums and speeds differ between one and two."""
    protocol: tuple[Any, ...] | None
    """Tokens scored, length and stride of the final validation."""
    used: tuple[Any, ...] | None
    """Batch sizes that were used, and the length."""

    @classmethod
    def of(cls, record: Record, allow_unequal: bool) -> Setting:
        """Return the setting of a run; with ``allow_unequal`` protocol and used sizes count as equal."""
        protocol, used = (None, None) if allow_unequal else (_protocol(record), _used(record))
        return cls(_corpus(record), _device(record), protocol, used)

    def fits(self, other: Setting) -> bool:
        """Whether the two agree in everything that both know."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(a is None or b is None or a == b for a, b in pairs)

    def words(self) -> str:
        """Return the setting in words."""
        parts = []
        if self.corpus:
            name, config_name, tokenizer, sha256 = self.corpus
            names = " ".join(part for part in (name, config_name) if part)
            parts.append(f"{names} ({tokenizer}, {sha256[:12]})")
        if self.device:
            kind, name, threads = self.device
            parts.append(f"{name}, {threads} thread{'s' * (threads > 1)}" if threads else f"{kind}: {name}")
        if self.protocol:
            tokens, length, stride = self.protocol
            parts.append(f"scored on {tokens:,} tokens at length {length}, stride {stride}")
        if self.used:
            sizes, lengths = (" and ".join(map(str, numbers)) for numbers in self.used)
            parts.append(f"batch {sizes} × {lengths}")
        return " · ".join(parts) or "nothing measured"


def _corpus(record: Record) -> tuple[Any, ...] | None:
    data = record["data"]
    return tuple(data.get(key) for key in ("name", "config_name", "tokenizer", "sha256")) \
        if is_measured(data) and data.get("sha256") else None  # fmt: skip


def _device(record: Record) -> tuple[Any, ...] | None:
    environment = record["environment"]
    if not is_measured(environment):
        return None
    kind = environment["device_type"]
    return kind, environment["device_name"], environment["threads"] if kind == "cpu" else None


def _protocol(record: Record) -> tuple[Any, ...] | None:
    quality = record["quality"]
    if not is_measured(quality) or not is_measured(quality.get("validation")):
        return None
    return tuple(quality["validation"][key] for key in ("tokens", "length", "stride"))


def _used(record: Record) -> tuple[Any, ...]:
    """Return batch sizes and lengths: those used, or those asked for where the run did not get so far."""
    used, config = record["used"], record["config"]
    epochs = used["ledger"]["epochs"] if is_measured(used) else []
    sizes = {epoch["batch_size"] for epoch in epochs} or {config["training"]["batch_size"]}
    lengths = (used.get("lengths") if is_measured(used) else None) or [config["model"]["max_seq_length"]]
    return tuple(sorted(sizes)), tuple(lengths)
