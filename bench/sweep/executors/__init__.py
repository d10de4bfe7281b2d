"""Where the runs of a sweep run: one file for each executor, found by its name."""
