"""Access control: API keys, host names, origins of web pages, and content types of bodies.

A web page in a browser can send requests to a server on the same machine, either across origins, as
far as the browser allows it, or through a domain that its owner makes resolve to 127.0.0.1 (DNS
rebinding). So a server on a loopback address answers only requests whose Host header names that
address; a body must have a content type that no HTML form sends; and pages of other origins may
read responses only where the operator allows it.
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

# Health checks: load balancers and kubelets, which ask for them, have no key.
_OPEN = frozenset({"/health", "/health/ready", "/v2/health/live", "/v2/health/ready"})

# Shortest key, in characters; a shorter one can be guessed over a network within days.
_LEAST_KEY = 16

# A Host header: a name, or an IPv6 address in brackets, and a port (RFC 9110, section 7.2).
_HOST = re.compile(r"(\[(?P<number>[^][]*)\]|(?P<name>[^][:]+))(:[0-9]*)?")

_KINDS = frozenset({"application/json", "application/octet-stream"})


class Keys:
    """The API keys of clients, which can be replaced while requests are answered."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        """Accept these keys; without any, everybody has access."""
        self._digests = [_digest(key) for key in keys]

    def replace(self, keys: Sequence[str]) -> None:
        """Accept only these keys from now on."""
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def number(self, key: str) -> int | None:
        """Return the position of a key in the list, from 1 on; None if it is not there."""
        given = _digest(key)
        # All keys are compared, each in constant time, so that the time reveals nothing about them.
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return found.index(True) + 1 if any(found) else None


@dataclass(frozen=True, slots=True)
class Access:
    """Who may send requests, and how.

    Attributes:
        keys: every request must have one of them; without any, everybody has access.
        hosts: names that a Host header may have beside those of the loopback address; None if any
            name will do, because the server's address is not a loopback one.
        origins: origins of web pages whose scripts may read responses; `*` for all.
    """

    keys: Keys = field(default_factory=Keys)
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()


EVERYBODY = Access()


class Locked:
    """Middleware that refuses requests without a valid key, if there are keys."""

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
    """Middleware that refuses foreign host names, and content types that an HTML form can send."""

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
        # A request without Host, as from an HTTP/1.0 client, cannot come from a web page.
        if self._hosts is not None and host and not (host in self._hosts or is_loopback(host)):
            return RefusedError(
                421,
                f"Host {host!r}: this server listens on a loopback address and does not answer "
                "under that name; its operator can allow it with --allow-host",
                code="unknown_host",
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Triton's client sends JSON without a content type. A script of a web page can do the same,
        # but then its browser sends one of the two headers of `page`.
        page = "origin" in headers or "sec-fetch-site" in headers
        named = kind in _KINDS or not (kind or page or not scope["path"].startswith("/v2/"))
        if scope["method"] == "POST" and not named:
            return RefusedError(
                415, "send Content-Type: application/json", code="unsupported_media_type"
            )
        return None


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address is a loopback one, which no other machine can reach."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> list[str]:
    """Read the keys in a file, one per line; empty lines are skipped.

    Raises:
        UsageError: the file cannot be read or has no key, or a key is too short or has characters
            that a header cannot carry.
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
    """Return the host in a Host header, without the port and the brackets of an IPv6 address."""
    found = _HOST.fullmatch(header)
    return (found["number"] or found["name"] if found else header).lower()


def _digest(key: str) -> bytes:
    """Return a digest, equally long for all keys, so that comparing hides the length of a key."""
    return hashlib.sha256(key.encode("latin-1")).digest()
