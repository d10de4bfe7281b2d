"""What a coupler is: linear or not, static or not, how many maps, and what it costs.

Read in this order: ``readout`` (what is looked at), ``deviation`` (how differences are measured),
``probes`` (values), ``maps`` (Jacobians), ``mixing`` (all of its numbers), ``verdict`` (the sentence),
``cost``, ``portrait`` (all of it), ``roster`` (every coupler there is), ``show``.
"""

from bench.portrait.mixing import NoMixing
from bench.portrait.portrait import Portrait, draw_portrait
from bench.portrait.roster import Entry, list_couplers

__all__ = ["Entry", "NoMixing", "Portrait", "draw_portrait", "list_couplers"]
