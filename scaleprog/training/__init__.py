"""Training: the loop, the work between its steps, and its results."""
