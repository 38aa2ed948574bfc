"""Send mixed and hostile requests to `thanos-deploy serve` for ten minutes, and check its state.

Usage: python -m benchmarks.soak OUT [--minutes 10]

OUT is a bundle with the target onnx. Several clients send random requests at once: chats and
completions, whole and streamed; streams that they abandon or read slowly; tensors; bodies that are
not requests; and bursts of ten times as many requests as the server has room for. The run has
FAILED (exit code 1) if

- a status was 5xx other than 503, a 503 had no Retry-After, or a connection broke;
- a slot or a queue place is still taken after all clients have left;
- memory grows, after the first third of the run, by more than 1 KiB per request and by more than
  2 % in all. The growth is the slope of a least-squares line through the samples of resident memory
  over the number of requests so far. A request that leaks costs more than 1 KiB: in CPython its
  body, its headers and its task alone take several KiB, and the keys and values of a slot grow with
  every token. At this limit ten requests per second would take less than 1 GB in a day. The 2 %
  allow for the allocators, which take several MB at once when a batch is larger than any before.
  With slow answers the 2 % hide much, so a small model is the better probe.

Prints the counts and writes them with the samples to benchmarks/results/soak.json.

The command and its traffic are one file, which is a few lines longer than others.
"""

import argparse
import http.client
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.server import (
    RequestError,
    Server,
    free_port,
    open_connection,
    request,
    running,
    serve,
    stream,
)
from thanos_deploy.bundle import files, manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration.texts import builtin_text
from thanos_deploy.machine import environment

MODEL = "soak"
MOST_GROWTH = 1024  # bytes per request
MOST_GROWTH_IN_ALL = 0.02
WARM_UP = 1 / 3
CLIENTS = 12
SLOTS, QUEUE = 4, 16
OVERLOAD = 10
LONGEST_PROMPT, LONGEST_ANSWER = 400, 24  # characters, tokens
SAMPLES = 120

# Number of different prompts. The package tokenizers caches 10 000 words, and a tokenizer that does
# not split texts into words caches each prompt as one word. With ever new prompts, filling this
# cache would look like a leak.
PROMPTS = 500

# Time to settle after the last request; the answers that are in flight are short.
SECONDS_TO_SETTLE = 60.0

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
INFER = f"/v2/models/{MODEL}/infer"
LEFT, BROKEN, IN_STREAM, NO_RETRY_AFTER = (
    "left",
    "broken",
    "error in a stream",
    "503 without Retry-After",
)

# Bodies that are not valid requests on any route.
MALFORMED = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"\xff\xfe"',
    b'{"prompt": "\xc3("}',
    b'{"model": "soak", "prompt": "\\ud800"}',
    b'{"model": 7, "prompt": {}, "messages": 1, "inputs": "x"}',
    b'{"model": "soak", "prompt": "a", "max_tokens": -1, "messages": [], "inputs": []}',
    b'{"model": "soak", "prompt": "a", "max_tokens": 1e400, "messages": [{}], "inputs": [{}]}',
    b'{"model": "soak", "prompt": [9999999999999999999999], "messages": [[]]}',
    b'{"model": "soak", "prompt": "a", "temperature": NaN, "messages": null}',
    b'{"model": "nobody", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}',
    b"[" * 100_000,
)


@dataclass(frozen=True, slots=True)
class Visitor:
    """A client that sends random requests."""

    url: str
    prompts: tuple[str, ...]
    chance: random.Random

    def generation(self) -> Json:
        """Return the fields of a request that both routes for text have."""
        return {
            "model": MODEL,
            "max_tokens": self.chance.randint(1, LONGEST_ANSWER),
            "temperature": self.chance.choice([0, 0.7, 1.5]),
            "seed": self.chance.getrandbits(31),
        }

    def prompt(self) -> str:
        """Return a random prompt."""
        return self.chance.choice(self.prompts)

    def completion(self) -> Iterator[str]:
        """Ask for two whole completions with log probabilities."""
        body = {"prompt": self.prompt(), "n": 2, "logprobs": 2, **self.generation()}
        yield self.ask(COMPLETIONS, json.dumps(body).encode())

    def chat(self) -> Iterator[str]:
        """Ask for a whole chat answer."""
        messages = [{"role": "user", "content": self.prompt()}]
        body = {"messages": messages, **self.generation()}
        yield self.ask(CHAT, json.dumps(body).encode())

    def tensors(self) -> Iterator[str]:
        """Ask for the logits of a batch of two sequences."""
        tokens = self.chance.randint(1, 32)
        ids = [self.chance.randrange(256) for _ in range(2 * tokens)]
        tensor = {"name": "input_ids", "datatype": "INT64", "shape": [2, tokens], "data": ids}
        yield self.ask(INFER, json.dumps({"inputs": [tensor]}).encode())

    def malformed(self) -> Iterator[str]:
        """Send a body that is not a valid request."""
        path = self.chance.choice((COMPLETIONS, CHAT, INFER, "/v1/nothing"))
        yield self.ask(path, self.chance.choice(MALFORMED))

    def streamed(self) -> Iterator[str]:
        """Read a stream as fast as it comes."""
        yield self.follow()

    def slow(self) -> Iterator[str]:
        """Read a stream slowly."""
        yield self.follow(pause=0.2)

    def dropped(self) -> Iterator[str]:
        """Abandon a stream after a few events."""
        yield self.follow(events=self.chance.randint(0, 4))

    def burst(self) -> Iterator[str]:
        """Send many more requests than the server has room for before reading an answer."""
        body = json.dumps({"prompt": self.prompt(), **self.generation()}).encode()
        with ExitStack() as stack:
            connections = [
                stack.enter_context(closing(open_connection(self.url)))
                for _ in range(OVERLOAD * (SLOTS + QUEUE))
            ]
            for connection in connections:
                connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
            for connection in connections:
                response = connection.getresponse()
                response.read()
                yield outcome(response.status, response.headers)

    def ask(self, path: str, body: bytes) -> str:
        """Send a request, and return its outcome."""
        status, headers, _ = request(self.url, "POST", path, body)
        return outcome(status, headers)

    def follow(self, *, events: int | None = None, pause: float = 0.0) -> str:
        """Read some events of a stream, or all of them, and return its outcome."""
        body = {"prompt": self.prompt(), "ignore_eos": True, **self.generation()}
        read = 0
        try:
            with closing(stream(self.url, COMPLETIONS, body)) as found:
                for event in itertools.islice(found, events):
                    read += 1
                    if event.startswith('{"error"'):
                        return IN_STREAM
                    time.sleep(pause)
        except RequestError as error:
            return outcome(error.status, error.headers)
        return "200" if events is None else LEFT


# Relative frequency of each kind of request; one burst is many requests.
WEIGHTS: dict[Callable[[Visitor], Iterator[str]], float] = {
    Visitor.chat: 3,
    Visitor.completion: 3,
    Visitor.streamed: 4,
    Visitor.dropped: 4,
    Visitor.slow: 1,
    Visitor.tensors: 2,
    Visitor.malformed: 4,
    Visitor.burst: 0.1,
}


class Tally:
    """Counts of requests by kind and outcome; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, how: str) -> None:
        """Count one request."""
        with self._lock:
            self._counts[kind, how] += 1

    @property
    def requests(self) -> int:
        """Number of requests so far."""
        return sum(self.outcomes().values())

    def outcomes(self) -> Counter[str]:
        """Return the number of requests by outcome, over all kinds."""
        total: Counter[str] = Counter()
        for by_outcome in self.by_kind().values():
            total.update(by_outcome)
        return total

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Return the number of requests by kind and outcome."""
        with self._lock:
            counts = sorted(self._counts.items())
        found: dict[str, dict[str, int]] = {}
        for (kind, how), count in counts:
            found.setdefault(kind, {})[how] = count
        return found


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident memory of the server at one moment, with the time and the requests so far."""

    seconds: float
    requests: int
    resident_bytes: int


def main() -> None:
    """Run the soak test, and write and print the result; exit with 1 if it FAILED."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "soak.json"
    )
    arguments = parser.parse_args()
    result = soak(arguments.out, seconds=60 * arguments.minutes, seed=arguments.seed)
    files.write_json(arguments.results, result)
    print(shown(result))
    sys.exit(result["status"] != "PASSED")


def soak(bundle: Path, *, seconds: float, seed: int) -> Json:
    """Send mixed requests for some seconds, and return the result with the verdict."""
    tally, over = Tally(), threading.Event()
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        port = free_port()
        command = serve(bundle, port=port, name=MODEL, slots=SLOTS, queue=QUEUE)
        server = stack.enter_context(running(command, port=port, log=log))
        texts = prompts(server.url, random.Random(seed))
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        stack.callback(over.set)
        for number in range(CLIENTS):
            visitor = Visitor(server.url, texts, random.Random(f"{seed} {number}"))
            pool.submit(visit, visitor, tally, over)
        samples = list(watch(server, tally, seconds))
        over.set()
        pool.shutdown()
        left = settled(lambda: request(server.url, "GET", "/metrics")[2].decode())
        reasons = judge(tally.outcomes(), left, samples)
    return {
        "format": "thanos-deploy/soak/1",
        "status": "FAILED" if reasons else "PASSED",
        "reasons": reasons,
        "model": manifest.Bundle.open(bundle).source.name,
        "seconds": seconds,
        "clients": CLIENTS,
        "slots": SLOTS,
        "queue": QUEUE,
        "requests": tally.requests,
        "outcomes": tally.by_kind(),
        "left": left,
        "growth_bytes_per_request": growth(samples),
        "samples": [asdict(sample) for sample in samples],
        "environment": encode(environment.describe()),
    }


def prompts(url: str, chance: random.Random) -> tuple[str, ...]:
    """Draw pieces of the built-in text that fill at most half of the model's context."""
    _, _, models = request(url, "GET", "/v1/models")
    longest = min(LONGEST_PROMPT, json.loads(models)["data"][0]["max_model_len"] // 2)
    text = builtin_text(held_out=True).content
    begins = [chance.randrange(len(text) - longest) for _ in range(PROMPTS)]
    return tuple(text[begin : begin + chance.randint(1, longest)] for begin in begins)


def visit(visitor: Visitor, tally: Tally, over: threading.Event) -> None:
    """Send random requests until `over` is set."""
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    while not over.is_set():
        (kind,) = visitor.chance.choices(kinds, weights)
        try:
            for how in kind(visitor):
                tally.add(kind.__name__, how)
        except (OSError, http.client.HTTPException):
            tally.add(kind.__name__, BROKEN)


def watch(server: Server, tally: Tally, seconds: float) -> Iterator[Sample]:
    """Yield samples of the server's memory at equal intervals."""
    started = time.monotonic()
    for number in range(1, SAMPLES + 1):
        time.sleep(max(0.0, started + seconds * number / SAMPLES - time.monotonic()))
        yield Sample(time.monotonic() - started, tally.requests, server.resident_bytes)


def settled(metrics: Callable[[], str]) -> dict[str, float]:
    """Wait until no slot or queue place is taken, or the time is over; return what is taken.

    Args:
        metrics: returns the server's present metrics, in Prometheus text format.
    """
    deadline = time.monotonic() + SECONDS_TO_SETTLE
    while True:
        values = dict(
            line.rsplit(" ", 1) for line in metrics().splitlines() if not line.startswith("#")
        )
        left = {name: float(values[f"thanos_{name}"]) for name in ("active_slots", "queue")}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def judge(outcomes: Counter[str], left: dict[str, float], samples: Sequence[Sample]) -> list[str]:
    """Return the reasons for which the run has failed; empty if it passed."""
    wrong = {
        how: count
        for how, count in outcomes.items()
        if how in (BROKEN, IN_STREAM, NO_RETRY_AFTER) or (how[0] == "5" and how != "503")
    }
    reasons = [f"{how}: {count} requests" for how, count in sorted(wrong.items())]
    reasons += [f"{name}: {count:g} in the end" for name, count in left.items() if count]
    grown, steady = growth(samples), after_warm_up(samples)
    in_all = grown * (steady[-1].requests - steady[0].requests) / steady[0].resident_bytes
    if grown > MOST_GROWTH and in_all > MOST_GROWTH_IN_ALL:
        reasons.append(
            f"memory grew by {grown:.0f} bytes a request (limit {MOST_GROWTH}), in all by "
            f"{in_all:.1%} (limit {MOST_GROWTH_IN_ALL:.0%})"
        )
    return reasons


def growth(samples: Sequence[Sample]) -> float:
    """Return the growth of memory in bytes per request, after the warm-up."""
    steady = after_warm_up(samples)
    requests = np.array([sample.requests for sample in steady], dtype=np.float64)
    resident = [sample.resident_bytes for sample in steady]
    slope, _ = np.polyfit(requests - requests.mean(), resident, 1)
    return float(slope)


def after_warm_up(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return the samples after the warm-up."""
    return samples[int(len(samples) * WARM_UP) :]


def outcome(status: int, headers: http.client.HTTPMessage) -> str:
    """Return the outcome under which a response is counted."""
    return NO_RETRY_AFTER if status == 503 and "Retry-After" not in headers else str(status)


def shown(result: Json) -> str:
    """Return the result as readable text."""
    first, last = result["samples"][int(SAMPLES * WARM_UP)], result["samples"][-1]
    lines = [
        f"{result['requests']} requests in {result['seconds']:.0f} s",
        *(
            f"{kind:>12}  " + ", ".join(f"{how}: {count}" for how, count in outcomes.items())
            for kind, outcomes in result["outcomes"].items()
        ),
        f"memory after the warm-up {first['resident_bytes'] / 1e6:.1f} MB, in the end "
        f"{last['resident_bytes'] / 1e6:.1f} MB: {result['growth_bytes_per_request']:+.0f} bytes a "
        f"request",
        "; ".join([result["status"], *result["reasons"]]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
