"""Attack `thanos-deploy serve` while good clients use it.

Two good clients send one request after the other, and compare each answer with the text that
`runtime.generate` makes from the same prompt. They first do so without an attack, and then under
each attack of `benchmarks.reliability.attacks`. One round of all attacks comes before that, so that
lasting allocations are made before memory is measured. A good client that gets a 503 tries again
after a moment; latency is that of the request that is answered.
"""

import json
import os
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.reliability.attacks import ATTACKS, LOADS, Attack, Target, repeat
from benchmarks.reliability.part import Figure, Part, Setting, Slice
from benchmarks.server import Server, free_port, running, serve
from benchmarks.smollm2 import gguf_path
from benchmarks.soak import settled
from exporters.options import ExportRequest
from runtime.engine import open_engine
from runtime.generate import generate
from runtime.text import Tokenizer, open_tokenizer, pieces
from thanos_deploy.progress import quietly
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.export import export_dense

MODEL = "attacked"
SLOTS, QUEUE = 4, 16
PROMPTS, NEW_TOKENS, CLIENTS = 20, 8, 2
MOST_MEMORY, MOST_SLOWER = 0.05, 3.0


@dataclass(frozen=True, slots=True)
class Golden:
    """A prompt, and the text that the server has to answer."""

    prompt: tuple[int, ...]
    text: str


def stand_back() -> None:
    """Give this process the lowest CPU priority.

    An attacker on another machine would take no processor time except what the server spends.
    """
    os.setsid()  # the kernel may divide CPU time between sessions first (autogroup)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")
    os.nice(19)


def real() -> Path:
    """Export SmolLM2-135M to ONNX in the cache of dense models, and return its folder."""
    dense = Dense(str(gguf_path()))
    export_dense(dense, ExportRequest(graph="ort"), quietly)
    return dense.folder


@dataclass(slots=True)
class Seen:
    """Observations of good clients and attackers, collected from several threads.

    Attributes:
        seconds: latencies of correct answers.
        good: number of requests of good clients, by outcome.
        attacks: number of actions of attackers, by outcome.
        lock: guards the other attributes.
    """

    seconds: list[float] = field(default_factory=list)
    good: Counter[str] = field(default_factory=Counter)
    attacks: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def goldens(bundle: Path, chance: random.Random) -> list[Golden]:
    """Draw prompts, and generate the text of each with the runtime."""
    engine, tokenizer = open_engine(bundle, threads=1), open_tokenizer(bundle)
    found = []
    for _ in range(PROMPTS):
        prompt = tuple(chance.randrange(200) for _ in range(chance.randint(1, 60)))
        ids = generate(engine, prompt, new_tokens=NEW_TOKENS, stop=tokenizer.stop)
        found.append(Golden(prompt, _text(tokenizer, prompt, list(ids))))
    return found


def _text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    return "".join(pieces(tokenizer, ids, prompt))


def use(target: Target, golden: Sequence[Golden], over: threading.Event, seen: Seen) -> None:
    """Send requests as a good client until `over` is set."""
    while not over.is_set():
        one = target.chance.choice(golden)
        started = time.monotonic()
        how = _answered(target, one)
        with seen.lock:
            seen.good[how] += 1
            if how == "right":
                seen.seconds.append(time.monotonic() - started)
        if how != "right":
            over.wait(0.1)


def _answered(target: Target, one: Golden) -> str:
    connection = HTTPConnection(*target.address, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {target.key}"}
    body = target.asked(prompt=list(one.prompt), max_tokens=NEW_TOKENS)
    try:
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        content = response.read()
    except (OSError, HTTPException):
        return "broken"
    finally:
        connection.close()
    if response.status != 200:
        away = response.status == 503 and "Retry-After" in response.headers
        return "503" if away else f"{response.status} without Retry-After"
    return "right" if text_of(content) == one.text else "wrong"


def text_of(content: bytes) -> str | None:
    """Return the text of a completion; None if the content is something else."""
    try:
        text = json.loads(content)["choices"][0]["text"]
    except (ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None


def during(
    attack: Attack | None,
    targets: Sequence[Target],
    golden: Sequence[Golden],
    seconds: float,
    attackers: Executor,
) -> Seen:
    """Run the good clients for some seconds, with or without an attack.

    Args:
        attack: what the attackers do; None for no attack.
        targets: target of the good clients, and one for each attacker.
        golden: prompts and answers for the good clients.
        seconds: duration.
        attackers: pool of separate processes, so that attackers do not delay the good clients.
    """
    seen, over = Seen(), threading.Event()
    good, *others = targets
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = []
        for _ in range(CLIENTS):
            own = replace(good, chance=random.Random(good.chance.random()))
            clients.append(pool.submit(use, own, golden, over, seen))
        running = [attackers.submit(repeat, attack, target, seconds) for target in others if attack]
        time.sleep(seconds)
        for one in running:
            seen.attacks.update(one.result())
        over.set()
        for client in clients:
            client.result()
    return seen


def run(setting: Setting) -> Iterator[Slice]:
    """Run the good clients without an attack and under each attack; see `Part`."""
    chance, key = random.Random(setting.seed), secrets.token_hex(16)
    bundle = setting.bundle()
    golden = goldens(bundle, chance)
    keys, log = setting.folder / "keys", setting.folder / "server.log"
    keys.touch(mode=0o600)
    keys.write_text(key)
    port = free_port()
    command = serve(bundle, port=port, name=MODEL, slots=SLOTS, queue=QUEUE)
    command += ["--api-key-file", keys, "--threads", 1]
    targets = [
        Target(("127.0.0.1", port), key, MODEL, random.Random(f"{setting.seed} {number}"))
        for number in range(3)
    ]
    kinds = (*ATTACKS, *LOADS)
    # The time without an attack is that of two attacks; the first round takes that of four.
    share = setting.seconds / (len(kinds) + 6)
    with (
        running(command, port=port, log=log) as server,
        ProcessPoolExecutor(
            len(targets) - 1, get_context("spawn"), initializer=stand_back
        ) as attackers,
    ):
        for attack in kinds:
            during(attack, targets, golden, 4 * share / len(kinds), attackers)
        _settle(server, key)
        series = _series(server, key)
        before = server.resident_bytes
        quiet = during(None, targets, golden, 2 * share, attackers)
        seen = {attack: during(attack, targets, golden, share, attackers) for attack in kinds}
        left = _settle(server, key)
        after = server.resident_bytes
        new_series = _series(server, key) - series
    yield Slice(judged(quiet, seen, (before, after), left, new_series, log.read_bytes(), key))


def judged(
    quiet: Seen,
    seen: dict[Attack, Seen],
    memory: tuple[int, int],
    left: float,
    new_series: int,
    log: bytes,
    key: str,
) -> list[Figure]:
    """Return the figures of a run.

    Args:
        quiet: observations without an attack.
        seen: observations under each attack.
        memory: bytes of the server before and after.
        left: number of slots and queue places that are still taken at the end.
        new_series: number of metric series that were added since the first round.
        log: log of the server.
        key: the valid API key.
    """
    good: Counter[str] = sum((one.good for one in (quiet, *seen.values())), Counter())
    answers: Counter[str] = sum((one.attacks for one in seen.values()), Counter())
    wrong = [how for how in good if how not in ("right", "503", "broken")]
    other = [how for how in answers if how[0] == "5" and how != "503"]
    grown = memory[1] / memory[0] - 1
    lines = log.splitlines()
    unread = sum(not _is_entry(line) for line in lines)
    figures = [
        Figure("requests of good clients", sum(good.values())),
        Figure("wrong answers", good["wrong"], most=0),
        Figure(
            "good requests that broke off, or were refused other than by 503 with Retry-After",
            sum(good[how] for how in (*wrong, "broken")) - good["wrong"],
            most=0,
        ),
        Figure("actions of attackers", sum(answers.values())),
        Figure(
            "5xx to attackers other than 503 with Retry-After",
            sum(answers[how] for how in other),
            most=0,
        ),
        Figure("memory growth, as a fraction", grown, most=MOST_MEMORY, joined="most"),
        Figure("slots and queue places still taken at the end", left, most=0),
        Figure("metric series that attackers added", new_series, most=0),
        Figure("log lines that are not JSON", unread, most=0),
        Figure("log lines that contain the key", log.count(key.encode()), most=0),
        Figure(
            "p99 latency of good requests without an attack, ms", 1000 * _p99(quiet), joined="most"
        ),
    ]
    for attack, one in seen.items():
        slower = _p99(one) / _p99(quiet) if one.seconds else np.inf
        name = attack.__name__.replace("_", " ")
        figures.append(
            Figure(
                f"p99 latency under {name}, times that without an attack",
                min(slower, 1e9),
                most=None if attack in LOADS else MOST_SLOWER,
                joined="most",
            )
        )
    return figures


def _p99(seen: Seen) -> float:
    return float(np.percentile(seen.seconds, 99)) if seen.seconds else 0.0


def _is_entry(line: bytes) -> bool:
    """Whether a line is a log entry, or the address that is printed to the same file."""
    if line.startswith(b"ready http"):
        return True
    try:
        return bool({"time", "level", "message"} <= json.loads(line).keys())
    except (ValueError, AttributeError):
        return False


def _metrics(server: Server, key: str) -> list[str]:
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
        return connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()


def _series(server: Server, key: str) -> int:
    return sum(not line.startswith("#") for line in _metrics(server, key))


def _settle(server: Server, key: str) -> float:
    """Return the slots and queue places still taken once the server had time to release them."""
    return sum(settled(lambda: "\n".join(_metrics(server, key))).values())


PART = Part(
    "server",
    "`thanos-deploy serve` answers good requests correctly and in time while it is attacked.",
    run,
)
