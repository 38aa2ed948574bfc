"""One connection of a client, with timeouts and limits that hold before the application runs.

uvicorn waits for ever for a client that connects and sends nothing, that sends half of its headers,
or that does not read its response, and it reads the whole body of a refused request. Here:

    too many connections    the one that has waited for its client the longest is closed; if none
                            waits for its client, the newest is answered 503 and closed
    headers                 have HEADER_SECONDS, from the first byte or from connecting
    a response              has to be read `answer_seconds` after its request at the latest
    a refused body          is not read on: the connection is closed once the refusal is sent
    a body in tiny chunks   is refused: parsing a chunk takes much longer than sending it

When the server shuts down, uvicorn closes a connection whose first request is still on its way.
Here such a client has FIRST_SECONDS to send the request, and is answered.
"""

import asyncio
import logging
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

HEADER_SECONDS = 10.0

# Time for the first request of a connection to arrive during shutdown. A lost packet is sent again
# within a second or two.
FIRST_SECONDS = 3.0

# A client that still sends would see a reset instead of the refusal. So the connection stays open
# for this time, or until this many more bytes have come, which are discarded.
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 20

# File descriptors for everything but connections: files, libraries, and the log.
_OTHER_DESCRIPTORS = 64

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\n\r\n"
)

# Number of chunks of a body that may be small, and the mean size of further ones, in bytes.
_CHUNKS, _CHUNK_BYTES = 1000, 256

_log = logging.getLogger(__name__)


class _Wire(h11.Connection):
    """The HTTP parser of a connection, which refuses a body in tiny chunks."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER)
        self._chunks = self._bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """See `h11.Connection.next_event`."""
        event = super().next_event()
        match event:
            case h11.Request():
                self._chunks = self._bytes = 0
            case h11.Data():
                self._chunks += event.chunk_end
                self._bytes += len(event.data)
                if self._chunks > _CHUNKS + self._bytes / _CHUNK_BYTES:
                    raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


class Connection(H11Protocol):
    """A connection that is closed when its client is too slow.

    Attributes:
        most: largest number of connections at the same time.
        answer_seconds: longest time from a request to the end of its response, in seconds.
    """

    most: int
    answer_seconds: float

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See `H11Protocol`."""
        super().__init__(*arguments, **options)
        self.conn = _Wire()
        self._since = self.loop.time()  # when a request began or a response ended last
        self._headers_due: asyncio.TimerHandle | None = None
        self._answer_due: asyncio.TimerHandle | None = None
        self._timed: RequestResponseCycle | None = None  # the request that `_answer_due` belongs to
        self._end_due: asyncio.TimerHandle | None = None  # set while lingering, or during shutdown
        self._is_last = False  # the next request, if one comes, is the last
        self._thrown_away: int | None = None  # bytes discarded while lingering; None before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let a client in, or answer 503 if there is no room."""
        if len(self.connections) >= self.most and not self._make_room():
            self.transport = transport
            transport.write(_FULL)
            transport.close()
            return
        super().connection_made(transport)
        self.transport = _Lingering(transport, self)  # type: ignore[assignment]
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers of a connection that has ended."""
        for timer in (self._headers_due, self._answer_due, self._end_due):
            if timer:
                timer.cancel()
        if self.flow is not None:  # it was let in
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what the client sends, or discard it while lingering."""
        if self._thrown_away is not None:
            self._thrown_away += len(data)
            if self._thrown_away > _LINGER_BYTES:
                self.transport.abort()
            return
        if self._headers_due is None and self.flow is not None and self._is_idle():
            self._await_headers()
        if self.flow is not None:
            super().data_received(data)

    def eof_received(self) -> None:
        """End the lingering, because the client will send no more."""
        if self._thrown_away is not None:
            self.transport.abort()

    def handle_events(self) -> None:
        """Handle the received data; if a request begins with it, start its response timer."""
        super().handle_events()
        if self._is_idle() or self.cycle is self._timed:
            return
        if self._is_last:
            self.cycle.keep_alive = False
            if self._end_due:
                self._end_due.cancel()
        self._timed = self.cycle
        self._since = self.loop.time()
        for timer in (self._headers_due, self._answer_due):
            if timer:
                timer.cancel()
        self._headers_due = None
        self._answer_due = self.loop.call_later(self.answer_seconds, self._give_up, "answer")

    def on_response_complete(self) -> None:
        """Stop the response timer, unless a part of the response is still to be read."""
        self._since = self.loop.time()
        if self._answer_due and not self.transport.get_write_buffer_size():
            self._answer_due.cancel()
            self._answer_due = None
        super().on_response_complete()

    def shutdown(self) -> None:
        """Close after the request in flight, or after the first request if it is still to come."""
        if self.cycle is not None or self.is_lingering:
            return super().shutdown()
        self._is_last = True
        self._end_due = self.loop.call_later(FIRST_SECONDS, super().shutdown)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether the client has to act next: send a request or the rest of a body, or leave."""
        return self._is_idle() or self.conn.their_state is h11.SEND_BODY

    def _make_room(self) -> bool:
        """Close the connection that has waited for its client the longest; False if none waits."""
        waiting = [
            other for other in self.connections if isinstance(other, Connection) and other.waits
        ]
        if not waiting:
            return False
        longest = min(waiting, key=lambda other: other._since)
        self.connections.discard(longest)
        longest._give_up("room")
        return True

    def _await_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self._give_up, "headers")

    def _give_up(self, what: str) -> None:
        if what == "answer" and self._is_idle() and not self.transport.get_write_buffer_size():
            return
        _log.info("a client is too slow", extra={"fields": {"waited_for": what}})
        self.transport.abort()

    @property
    def is_lingering(self) -> bool:
        """Whether received data is discarded until the connection is closed."""
        return self._thrown_away is not None

    def linger(self, transport: asyncio.Transport) -> bool:
        """Keep the connection open for a moment; return False if no more of a body is to come."""
        if self.conn.their_state is not h11.SEND_BODY or transport.is_closing():
            return False
        if self._thrown_away is None:
            self._thrown_away = 0
            if transport.can_write_eof():
                transport.write_eof()
            transport.resume_reading()
            self._end_due = self.loop.call_later(_LINGER_SECONDS, transport.abort)
        return True


class _Lingering:
    """A transport that closes only after the client has stopped sending a refused body."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection

    def close(self) -> None:
        """Close, at once or after lingering."""
        if not self._connection.linger(self._transport):
            self._transport.close()

    def is_closing(self) -> bool:
        """Whether nothing more is to be sent."""
        return self._connection.is_lingering or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def protocol(*, most: int, answer_seconds: float) -> type[Connection]:
    """Return the protocol class for uvicorn: `Connection` with these limits."""
    limits = {"most": most, "answer_seconds": answer_seconds}
    return type("LimitedConnection", (Connection,), limits)


def most_connections(wanted: int) -> int:
    """Return how many of the wanted connections the limit on file descriptors allows, at least 1.

    The soft limit is raised as far as needed and as the hard limit allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_DESCRIPTORS
    if resource.RLIM_INFINITY not in (soft, hard) and soft < needed:
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return (
        wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - _OTHER_DESCRIPTORS))
    )
