import threading
from pathlib import Path

import pytest

from runtime.batching import Batcher, Deliver, End, Finish, Request, Token, open_slots
from runtime.engine import open_engine
from runtime.generate import generate


class Answer:
    """Keeps what is delivered of one request."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.end: End | None = None
        self.ended = threading.Event()

    def __call__(self, news: Token | End) -> None:
        assert self.end is None
        if isinstance(news, Token):
            self.tokens.append(news)
        else:
            self.end = news
            self.ended.set()

    def ids(self) -> list[int]:
        assert self.ended.wait(60)
        return [token.id for token in self.tokens]


PROMPTS = [(72, 101, 108, 108, 111), (7,), tuple(range(1, 13)), (3, 4), (200, 100), (9,) * 30]


def test_requests_that_share_steps_get_the_tokens_they_get_alone(exported_llama: Path) -> None:
    engine = open_engine(exported_llama)
    batcher = Batcher(open_slots(exported_llama, slots=3), queue=8, prompt_tokens=7)
    answers = [Answer() for _ in PROMPTS]
    for count, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        batcher.submit(Request(prompt, 10 + 5 * count, stop=frozenset({256})), answer)
    for count, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        alone = list(generate(engine, prompt, new_tokens=10 + 5 * count, stop={256}))
        assert answer.ids() == alone
    assert batcher.close()
