"""Runnable comparisons; results go to LOG.md with the date and the machine. Not shipped."""
