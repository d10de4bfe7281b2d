"""A study: which runs are one configuration, what it is called, what is comparable, and the hypotheses."""
