"""Whoever has reached a server before it ends is answered."""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from runtime.server import connections, listening, main
from tests.runtime.server.conftest import LIMITS


@contextmanager
def ending(
    bundle: Path,
) -> Iterator[tuple[main.Server, asyncio.AbstractEventLoop, tuple[str, int]]]:
    """A server that is to end within the `with` statement."""
    loops: SimpleQueue[asyncio.AbstractEventLoop] = SimpleQueue()
    listener = listening.listen("127.0.0.1", 0)
    with main.open_service(
        bundle, slots=1, queue=LIMITS.answers, limits=LIMITS, names=("tiny",)
    ) as service:
        server = main.Server(
            service, listener, on_ready=lambda _: loops.put(asyncio.get_running_loop())
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        loop = loops.get(timeout=30)
        try:
            yield server, loop, listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@contextmanager
def connected(bundle: Path) -> Iterator[tuple[main.Server, socket.socket]]:
    """The same server, and a client that it has let in and that has not said anything."""
    with (
        ending(bundle) as (server, _, address),
        closing(socket.create_connection(address, timeout=30)) as client,
    ):
        while not server.server_state.connections:
            time.sleep(0.01)
        yield server, client


def asked(client: socket.socket) -> bytes:
    """What comes back for a request, until the connection is closed."""
    client.settimeout(30)
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while part := client.recv(1 << 16):
        answer += part
    return answer


def test_a_request_that_is_still_on_its_way_is_answered(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_SECONDS", 30.0)
    with connected(bundle) as (server, client):
        server.should_exit = True
        while server.servers[0].is_serving():
            time.sleep(0.01)
        answer = asked(client)
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_connection_that_the_system_holds_is_let_in(bundle: Path) -> None:
    """It comes while the event loop is busy, just before the server ends."""
    with ending(bundle) as (server, loop, address):
        arrived, ended = threading.Event(), threading.Event()

        def end() -> None:
            arrived.wait(30)
            task = loop.create_task(server.shutdown())
            task.add_done_callback(lambda _: ended.set())

        loop.call_soon_threadsafe(end)
        time.sleep(0.1)
        with closing(socket.create_connection(address, timeout=30)) as client:
            assert not server.server_state.connections
            arrived.set()
            answer = asked(client)
        assert ended.wait(30)
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_client_that_says_nothing_is_not_waited_for_long(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FIRST_SECONDS", 0.1)
    with connected(bundle) as (server, client):
        server.should_exit = True
        assert client.recv(1) == b""


def has_ipv6() -> bool:
    """This machine can reach itself at ::1."""
    addresses = Path("/proc/net/if_inet6")
    return addresses.exists() and f"{1:032x}" in addresses.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's filter of packets")
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    ],
)
def test_whoever_had_connected_is_held_and_whoever_comes_later_is_refused(host: str) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(listening.listen(host, 0))
        address = listener.getsockname()[:2]
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(3)
        ]
        listening.drop_new_connections(listener)
        late = stack.enter_context(ThreadPoolExecutor(1)).submit(
            socket.create_connection, address, timeout=30
        )
        with pytest.raises(FutureTimeoutError):  # its system asks again after a second
            late.result(0.1)
        listener.setblocking(False)
        held = [stack.enter_context(one) for one in listening.waiting(listener)]
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            late.result(30)
        for one in held:
            one.sendall(b"answer")
        assert [client.recv(16) for client in clients] == [b"answer"] * 3
