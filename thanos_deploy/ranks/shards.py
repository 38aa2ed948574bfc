"""How calibration segments are grouped into batches, and batches into shards.

A batch is one forward pass through a block. The rank that has a shard sums the statistics of its
batches, and the sums of the shards are added in the order of their numbers. The grouping depends on
the segments alone, not on the number of ranks. Segments that are used for tuning only follow in
shards of their own, so that the statistics do not depend on them.
"""

from dataclasses import dataclass

from thanos_deploy.errors import UsageError

# Tokens per forward pass: enough to keep the cores busy, little enough to stay in their caches.
TOKENS_PER_BATCH = 2048

# Largest number of shards, and so of ranks that have work. Each shard costs one addition of the
# statistics.
_MOST = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Some segments that pass a block together.

    Attributes:
        shard: number of the batch's shard.
        first: number of the first segment.
        stop: number of the segment after the last one.
        counted: whether the batch enters the statistics.
    """

    shard: int
    first: int
    stop: int
    counted: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """The batches of calibration data.

    Attributes:
        batches: in the order of the segments, and so of the shards.
    """

    batches: tuple[Batch, ...]

    @property
    def shards(self) -> int:
        """Number of shards that enter the statistics; they have the first numbers."""
        return 1 + max(batch.shard for batch in self.batches if batch.counted)

    @classmethod
    def of(cls, count: int, length: int, further: int = 0) -> "Layout":
        """Return the layout of some segments.

        Args:
            count: number of segments that enter the statistics, at least one.
            length: number of tokens in each segment.
            further: number of segments behind these that are used for tuning only.
        """
        together = max(1, TOKENS_PER_BATCH // length)
        batches: list[Batch] = []
        for start, stop, counted in ((0, count, True), (count, count + further, False)):
            firsts = range(start, stop, together)
            shards, before = min(_MOST, len(firsts)), batches[-1].shard + 1 if batches else 0
            batches += [
                Batch(
                    before + number * shards // len(firsts),
                    first,
                    min(first + together, stop),
                    counted,
                )
                for number, first in enumerate(firsts)
            ]
        return cls(tuple(batches))

    @property
    def _counted(self) -> int:
        """Number of segments that enter the statistics."""
        return max(batch.stop for batch in self.batches if batch.counted)

    def require(self, ranks: int) -> None:
        """Refuse more ranks than shards, because the surplus ranks would have nothing to do.

        Raises:
            UsageError: there are more ranks than shards.
        """
        if ranks > self.shards:
            raise UsageError(
                f"{ranks} processes, but {self._counted} calibration segments, in batches "
                f"of up to {TOKENS_PER_BATCH} tokens, are enough work for {self.shards} "
                "processes only",
                fix=f"start at most {self.shards} processes, or use more segments (--nsamples)",
            )
