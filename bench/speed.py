"""``python -m bench.speed``: one coupler in each of its forms, side by side, with ratios."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bench.cli import fail, parse, show_warnings_plainly
from bench.config import ModelConfig, check_positive


@dataclass(kw_only=True)
class SpeedConfig:
    """Time a coupler's forward + backward in each of its forms: default, other backends, reference."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(embed_dim=256))
    batch_size: int = 32
    """Sequences in the batch."""
    rounds: int = 5
    """Timed rounds of each form (one, where a round takes over two seconds)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA where there is one, else the CPU."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "rounds")


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of forms; return the exit status (2: wrong input)."""
    config = parse(SpeedConfig, argv, prog="python -m bench.speed")
    show_warnings_plainly()

    from rich.console import Console
    from rich.table import Table

    from bench.device import resolve_device
    from bench.gate import refuse_wrong_hypergraph
    from bench.measure.coupler_speed import time_forms
    from bench.measure.environment import device_name
    from gnnmoe.hypergraph_backends import BACKENDS, missing_backends

    model = config.model.resolved(1)
    console = Console(highlight=False)
    try:
        refuse_wrong_hypergraph(model)
        device = resolve_device(config.device)
        timings = []
        with console.status("timing …") as status:
            for timing in time_forms(model, config.batch_size, config.rounds, device):
                timings.append(timing)
                status.update(f"timed {timing.form}: {timing.median_seconds * 1e3:,.1f} ms …")
    except ValueError as error:
        fail(str(error))
    table = Table(
        title=f"{model.coupler_type} forward + backward, B {config.batch_size}, L {model.max_seq_length}, "
        f"E {model.num_experts}, D {model.embed_dim}, float32, {device_name(device)}",
        title_justify="left",
        width=80,
    )
    for heading in ("form", "median ms", "times the default", "off by", "rounds"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for timing in timings:
        ratio = timing.median_seconds / timings[0].median_seconds
        table.add_row(
            timing.form, f"{timing.median_seconds * 1e3:,.1f}", f"{ratio:,.1f}",
            f"{timing.largest_difference:.0e}", str(len(timing.seconds)),
        )  # fmt: skip
    console.print(table)
    left_out = [name for name in missing_backends() if timings[0].form in BACKENDS]
    if left_out:
        console.print(f"left out: {', '.join(left_out)} (pip install 'gnnmoe[scatter]' brings them)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
