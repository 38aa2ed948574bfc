"""Batchers that end with the test."""

from collections.abc import Iterator

import pytest

from runtime.batching import Batcher
from tests.runtime.counting import Counting, Start


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes batchers that are closed after the test."""
    batchers = []

    def make(engine: Counting, *, queue: int = 8, **options: int) -> Batcher:
        batchers.append(Batcher(engine, queue=queue, **options))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.close(timeout=0)
