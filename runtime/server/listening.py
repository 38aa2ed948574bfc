"""The socket that a server takes connections from, and how listening ends without losing one.

Closing a socket that listens resets the connections that the system has made and nobody has
accepted yet. Who has begun to connect by then is to be answered, and who comes later is to find
nobody, as a proxy expects that asks another server then. So `begin_no_more` comes first, then
whatever is `waiting` is accepted, and only then is the socket closed.
"""

import ctypes
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from thanos_deploy.errors import PlatformError

# Connections that the system holds for us; asyncio tries as often as that to accept one when there
# are no descriptors left, and says so every time.
BACKLOG = 128

# Linux's SO_ATTACH_FILTER, and a filter in classic BPF (socket(7), linux/filter.h): code, jump if
# true, jump if false, operand. A packet begins with its TCP header here, and its flags are the byte
# at 13. One that asks for a connection (SYN) is dropped, and every other one passes whole.
_ATTACH_FILTER = 26
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte at 13
    (0x45, 0, 1, 0x02),  # is SYN set in it?
    (0x06, 0, 0, 0),  # yes: keep nothing
    (0x06, 0, 0, 0xFFFFFFFF),  # no: keep everything
)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Args:
        host: a name or a number.
        port: 0 for any that is free.

    Raises:
        PlatformError: the address is not there, or taken.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol by number, unlike `socket.create_server`: asyncio sends at once, without
        # waiting for the client's acknowledgement, only where it sees that this is TCP.
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener
    except (OSError, OverflowError) as error:
        raise PlatformError(
            f"cannot listen on {host} port {port}: {error}",
            fix="give another --host or --port, or end the program that listens there; --port 0 "
            "takes any that is free",
        ) from error


def url(listener: socket.socket) -> str:
    """Where a socket is reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def begin_no_more(listener: socket.socket) -> None:
    """Ignore whoever asks for a connection from now on, and go on with those that are being made.

    A client's system asks again after a second, and is refused then, when the socket is closed.
    Linux only: elsewhere nothing happens.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in _DROP_SYN))
    program = struct.pack("@HP", len(_DROP_SYN), ctypes.addressof(code))
    with suppress(OSError):  # what closing resets then is what came in the last microseconds
        listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that the system has made and holds for us."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        client.setblocking(False)
        yield client
