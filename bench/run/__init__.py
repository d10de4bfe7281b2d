"""``python -m bench.run``: one run from its config to its record."""
