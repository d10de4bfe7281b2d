"""``python -m bench.sweep``: many runs from one file, and where they run."""
