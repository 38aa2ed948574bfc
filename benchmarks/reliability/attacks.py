"""Attacks on a server, one function each: what it does once, until it is told that it is over.

An attack may be cut off at any moment, so that its own errors do not count. It pauses between two
actions, because it shares the processors with what it attacks.
"""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

SECONDS = 20.0  # for an answer
_PAUSE = 0.02

_JSON = "Content-Type: application/json\r\n"


@dataclass(frozen=True, slots=True)
class Target:
    """What is attacked, and by whom.

    Attributes:
        address: of the server.
        key: a good one.
        model: its name.
        chance: where the attack draws from.
    """

    address: tuple[str, int]
    key: str
    model: str
    chance: random.Random

    def connect(self) -> socket.socket:
        """A connection."""
        return socket.create_connection(self.address, timeout=SECONDS)

    def head(self, request: str, *headers: str, key: str | None = None) -> bytes:
        """The beginning of a request: its first line and its headers."""
        lines = [
            f"{request} HTTP/1.1",
            "Host: localhost",
            f"Authorization: Bearer {self.key if key is None else key}",
            *headers,
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def post(self, body: bytes, *, key: str | None = None) -> bytes:
        """A whole request for a text."""
        return (
            self.head(
                "POST /v1/completions",
                f"Content-Type: application/json\r\nContent-Length: {len(body)}",
                key=key,
            )
            + body
        )

    def asked(self, **fields: object) -> bytes:
        """The body of a good request."""
        return json.dumps(
            {"model": self.model, "prompt": "a", "max_tokens": 8, "temperature": 0, **fields}
        ).encode()

    def status(self, sent: bytes) -> str:
        """How a request is answered: a status, and whether a 503 says when to come back."""
        with closing(self.connect()) as connection:
            with suppress(OSError):  # a refusal may come before all is sent
                connection.sendall(sent)
            try:
                answer = connection.recv(1 << 16)
            except OSError:
                return "cut off"
        status = answer[9:12].decode(errors="replace") or "cut off"
        without = status == "503" and b"retry-after" not in answer.lower()
        return "503 without Retry-After" if without else status


Attack = Callable[[Target], list[str]]


def repeat(attack: Attack, target: Target, seconds: float) -> Counter[str]:
    """Do it for some time; how its actions ended."""
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found.update(attack(target))
        except OSError:  # its connections are cut off
            found["cut off"] += 1
        time.sleep(_PAUSE)
    return found


def slow_headers(target: Target) -> list[str]:
    """Slowloris: many connections, a letter on each now and then."""
    with ExitStack() as stack:
        many = [stack.enter_context(closing(target.connect())) for _ in range(100)]
        for letter in b"GET /health HTT":
            for connection in many:
                with suppress(OSError):
                    connection.send(bytes([letter]))
            time.sleep(0.02)
    return ["left"] * len(many)


def slow_bodies(target: Target) -> list[str]:
    """Many bodies, of each a byte now and then."""
    with ExitStack() as stack:
        many = [stack.enter_context(closing(target.connect())) for _ in range(100)]
        for connection in many:
            connection.sendall(target.head("POST /v1/completions", f"{_JSON}Content-Length: 1000"))
        for _ in range(10):
            for connection in many:
                with suppress(OSError):
                    connection.send(b" ")
            time.sleep(0.02)
    return ["left"] * len(many)


def slow_readers(target: Target) -> list[str]:
    """Streams that nobody reads."""
    with ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(closing(socket.socket()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            connection.settimeout(SECONDS)
            connection.connect(target.address)
            connection.sendall(target.post(target.asked(stream=True, ignore_eos=True)))
        time.sleep(0.3)
    return ["left"] * 8


def half_closed(target: Target) -> list[str]:
    """A client that closes its side after a request, or in the middle of one."""
    found = []
    for part in (1.0, 0.5):
        whole = target.post(target.asked())
        with closing(target.connect()) as connection:
            connection.sendall(whole[: int(part * len(whole))])
            connection.shutdown(socket.SHUT_WR)
            with suppress(OSError):
                found.append(connection.recv(1 << 16)[9:12].decode() or "cut off")
    return found


def large_bodies(target: Target) -> list[str]:
    """A gigabyte, announced or in chunks, of large and of single bytes."""
    announced = target.head("POST /v1/completions", f"{_JSON}Content-Length: {1 << 30}")
    chunked = target.head("POST /v1/completions", f"{_JSON}Transfer-Encoding: chunked")
    part = b" " * 0x10000
    return [
        _poured(target, announced, part),
        _poured(target, chunked, b"10000\r\n" + part + b"\r\n"),
        _poured(target, chunked, b"1\r\n \r\n" * 10_000),
    ]


def _poured(target: Target, head: bytes, part: bytes) -> str:
    """How it ends when the body goes on until it is cut off, or a gigabyte is sent."""
    with closing(target.connect()) as connection:
        try:
            connection.sendall(head)
            for _ in range((1 << 30) // len(part)):
                connection.sendall(part)
        except OSError:
            return "cut off"
    return "taken"


def large_headers(target: Target) -> list[str]:
    """A megabyte of headers, in one or in many, and of the address."""
    return [
        target.status(target.head("GET /health", f"X-Long: {'a' * (1 << 20)}")),
        target.status(target.head("GET /health", "\r\n".join(["X-Many: a"] * 100_000))),
        target.status(target.head(f"GET /{'a' * (1 << 20)}")),
    ]


def pipelines(target: Target) -> list[str]:
    """A hundred requests that are sent before one answer is read."""
    with closing(target.connect()) as connection:
        connection.sendall(target.head("GET /health") * 99)
        connection.sendall(target.head("GET /health", "Connection: close"))
        received = b""
        with suppress(OSError):
            while part := connection.recv(1 << 16):
                received += part
    return ["200"] * received.count(b"HTTP/1.1 200")


def malformed(target: Target) -> list[str]:
    """Bodies that are no UTF-8, no JSON, nested 100 000 times, or a little of a good one."""
    chance, good = target.chance, target.asked(tools=[])
    deep = b'{"model": "%b", "prompt": "a", "metadata": %b}'
    bodies = [
        good.replace(b'"a"', b'"\xff\xfe\xc3("'),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        deep % (target.model.encode(), b"[" * 900 + b"]" * 900),
        good[: chance.randrange(len(good))],
        bytes(chance.randrange(256) for _ in range(200)),
        target.asked(logit_bias={"9" * 5000: 1}),
    ]
    return [target.status(target.post(body)) for body in bodies]


def cancellations(target: Target) -> list[str]:
    """Texts that nobody waits for."""
    many = 50
    for _ in range(many):
        with closing(target.connect()) as connection:
            connection.sendall(target.post(target.asked(stream=True, ignore_eos=True)))
            if target.chance.random() < 0.2:
                with suppress(OSError):
                    connection.recv(10)
    return ["left"] * many


def guessed_keys(target: Target) -> list[str]:
    """Keys that are almost right, or no keys at all."""
    guesses = [target.key[:-1], target.key + "x", target.key.upper(), "", "\xe9", "a" * 5000]
    return [target.status(target.post(target.asked(), key=guess)) for guess in guesses]


def injected_lines(target: Target) -> list[str]:
    """Paths, methods and headers that look like lines of the log, and ever new ones."""
    number = target.chance.getrandbits(64)
    fake = "%0a%7b%22level%22%3a%22error%22%7d%0d%0a%e2%80%a8"
    return [
        target.status(target.head(f"GET /{fake}{number}")),
        target.status(target.head(f"GET /v1/models/{number}/{fake}")),
        target.status(target.head("GET /health", f'X-Request-ID: {number}", "level": "error')),
        target.status(target.head(f"M{number} /health")),
        target.status(target.head("GET /health", f"Host: {number}.example")),
    ]


def overload(target: Target) -> list[str]:
    """Two hundred requests at once: ten times as many as there is room for."""
    with ExitStack() as stack:
        many = [stack.enter_context(closing(target.connect())) for _ in range(200)]
        for connection in many:
            connection.sendall(target.post(target.asked(ignore_eos=True)))
        found = []
        for connection in many:
            with suppress(OSError):
                answer = connection.recv(1 << 16)
                without = answer[9:12] == b"503" and b"retry-after" not in answer.lower()
                found.append("503 without Retry-After" if without else answer[9:12].decode())
    return found


# Of requests that the server has to answer, others have to wait for their turn.
LOADS: tuple[Attack, ...] = (overload,)

ATTACKS: tuple[Attack, ...] = (
    slow_headers,
    slow_bodies,
    slow_readers,
    half_closed,
    large_bodies,
    large_headers,
    pipelines,
    malformed,
    cancellations,
    guessed_keys,
    injected_lines,
)
