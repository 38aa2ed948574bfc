"""Compare the throughput of one model with 1, 8 and 32 slots to one request at a time.

`python -m benchmarks.batching OUT`: OUT is a bundle with the target onnx. There are as many clients
as slots, and each sends its next request when the last one is answered. The requests are the same
in every row of the table. "One at a time" is `runtime.generate` in a loop. Prints the time to first
token and the time between tokens (median and 95th percentile), how many texts equal those of the
first row, and where the batcher's thread spent its time. Processor time is meaningful on a busy
machine too, but only with `--threads 1`, because threads spin while they wait for each other.
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
    """The answer to one request.

    Attributes:
        asked: time of the request, by `time.perf_counter`.
        ids: the tokens.
        times: seconds from the request to each token.
    """

    asked: float = field(default_factory=time.perf_counter)
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def add(self, token: int) -> None:
        """Append a token that has just arrived."""
        self.ids.append(token)
        self.times.append(time.perf_counter() - self.asked)


class Clocked:
    """Wrapper of slots that sums the seconds of each method, also of what `join` returns."""

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
    """Draw prompts of 8 to 128 tokens, with answers of 16 to 64 tokens."""
    draw = np.random.default_rng(0)
    return [
        Request(
            tuple(draw.integers(vocabulary, size=draw.integers(8, 129)).tolist()),
            int(draw.integers(16, 65)),
        )
        for _ in range(count)
    ]


def one_at_a_time(engine: Engine, requests: Sequence[Request]) -> list[Text]:
    """Answer the requests one by one, with an engine for a single sequence."""
    texts = []
    for request in requests:
        texts.append(Text())
        for token in generate(engine, request.prompt, new_tokens=request.new_tokens):
            texts[-1].add(token)
    return texts


def together(batcher: Batcher, requests: Sequence[Request], clients: int) -> list[Text]:
    """Answer the requests of several concurrent clients with a batcher."""
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
    """Measure and print one row of the table.

    Args:
        name: label of the row.
        answer: function that answers all requests.
        reference: texts to compare with; None compares the answers with themselves.

    Returns:
        The texts, and the seconds that they took.
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
