"""How long work tells how far it is, without knowing who is looking."""

from collections.abc import Callable

# Called with the number of steps done and the number in all; the first call has 0 done.
OnProgress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""
