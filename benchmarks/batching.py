"""Tokens per second of one model with 1, 8 and 32 slots, against one request at a time.

`python -m benchmarks.batching OUT`: OUT is a bundle with the target onnx. As many clients as slots
send requests, each its next one when the last is answered; the requests are the same in every row
of the table. "One at a time" is `runtime.generate` in a loop. Prints times to the first token and
between the tokens of a text (median and 95th percentile), how many texts are those of the first
row, and where the time of the batcher's thread went. Processor time holds on a busy machine too,
with `--threads 1`: threads that wait for each other spin.
"""

import argparse
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime.batching import PROMPT_TOKENS, Batcher, Request, Token
from runtime.engine import Engine, open_engine, open_slots
from runtime.generate import generate


@dataclass(slots=True)
class Text:
    """An answer: its tokens, and when each came, counted from when it was asked for."""

    asked: float = field(default_factory=time.perf_counter)
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, token: int) -> None:
        """Note a token that came just now."""
        self.ids.append(token)
        self.times.append(time.perf_counter() - self.asked)


class Clocked:
    """Slots that add up the seconds spent in each of their methods, and of their readings'."""

    def __init__(self, slots: Any, seconds: defaultdict[str, float] | None = None) -> None:
        self._slots = slots
        self.seconds: defaultdict[str, float] = defaultdict(float) if seconds is None else seconds

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._slots, name)
        return self._clocked(name, value) if callable(value) else value

    def _clocked(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            self.seconds[name] += time.perf_counter() - started
            return Clocked(result, self.seconds) if name == "join" else result

        return run


def draw_requests(count: int, vocabulary: int) -> list[Request]:
    """Prompts of 8 to 128 tokens, answers of 16 to 64."""
    draw = np.random.default_rng(0)
    return [
        Request(
            tuple(draw.integers(vocabulary, size=draw.integers(8, 129)).tolist()),
            int(draw.integers(16, 65)),
        )
        for _ in range(count)
    ]


def one_at_a_time(engine: Engine, requests: Sequence[Request]) -> list[Text]:
    """Answer with an engine of one sequence."""
    texts = []
    for request in requests:
        texts.append(Text())
        for token in generate(engine, request.prompt, new_tokens=request.new_tokens):
            texts[-1].add(token)
    return texts


def together(batcher: Batcher, requests: Sequence[Request], clients: int) -> list[Text]:
    """Answer for several clients."""
    texts: dict[int, Text] = {}
    numbers = iter(range(len(requests)))
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            text = texts[number] = Text()
            ended = threading.Event()

            def deliver(news: object, text: Text = text, ended: threading.Event = ended) -> None:
                if isinstance(news, Token):
                    text.add(news.id)
                else:
                    ended.set()

            batcher.submit(requests[number], deliver)
            ended.wait()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [texts[number] for number in range(len(requests))]


def row(
    name: str, answer: Callable[[], Sequence[Text]], reference: Sequence[Text] | None = None
) -> tuple[Sequence[Text], float]:
    """Print one line of the table.

    Args:
        name: what the line begins with.
        answer: answers all requests.
        reference: the texts to compare with; None for its own.

    Returns:
        the texts and the seconds that they took.
    """
    started, worked = time.perf_counter(), time.process_time()
    texts = answer()
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    tokens = sum(len(text.ids) for text in texts)
    first = np.array([text.times[0] for text in texts]) * 1e3
    gaps = np.concatenate([np.diff(text.times) for text in texts]) * 1e3
    same = sum(text.ids == other.ids for text, other in zip(texts, reference or texts, strict=True))
    print(
        f"| {name} | {tokens / seconds:.1f} | {processor / tokens * 1e3:.1f} "
        f"| {np.median(first):.0f}, {np.percentile(first, 95):.0f} "
        f"| {np.median(gaps):.0f}, {np.percentile(gaps, 95):.0f} | {same} of {len(texts)} |",
        flush=True,
    )
    return texts, seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prompt-tokens-per-step", type=int, default=PROMPT_TOKENS)
    arguments = parser.parse_args()
    out, threads = arguments.out, arguments.threads
    vocabulary = open_slots(out, slots=1, verify=False).vocabulary
    requests = draw_requests(arguments.requests, vocabulary)
    engine = open_engine(out, threads=threads, verify=False)
    one_at_a_time(engine, requests[:1])  # warms up
    print(
        "| | tokens/s | processor, ms per token | first token, ms | between tokens, ms "
        "| same texts |\n|---|---|---|---|---|---|"
    )
    reference, _ = row("one at a time", lambda: one_at_a_time(engine, requests))
    spent = []
    for slots in arguments.slots:
        clocked = Clocked(open_slots(out, slots=slots, threads=threads, verify=False))
        batcher = Batcher(clocked, queue=0, prompt_tokens_per_step=arguments.prompt_tokens_per_step)
        together(batcher, requests[:1], 1)
        clocked.seconds.clear()
        _, seconds = row(
            f"{slots} slots",
            partial(together, batcher, requests, slots),
            reference,
        )
        batcher.close()
        parts = {**clocked.seconds, "the rest": seconds - sum(clocked.seconds.values())}
        spent.append(
            f"{slots} slots: "
            + ", ".join(f"{name} {part / seconds:.1%}" for name, part in parts.items())
        )
    print("\n".join(spent))


if __name__ == "__main__":
    main()
