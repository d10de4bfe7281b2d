"""Measurements: each in a pass of its own, with its unit in its name."""
