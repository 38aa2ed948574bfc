"""Benchmarks that anyone can repeat; LOG.md has the results with date and machine. Not shipped."""
