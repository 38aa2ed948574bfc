"""The listening socket of a server, and how to stop listening without losing a connection.

Closing a listening socket resets the connections that the kernel has established and nobody has
accepted yet. A client that has begun to connect by then must be answered, and a later one must be
refused, so that a proxy tries another server. So a shutdown first calls `drop_new_connections`,
then accepts the connections of `waiting`, and only then closes the socket.
"""

import ctypes
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from thanos_deploy.errors import PlatformError

# Number of connections that the kernel holds until they are accepted. When there are no file
# descriptors left, asyncio tries that many times to accept one, and logs every failure.
BACKLOG = 128

# Linux's SO_ATTACH_FILTER, and a filter in classic BPF (socket(7), linux/filter.h): code, jump if
# true, jump if false, operand. A packet begins with its TCP header here, and its flags are the byte
# at 13. A packet that asks for a connection (SYN) is dropped; every other packet passes whole.
_ATTACH_FILTER = 26
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte at 13
    (0x45, 0, 1, 0x02),  # is SYN set in it?
    (0x06, 0, 0, 0),  # yes: keep nothing
    (0x06, 0, 0, 0xFFFFFFFF),  # no: keep everything
)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Args:
        host: a host name or an IP address.
        port: the port; 0 for any that is free.

    Raises:
        PlatformError: this machine does not have the address, or it is taken.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol's number, unlike `socket.create_server`: asyncio sets TCP_NODELAY, which
        # sends without waiting for the client's acknowledgement, only if it sees IPPROTO_TCP.
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
    """Return the URL at which a socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def drop_new_connections(listener: socket.socket) -> None:
    """Ignore new requests for a connection, and complete the connections that have begun.

    A client's kernel repeats its request after a second, and is refused if the socket is closed by
    then. Linux only: no effect elsewhere.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in _DROP_SYN))
    program = struct.pack("@HP", len(_DROP_SYN), ctypes.addressof(code))
    with suppress(OSError):  # then closing resets the connections of the last microseconds
        listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """Accept and yield the connections that the kernel holds."""
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        client.setblocking(False)
        yield client
