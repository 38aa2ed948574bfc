"""Capacity of a static KV cache."""

from dataclasses import dataclass

# The fewest cache positions that a decode step attends to, in a cache that has as many.
_LEAST_REACH = 256


@dataclass(frozen=True, slots=True)
class Room:
    """Capacity of a static KV cache.

    Attributes:
        batch: most sequences at once.
        tokens: most tokens of a sequence, prompt and answer together.
    """

    batch: int
    tokens: int

    def holds(self, other: "Room") -> bool:
        """Return whether this room is at least as large as another one in both sizes."""
        return self.batch >= other.batch and self.tokens >= other.tokens

    def grown(self, needed: "Room", *, most_tokens: int) -> "Room":
        """Return a room that holds this room and a needed one.

        If more tokens are needed, their number at least doubles, up to the model's limit, because
        all steps are recorded anew for a new room. The batch grows only to what is needed, because
        few batch sizes occur.

        Args:
            needed: sizes that are needed.
            most_tokens: most tokens of a sequence that the model takes.
        """
        tokens = self.tokens
        if needed.tokens > tokens:
            tokens = min(max(needed.tokens, 2 * tokens), most_tokens)
        return Room(max(self.batch, needed.batch), tokens)

    def reach(self, length: int) -> int:
        """Return the number of cache positions that a decode step attends to.

        It is rounded up to one of 256, 384, 512, 768, 1024, ..., but not beyond the room's tokens.
        So only a few steps have to be recorded, and beyond 256 positions at most a third of what a
        step reads is empty. Empty positions are masked.

        Args:
            length: number of tokens of a sequence, the new one included.
        """
        reach = _LEAST_REACH
        while reach < length:
            is_power_of_two = reach & (reach - 1) == 0
            reach = reach * 3 // 2 if is_power_of_two else reach * 4 // 3
        return min(reach, self.tokens)
