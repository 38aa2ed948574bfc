"""Forward passes apart from the batch that generates text: for logits, and to score prompts."""

from collections.abc import Callable, Sequence

from runtime.batching import Token, token_of
from runtime.engine import Ids, Logits, ServingEngine
from runtime.server.one_by_one import OneByOne


class Forward:
    """Forward passes apart from the batch, one at a time; the others wait in a queue."""

    def __init__(self, engine: ServingEngine, *, queue: int) -> None:
        """Start with an empty queue.

        Args:
            engine: runs the forward passes.
            queue: largest number of forward passes that wait.
        """
        self._engine = engine
        self._passes = OneByOne(
            "forward", queue=queue, full="too many requests wait for a forward pass"
        )

    async def logits(self, ids: Ids, mask: Ids | None) -> Logits:
        """Return the logits after the last tokens, float32[batch, vocabulary].

        The arguments are those of `Engine.prefill`.

        Raises:
            Busy: the queue is full.
            UsageError: the engine cannot read the ids.
        """
        return await self._passes.run(lambda given_up: self._engine.logits(ids, mask, given_up))

    async def score(self, prompts: Sequence[Sequence[int]], alternatives: int) -> list[list[Token]]:
        """Return the tokens of each prompt with their log probabilities; the first token has none.

        Args:
            prompts: the ids of each prompt, at least one.
            alternatives: number of likeliest tokens that are reported beside each token.

        Raises:
            Busy: the queue is full.
            InputError: the graph gives the logits after the last token only.
            UsageError: the engine cannot read a prompt.
        """

        def score(given_up: Callable[[], bool]) -> list[list[Token]]:
            scored = []
            for prompt in prompts:
                tokens, following = [Token(prompt[0], None)], iter(prompt[1:])
                for part in self._engine.score(prompt, given_up):
                    # The logits after the last token are for a token beyond the prompt.
                    tokens += [
                        token_of(token, row, alternatives)
                        for row, token in zip(part, following, strict=False)
                    ]
                scored.append(tokens)
            return scored

        return await self._passes.run(score)

    def close(self) -> None:
        """Stop the running forward pass before its next piece, and drop the waiting ones."""
        self._passes.close(wait=True)
