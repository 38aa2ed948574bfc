"""How much a static kv cache holds."""

from dataclasses import dataclass

# The fewest tokens that a decode step attends to.
_LEAST_REACH = 256


@dataclass(frozen=True, slots=True)
class Room:
    """What a static kv cache is made for.

    Attributes:
        batch: sequences at once.
        tokens: of the longest sequence, prompt and answer together.
    """

    batch: int
    tokens: int

    def holds(self, other: "Room") -> bool:
        """Whether there is a place for everything that another room holds."""
        return self.batch >= other.batch and self.tokens >= other.tokens

    def grown(self, needed: "Room", *, most_tokens: int) -> "Room":
        """A room that holds a larger one, too.

        Tokens at least double, because each new room records its steps anew; a batch grows to
        what is needed, because few sizes of batches occur.

        Args:
            needed: what must find a place.
            most_tokens: the longest sequence that the model takes.
        """
        tokens = self.tokens
        if needed.tokens > tokens:
            tokens = min(max(needed.tokens, 2 * tokens), most_tokens)
        return Room(max(self.batch, needed.batch), tokens)

    def reach(self, length: int) -> int:
        """How many places of the cache a decode step attends to, the empty ones being masked.

        One of 256, 384, 512, 768, 1024, ..., so that few steps have to be recorded and at most a
        third of what is read is empty, or all of the room.

        Args:
            length: tokens that are there, the new one included.
        """
        reach = _LEAST_REACH
        while reach < length:
            is_power_of_two = reach & (reach - 1) == 0
            reach = reach * 3 // 2 if is_power_of_two else reach * 4 // 3
        return min(reach, self.tokens)
