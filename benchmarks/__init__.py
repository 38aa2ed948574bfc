"""Measurements that anyone can repeat. Results go to LOG.md with date and machine. Not shipped."""
