"""Hypergraphs over the experts: which experts share a hyperedge, and how a static layer mixes them."""
