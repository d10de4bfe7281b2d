"""Sweeps: from a file or a line of shell to many runs."""
