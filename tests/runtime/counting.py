"""An engine without a model for tests of the batcher, and who takes what the batcher delivers."""

import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np

from runtime.batching import Batcher, End, Request, Token

PATIENCE = 60.0  # for what must happen; nothing here waits for as long


class Counting:
    """Slots without a model: a row goes on with its last token plus one, and ends at no token.

    Decoding waits for a permit. `calls` is what was asked for; a call whose name is in `broken`
    raises. `pieces` is what was read: the first token of a prompt, and how many of its tokens.
    """

    max_sequence = 1000
    vocabulary = 1000

    def __init__(
        self, slots: int = 2, *, permits: int = 1_000_000, remembers: bool = False
    ) -> None:
        self.slots = slots
        self.pieces: list[tuple[int, int]] = []
        self._remembers = remembers
        self._kept: list[Sequence[int]] = []
        self.calls: list[str] = []
        self.broken: set[str] = set()
        self.decoding = threading.Event()
        self._permits = threading.Semaphore(permits)
        self._rows: list[int] = []
        self._reading = 0  # prompts

    def permit(self, steps: int = 1_000_000) -> None:
        self._permits.release(steps)

    def remembered(self, prompt: Sequence[int]) -> int:
        if "remembered" in self.broken:
            raise RuntimeError("remembered broke")
        return max((common(prompt[:-1], other) for other in self._kept), default=0)

    def join(self, prompts: Sequence[Sequence[int]]) -> "CountingReading":
        self.call(f"join {' '.join(str(len(prompt)) for prompt in prompts)}")
        self._reading += len(prompts)
        assert len(self._rows) + self._reading <= self.slots
        return CountingReading(self, prompts)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        self.decoding.set()
        assert self._permits.acquire(timeout=PATIENCE)
        self.call(f"decode {len(ids)}")
        assert len(ids) == len(self._rows)
        self._rows = ids.tolist()
        return self._logits(self._rows)

    def leave(self, row: int) -> None:
        self.call("leave")
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def clear(self) -> None:
        self._rows, self._reading = [], 0

    def arrive(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        last = [prompt[-1] for prompt in prompts]
        if self._remembers:
            self._kept += prompts
        self._reading -= len(last)
        self._rows += last
        return self._logits(last)

    def give_up(self) -> None:
        self.call("abandon")
        self._reading -= 1

    def call(self, call: str) -> None:
        self.calls.append(call)
        if call.split()[0] in self.broken:
            raise RuntimeError(f"{call} broke")

    def _logits(self, last: Sequence[int]) -> np.ndarray:
        logits = np.zeros((len(last), self.vocabulary), np.float32)
        logits[range(len(last)), np.array(last) + 1] = 1
        return logits


class CountingReading:
    """Prompts of `Counting`."""

    reused = 0

    def __init__(self, engine: Counting, prompts: Sequence[Sequence[int]]) -> None:
        self._engine = engine
        self._prompts = list(prompts)
        self._columns = max(len(prompt) - engine.remembered(prompt) for prompt in prompts)

    @property
    def left(self) -> int:
        return self._columns * len(self._prompts)

    def read(self, tokens: int) -> np.ndarray | None:
        self._engine.call("read")
        columns = min(self._columns, max(1, tokens // len(self._prompts)))
        self._engine.pieces += [(prompt[0], columns) for prompt in self._prompts]
        self._columns -= columns
        return None if self._columns else self._engine.arrive(self._prompts)

    def abandon(self, newcomer: int) -> None:
        self._engine.give_up()
        self._prompts[newcomer] = self._prompts[-1]
        self._prompts.pop()


class Answer:
    """Keeps what is delivered of one request, and checks that the end comes last."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self._end: End | None = None
        self._first = threading.Event()
        self._ended = threading.Event()

    def __call__(self, news: Token | End) -> None:
        assert self._end is None
        if isinstance(news, Token):
            self.tokens.append(news)
            self._first.set()
        else:
            self._end = news
            self._ended.set()

    def begun(self) -> None:
        assert self._first.wait(PATIENCE)

    def end(self) -> End:
        assert self._ended.wait(PATIENCE)
        assert self._end is not None
        return self._end

    def ids(self) -> list[int]:
        self.end()
        return [token.id for token in self.tokens]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    same = (mine == its for mine, its in zip(one, other, strict=False))
    return sum(itertools.takewhile(bool, same))


Start = Callable[..., Batcher]


def occupied(start: Start, engine: Counting, **options: int) -> tuple[Batcher, Answer]:
    """A batcher with one long text, which waits for permission to go on."""
    batcher, answer = start(engine, **options), Answer()
    batcher.submit(Request((500,), 100), answer)
    assert engine.decoding.wait(PATIENCE)
    return batcher, answer
