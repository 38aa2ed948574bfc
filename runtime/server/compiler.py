"""The queue of grammars to compile, which answers must follow."""

from collections.abc import Callable

from runtime.grammars import Grammar, Grammars
from runtime.server.one_by_one import OneByOne
from runtime.text import Tokenizer
from thanos_deploy.errors import UsageError


class Compiler:
    """Compiles grammars, one at a time; the others wait in a queue."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, *, queue: int) -> None:
        """Start with an empty queue; the first grammar creates a `Grammars` of these arguments."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._grammars: Grammars | None = None
        self._forms = OneByOne(
            "grammar", queue=queue, full="too many forms for answers wait to be compiled"
        )

    async def compile(self, grammar: Callable[[], str]) -> Grammar:
        """Make a grammar, and compile it.

        Args:
            grammar: makes the grammar; called on the thread that compiles it.

        Raises:
            Busy: the queue is full.
            UsageError: the form of the answer cannot be read; see also `Grammars.compile`.
            PlatformError, InputError: see `Grammars`.
        """
        return await self._forms.run(lambda _: self._compile(grammar))

    def close(self) -> None:
        """Drop the waiting grammars, and do not wait for the one that is being compiled."""
        self._forms.close(wait=False)

    def _compile(self, grammar: Callable[[], str]) -> Grammar:
        if self._grammars is None:
            self._grammars = Grammars(self._tokenizer, self._vocabulary)
        try:
            written = grammar()
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"the form of the answer cannot be read: {error}", fix="send valid JSON"
            ) from error
        return self._grammars.compile(written)
