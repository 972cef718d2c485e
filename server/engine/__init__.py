"""Schedule, run, sample: the loop and the owners of its resources."""
