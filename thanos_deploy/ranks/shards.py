"""How calibration segments are cut into batches, and batches into shards that are summed as one.

A batch passes a block as one. The statistics of a shard's batches are added up by whoever has the
shard, and those of all shards in the order of their numbers. Both depend on the segments alone, not
on how many ranks there are. Segments on which blocks are only tuned follow in shards of their own,
so that statistics do not depend on them.
"""

from dataclasses import dataclass

from thanos_deploy.errors import UsageError

# Tokens per forward pass: enough to keep the cores busy, little enough to stay in their caches.
TOKENS_PER_BATCH = 2048

# As many shards as ranks can have work. Each costs one addition of the statistics.
_MOST = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Some segments that pass a block together.

    Attributes:
        shard: which is summed as one.
        first, stop: number of the first segment, and of the one after the last.
        counted: statistics are taken of it.
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
        """How many there are of which statistics are taken; they have the first numbers."""
        return 1 + max(batch.shard for batch in self.batches if batch.counted)

    @classmethod
    def of(cls, count: int, length: int, further: int = 0) -> "Layout":
        """That of some segments.

        Args:
            count: segments of which statistics are taken, at least one.
            length: tokens of each.
            further: segments behind these that blocks are only tuned on.
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
        """Segments of which statistics are taken."""
        return max(batch.stop for batch in self.batches if batch.counted)

    def require(self, ranks: int) -> None:
        """Refuse more ranks than there are shards, some of which would have nothing to do.

        Raises:
            UsageError: there are more.
        """
        if ranks > self.shards:
            raise UsageError(
                f"{ranks} processes, but {self._counted} calibration segments, in batches "
                f"of up to {TOKENS_PER_BATCH} tokens, are enough work for {self.shards} "
                "processes only",
                fix=f"start at most {self.shards} processes, or use more segments (--nsamples)",
            )
