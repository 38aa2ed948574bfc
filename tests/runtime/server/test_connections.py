"""Clients that are silent, slow, deaf or too many take nothing from the others."""

import gc
import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from http.client import HTTPConnection

import pytest

from runtime.server import connections, listening, main
from tests.runtime.server.conftest import LIMITS, Running, Serve

ASKED = {"model": "tiny", "prompt": "a", "max_tokens": 3}


def connect(running: Running) -> socket.socket:
    return socket.create_connection(running.address, timeout=30)


def request(body: bytes, path: str = "/v1/completions", more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def everything(connection: socket.socket) -> bytes:
    """Until the server closes."""
    received = b""
    while part := connection.recv(1 << 16):
        received += part
    return received


def sent_until_cut(connection: socket.socket, part: bytes, *, most: int, pause: float = 0) -> int:
    """How many bytes could be sent before the server cut the connection."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(part)
            sent += len(part)
            time.sleep(pause)
    except (ConnectionResetError, BrokenPipeError):
        return sent
    raise AssertionError(f"{sent} bytes were taken")


@pytest.fixture
def hasty(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    with serve() as running:
        yield running


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        b"POST /v1/completions HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    ],
    ids=["nothing", "a letter", "a line", "a header"],
)
def test_who_sends_no_whole_headers_is_cut_off(hasty: Running, sent: bytes) -> None:
    with connect(hasty) as silent:
        silent.sendall(sent)
        with suppress(ConnectionResetError):  # closed in order is as good
            assert everything(silent) == b""


def test_headers_that_drip_are_cut_off_and_a_second_request_has_the_same_time(
    hasty: Running,
) -> None:
    with connect(hasty) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        time.sleep(0.1)
        started = time.monotonic()
        sent_until_cut(connection, b"X", most=1000, pause=0.05)
        assert time.monotonic() - started > 0.2


def test_a_long_answer_is_not_cut_off_by_the_time_for_headers(hasty: Running) -> None:
    hasty.gate.seconds = 0.2
    answer = hasty.openai().completions.create(**ASKED, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
    assert answer.usage.completion_tokens == 3


def test_more_connections_than_allowed_are_answered_503(serve: Serve) -> None:
    """Where all of them wait for their answers; without any that does not, there is no room."""
    with serve(limits=replace(LIMITS, connections=3)) as running, ExitStack() as stack:
        running.gate.open.clear()
        held = [stack.enter_context(connect(running)) for _ in range(3)]
        for count, one in enumerate(held, 1):
            one.sendall(request(json.dumps({**ASKED, "ignore_eos": True}).encode()))
            running.wait_until(active=1, waiting=count - 1)
        with connect(running) as refused:
            answer = everything(refused)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 1" in answer
        running.gate.open.set()
        assert all(one.recv(1 << 16).startswith(b"HTTP/1.1 200") for one in held)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: l",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 9\r\n\r\n{",
    ],
    ids=["nothing", "half of the headers", "a request, and then nothing", "half of a body"],
)
def test_who_keeps_the_server_waiting_makes_room_the_longest_waiting_first(
    serve: Serve, sent: bytes
) -> None:
    with serve(limits=replace(LIMITS, connections=3)) as running, ExitStack() as stack:
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        idle = []
        for _ in range(4):
            idle.append(stack.enter_context(connect(running)))
            idle[-1].sendall(sent)
            if len(idle) < 3:  # there is room for it, and it is seen after what came before
                with connect(running) as other:
                    other.sendall(health)
                    assert everything(other).startswith(b"HTTP/1.1 200")
        with suppress(ConnectionResetError):
            assert not everything(idle[0]).startswith(b"HTTP/1.1 503")
        for one in idle[1:]:
            one.setblocking(False)
            with suppress(BlockingIOError):
                assert one.recv(1 << 16)  # an answer, and not the end


def test_a_body_in_crumbs_is_refused_and_one_in_chunks_is_read(server: Running) -> None:
    head = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    body = json.dumps(ASKED).encode()
    for crumbs, status in ((900, b"200"), (60_000, b"400")):
        with connect(server) as client:
            client.sendall(head + b"1\r\n \r\n" * crumbs)
            client.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            assert client.recv(1 << 16)[9:12] == status


def test_who_does_not_read_is_cut_off_after_the_deadline(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "_GRACE_SECONDS", 0.5)
    with serve(limits=replace(LIMITS, deadline_seconds=0.5)) as running, ExitStack() as stack:
        deaf = socket.socket()
        stack.callback(deaf.close)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        deaf.connect(running.address)
        one = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        # Its answers fill all buffers long before.
        sent_until_cut(deaf, one * 1000, most=64 << 20)


@pytest.mark.parametrize("what", ["too large", "no key", "chunks"])
def test_a_refused_body_is_not_read_to_its_end(serve: Serve, what: str) -> None:
    with serve(keys=("first",) if what == "no key" else ()) as running, connect(running) as client:
        length = "Transfer-Encoding: chunked" if what == "chunks" else f"Content-Length: {1 << 30}"
        client.sendall(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\n{length}\r\n\r\n".encode()
        )
        part = b"10000\r\n" + b" " * 0x10000 + b"\r\n" if what == "chunks" else b" " * 0x10000
        assert sent_until_cut(client, part, most=1 << 30) < 64 << 20  # with the system's buffers


def test_a_refused_client_that_sends_nothing_more_is_closed(serve: Serve) -> None:
    with serve(keys=("first",)) as running, connect(running) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 401")
        # What the server sends is at its end at once; a moment later it takes nothing any more.
        sent_until_cut(client, b" ", most=200, pause=0.1)


def test_a_refusal_is_read_by_a_client_that_sends_first(serve: Serve) -> None:
    with serve(limits=replace(LIMITS, body_bytes=1000)) as running, connect(running) as client:
        client.sendall(request(b" " * 200_000))
        answer = everything(client)
    assert answer.startswith(b"HTTP/1.1 413")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"


def test_what_is_accepted_sends_without_delay() -> None:
    with (
        listening.listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        accepted, _ = listener.accept()
        with accepted:
            # What asyncio looks at before it sets TCP_NODELAY.
            assert accepted.proto == socket.IPPROTO_TCP
            assert (accepted.family, accepted.type) == (socket.AF_INET, socket.SOCK_STREAM)


def test_answers_on_a_kept_connection_are_sent_without_delay(server: Running) -> None:
    with closing(HTTPConnection(*server.address)) as client:
        for _ in range(2):
            client.request(
                "POST", "/v1/completions", json.dumps(ASKED), {"Content-Type": "application/json"}
            )
            assert client.getresponse().read()
        (accepted,) = [
            one.transport.get_extra_info("socket")
            for one in gc.get_objects()
            if issubclass(type(one), connections.Connection)
            and one.transport.get_extra_info("peername") == client.sock.getsockname()
        ]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_there_are_never_more_connections_than_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = [(100, 200)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    assert connections.most_connections(512) == 200 - 64
    assert limits[-1] == (200, 200)
    assert connections.most_connections(10) == 10
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert connections.most_connections(512) == 512


def test_that_nothing_can_be_accepted_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    handler = main._OnceAMinute()
    for _ in range(1000):
        handler(
            None,  # type: ignore[arg-type]
            {
                "message": "socket.accept() out of system resource",
                "exception": OSError(24, "Too many open files"),
            },
        )
    assert [record.getMessage() for record in caplog.records] == [
        "connections cannot be accepted: [Errno 24] Too many open files"
    ]
