"""Who may ask, and how: keys, names of the host, pages of other origins, and kinds of bodies.

A page in a browser can send requests to a server on the same machine, under the browser's own rules
or under a name of the page's that is made to resolve to 127.0.0.1. On a loopback address requests
are therefore answered only under the names of that address, a body has to be of a kind that no
plain form sends, and other origins may read answers only where the operator says so.
"""

import hashlib
import hmac
import ipaddress
import logging
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.errors import RefusedError
from runtime.server.logs import record_of
from thanos_deploy.errors import UsageError

_log = logging.getLogger(__name__)

# What load balancers and kubelets ask, who have no key.
_OPEN = frozenset({"/health", "/health/ready", "/v2/health/live", "/v2/health/ready"})

# Below that, a key can be guessed over a network within days.
_LEAST_KEY = 16

# A name, or a number of IPv6 in brackets, and a port (RFC 9110, section 7.2).
_HOST = re.compile(r"(\[(?P<number>[^][]*)\]|(?P<name>[^][:]+))(:[0-9]*)?")

_KINDS = frozenset({"application/json", "application/octet-stream"})


class Keys:
    """The keys of clients, which can be read again while requests are answered."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Take some keys; none, to let everybody in."""
        self._digests = [_digest(key) for key in keys]

    def replace(self, keys: Sequence[str]) -> None:
        """From now on only these."""
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def number(self, key: str) -> int | None:
        """The place of a key among them, from 1 on; None if it is none of them."""
        given = _digest(key)
        # All are compared, in constant time each: how long it takes tells nothing about any.
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return found.index(True) + 1 if any(found) else None


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask.

    Attributes:
        keys: one of which every request has to give; without any, everybody may ask.
        hosts: names, beside those of a loopback address, under which requests come; None where it
            does not matter, because the address is no loopback one.
        origins: of pages whose scripts may read answers; `*` for all.
    """

    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()


EVERYBODY = Access()


class Locked:
    """Refuses requests without one of the keys; without keys, it refuses none."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["path"] in _OPEN or self._opens(scope):
            return await self._app(scope, receive, send)
        refused = RefusedError(
            401,
            "Incorrect API key provided; send one in the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refused.closing().response(scope)(scope, receive, send)

    def _opens(self, scope: Scope) -> bool:
        if not self._keys:
            return True
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        number = self._keys.number(key.strip() if kind.lower() == "bearer" else "")
        if number is not None:
            record_of(scope).fields["key"] = number
        return number is not None


class Addressed:
    """Answers only under names that belong to this server, and only bodies that no form sends."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None) -> None:
        self._app = app
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and (refused := self._refusal(scope)):
            return await refused.closing().response(scope)(scope, receive, send)
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> RefusedError | None:
        headers = Headers(scope=scope)
        host = _host(headers.get("host", ""))
        # Without any, as from clients of HTTP/1.0, no page of another name asks.
        if self._hosts is not None and host and not (host in self._hosts or is_loopback(host)):
            return RefusedError(
                421,
                f"Host {host!r}: this server listens on a loopback address and does not answer "
                "under that name; its operator can allow it with --allow-host",
                code="unknown_host",
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Triton's client names none for JSON. Neither may a script, but its browser names the page.
        page = "origin" in headers or "sec-fetch-site" in headers
        named = kind in _KINDS or not (kind or page or not scope["path"].startswith("/v2/"))
        if scope["method"] == "POST" and not named:
            return RefusedError(
                415, "send Content-Type: application/json", code="unsupported_media_type"
            )
        return None


def is_loopback(host: str) -> bool:
    """A name or number of this machine that no other machine can reach."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line; empty lines do not count.

    Raises:
        UsageError: it cannot be read, or has no key, or one that no header can carry or that is
            too short.
    """
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: keys cannot be read ({error})", fix="give a text file with a key on each line"
        ) from error
    keys = [key for key in keys if key]
    if not keys or not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UsageError(
            f"{path}: has no key, or a key with characters other than printable ASCII",
            fix="write a key on each line",
        )
    shortest = min(map(len, keys))
    if shortest < _LEAST_KEY:
        raise UsageError(
            f"{path}: a key of {shortest} characters, which can be guessed",
            fix=f"use at least {_LEAST_KEY} random characters: `openssl rand -hex 16` prints 32",
        )
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        _log.warning("%s: other users of this machine can read the keys; chmod 600 it", path)
    return keys


def _host(header: str) -> str:
    """The name in a Host header, without the port and the brackets of an IPv6 number."""
    found = _HOST.fullmatch(header)
    return (found["number"] or found["name"] if found else header).lower()


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing them does not tell theirs."""
    return hashlib.sha256(key.encode("latin-1")).digest()
