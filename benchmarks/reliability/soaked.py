"""Send mixed traffic to two replicas, which are ended and started again all the time.

The clients of `benchmarks.soak` send random requests to both replicas. Two more clients send
prompts whose answers are known; like a proxy, they go to the other replica if one refuses the
connection. Every few seconds a replica gets SIGTERM. It answers all requests that it has begun and
ends, and another one is started in its place.
"""

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.reliability.server import CLIENTS, NEW_TOKENS, Golden, goldens, text_of
from benchmarks.server import free_port, request, running, serve
from benchmarks.soak import BROKEN, MODEL, QUEUE, SLOTS, Tally, Visitor, prompts, settled, visit

MINUTES = 60
VISITORS = 3  # of each replica
_STAYS = 15.0  # seconds until a replica is ended
_START_SECONDS = 60.0  # the most that a server needs until it is healthy

# Outcomes of a request with a known answer that are not lost; "wrong" has a figure of its own.
_ANSWERED = ("right", "wrong", "503")


@dataclass(slots=True)
class _Replicas:
    """Two addresses, at each of which one server after the other runs.

    Attributes:
        urls: URLs of both.
        ends: number of servers that were ended, by exit code.
        lock: guards `ends`.
    """

    urls: tuple[str, str]
    ends: Counter[int | None] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def run(setting: Setting) -> Iterator[Slice]:
    """Run clients and replicas for the whole time."""
    bundle, draw = setting.bundle(), random.Random(f"{setting.seed} {setting.so_far('minutes')}")
    golden = goldens(bundle, draw)
    ports = (free_port(), free_port())
    replicas = _Replicas((f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"))
    tally, over, good = Tally(), threading.Event(), Counter[str]()
    began, left = time.monotonic(), 0.0
    with ExitStack() as stack:
        keepers = [
            threading.Thread(
                target=_keep,
                args=(bundle, port, setting.folder, _STAYS * (1 + number / 2), over, replicas),
            )
            for number, port in enumerate(ports)
        ]
        for keeper in keepers:
            keeper.start()
        stack.callback(over.set)
        for url in replicas.urls:
            _wait(url)
        texts = prompts(url, draw)
        pool = stack.enter_context(ThreadPoolExecutor(2 * VISITORS + CLIENTS))
        gone = threading.Event()
        stack.callback(gone.set)
        visitors = [
            pool.submit(visit, Visitor(url, texts, random.Random(f"{setting.seed} {n} {url}")),
                        tally, gone)
            for n in range(VISITORS)
            for url in replicas.urls
        ]  # fmt: skip
        users = [
            pool.submit(_use, replicas.urls, golden, random.Random(f"{setting.seed} {n}"), gone)
            for n in range(CLIENTS)
        ]
        time.sleep(setting.seconds)
        gone.set()
        for user in users:
            good.update(user.result())
        for visitor in visitors:
            visitor.result()
        for url in replicas.urls:
            _wait(url)
            left += sum(settled(partial(_metrics, url)).values())
        over.set()
        for keeper in keepers:
            keeper.join()
    yield Slice(
        judged(good, tally.outcomes(), replicas.ends, left, time.monotonic() - began),
        [f"{count} of them lost: {how}" for how, count in good.items() if how not in _ANSWERED],
    )


def judged(
    good: Counter[str],
    others: Counter[str],
    ends: "Counter[int | None]",
    left: float,
    seconds: float,
) -> list[Figure]:
    """Return the figures of a run.

    Args:
        good: number of requests with known answers, by outcome.
        others: number of all other requests, by outcome.
        ends: number of ended replicas, by exit code.
        left: number of slots and queue places that are still taken at the end.
        seconds: duration of the run.
    """
    wrong = sum(count for how, count in others.items() if how[0] == "5" and how != "503")
    lost = sum(count for how, count in good.items() if how not in _ANSWERED)
    return [
        Figure("minutes", seconds / 60, least=MINUTES),
        Figure("requests with known answers", sum(good.values())),
        Figure("of these, answered wrongly", good["wrong"], most=0),
        Figure("of these, lost: not answered, or not by 200 or 503", lost, most=0),
        Figure("other requests", sum(others.values())),
        Figure("of these, refused or cut off because a replica was ending", others[BROKEN]),
        Figure("of these, answered 5xx other than 503", wrong, most=0),
        Figure("replicas ended and started again", sum(ends.values())),
        Figure("of these, with another exit code than 0", sum(ends.values()) - ends[0],
               most=0),
        Figure("slots and queue places still taken at the end", left, most=0),
    ]  # fmt: skip


def _keep(
    bundle: Path,
    port: int,
    folder: Path,
    stays: float,
    over: threading.Event,
    replicas: _Replicas,
) -> None:
    """Run a server at a port, and replace it every few seconds."""
    command = serve(bundle, port=port, name=MODEL, slots=SLOTS, queue=QUEUE)
    while not over.is_set():
        with running(
            [*command, "--threads", 1], port=port, log=folder / f"replica-{port}.log"
        ) as server:
            over.wait(stays)
        with replicas.lock:
            replicas.ends[server.process.returncode] += 1


def _metrics(url: str) -> str:
    return request(url, "GET", "/metrics")[2].decode()


def _wait(url: str) -> None:
    """Wait until the server is healthy.

    Raises:
        TimeoutError: it is not after a minute.
    """
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        with suppress(OSError, http.client.HTTPException):
            if request(url, "GET", "/health")[0] == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{url}: no server is healthy after {_START_SECONDS:g} s")


def _use(
    urls: Sequence[str], golden: Sequence[Golden], draw: random.Random, over: threading.Event
) -> Counter[str]:
    """Send requests with known answers until `over` is set, and count their outcomes."""
    seen: Counter[str] = Counter()
    while not over.is_set():
        how = _asked(urls, draw.choice(golden), draw)
        seen[how] += 1
        if how != "right":
            time.sleep(0.1)
    return seen


def _asked(urls: Sequence[str], one: Golden, draw: random.Random) -> str:
    """Send a request to any replica that accepts the connection; return its outcome."""
    body = {"model": MODEL, "prompt": list(one.prompt), "max_tokens": NEW_TOKENS, "temperature": 0}
    while True:
        for url in draw.sample(list(urls), len(urls)):
            began = time.monotonic()
            try:
                status, _, content = request(
                    url, "POST", "/v1/completions", json.dumps(body).encode()
                )
            except ConnectionRefusedError:
                continue
            except (OSError, http.client.HTTPException) as error:
                return f"{type(error).__name__} after {time.monotonic() - began:.1f} s"
            if status != 200:
                return str(status)
            return "right" if text_of(content) == one.text else "wrong"
        time.sleep(0.1)


PART = Part(
    "soak",
    "Under mixed traffic, while replicas are ended and started, no answer is lost, and none is "
    "wrong.",
    run,
)
