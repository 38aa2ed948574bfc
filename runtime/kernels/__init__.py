"""Products with 2:4 weights on an NVIDIA GPU, one kernel a file."""
