"""What fits into memory: the search before a training, and the control during it."""
