"""Training and evaluation: the quality pass, in which nothing is timed."""
