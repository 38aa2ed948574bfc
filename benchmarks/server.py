"""Run a server in a process of its own, with a minimal HTTP client for measuring it.

Uses only the standard library. Reads processes from /proc, so it needs Linux.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Timeout of the start: loading a model, and compiling it, on a busy machine.
_READY_SECONDS = 600.0

# Timeout of a connection: longer than any answer here takes.
_ANSWER_SECONDS = 600.0

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class RequestError(Exception):
    """A request was answered with another status than 200."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        body = response.read(500).decode(errors="replace")
        super().__init__(f"HTTP {response.status}: {body}")
        self.status = response.status
        self.headers = response.headers


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        url: URL without a path.
        process: the started process; it leads a process group, to which its children belong.
    """

    url: str
    process: "subprocess.Popen[bytes]"

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all processes of the server so far, ended children included."""
        own = [stat for stat in _stats() if int(stat[2]) == self.process.pid]
        return sum(int(ticks) for stat in own for ticks in stat[11:15]) / _TICKS

    @property
    def resident_bytes(self) -> int:
        """Present resident memory of the started process."""
        return int(_stat(Path(f"/proc/{self.process.pid}"))[21]) * _PAGE

    def freeze(self) -> None:
        """Stop the server (SIGSTOP), so that it takes no time from others."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Continue the stopped server (SIGCONT)."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill all processes that are left (SIGKILL)."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the server."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _stat(folder: Path) -> list[str]:
    """Return the fields after the name, which may contain spaces; see proc_pid_stat(5)."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _stats() -> Iterator[list[str]]:
    """Yield these fields for every process of the machine."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            yield _stat(folder)


@contextmanager
def running(
    command: Sequence[object], *, port: int, log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, wait until it is healthy, and end it with SIGTERM after the block.

    Args:
        command: command of a server that listens on 127.0.0.1 and answers GET /health.
        port: port that the server listens on.
        log: file for its standard output and standard error.
        variables: environment variables, in addition to those of this process.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **(variables or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            # A shell or terminal cannot signal the server, whose group may be stopped.
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not _healthy(server.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield server
    finally:
        server.thaw()
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            process.wait()
        server.kill()


def serve(bundle: Path, *, port: int, name: str, slots: int, queue: int) -> list[object]:
    """Return the command that serves a bundle with this Python."""
    run = "from thanos_deploy.cli import main; main()"
    return [
        *(sys.executable, "-P", "-c", run, "serve", bundle),
        *("--port", port, "--name", name, "--slots", slots, "--queue", queue),
    ]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def request(
    url: str, method: str, path: str, body: bytes | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request; return status, headers and body of the answer."""
    with closing(open_connection(url)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def stream(url: str, path: str, body: dict[str, Any]) -> Generator[str, None, None]:
    """Send a request, and yield the data of each server-sent event of the answer.

    Closing the iterator before its end drops the connection.

    Raises:
        RequestError: the status is not 200.
        ConnectionError, http.client.HTTPException: the answer broke off.
    """
    with closing(open_connection(url)) as connection:
        content = json.dumps({**body, "stream": True})
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RequestError(response)
        for line in response:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def open_connection(url: str) -> http.client.HTTPConnection:
    """Return a connection to a server, not yet opened."""
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=_ANSWER_SECONDS)


def _healthy(url: str) -> bool:
    try:
        return request(url, "GET", "/health")[0] == 200
    except OSError:
        return False
