"""A server in a process of its own, and as much of an HTTP client as measuring it needs.

Standard library only. Processes are read from Linux's /proc.
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

# Loading a model, and compiling it, on a busy machine.
_READY_SECONDS = 600.0

# Longer than any answer here takes.
_ANSWER_SECONDS = 600.0

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class RequestError(Exception):
    """A request that was answered with something else than 200."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        body = response.read(500).decode(errors="replace")
        super().__init__(f"HTTP {response.status}: {body}")
        self.status = response.status
        self.headers = response.headers


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        url: without a path.
        process: that was started; it leads a group, to which those belong that it starts.
    """

    url: str
    process: "subprocess.Popen[bytes]"

    @property
    def cpu_seconds(self) -> float:
        """Processor time that its processes have used so far, with that of ended children."""
        own = [stat for stat in _stats() if int(stat[2]) == self.process.pid]
        return sum(int(ticks) for stat in own for ticks in stat[11:15]) / _TICKS

    @property
    def resident_bytes(self) -> int:
        """The memory of the process that was started, now."""
        return int(_stat(Path(f"/proc/{self.process.pid}"))[21]) * _PAGE

    def freeze(self) -> None:
        """Stop it where it is, so that it takes no time from others."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """End whatever is left of it."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        """A signal to all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _stat(folder: Path) -> list[str]:
    """The fields after the name, which may have spaces in it; see proc_pid_stat(5)."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _stats() -> Iterator[list[str]]:
    """Those of every process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            yield _stat(folder)


@contextmanager
def running(
    command: Sequence[object], *, port: int, log: Path, variables: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server, wait until it is healthy, end it with SIGTERM.

    Args:
        command: of a server that listens on 127.0.0.1 and answers GET /health.
        port: where.
        log: gets its standard output and error.
        variables: of its environment, beside those that are there.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env={**os.environ, **(variables or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            # Out of reach of what a shell or a terminal sends its jobs, which may be frozen.
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
    """The command that serves a bundle with this Python."""
    run = "from thanos_deploy.cli import main; main()"
    return [
        *(sys.executable, "-P", "-c", run, "serve", bundle),
        *("--port", port, "--name", name, "--slots", slots, "--queue", queue),
    ]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def request(
    url: str, method: str, path: str, body: bytes | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of an answer."""
    with closing(open_connection(url)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def stream(url: str, path: str, body: dict[str, Any]) -> Generator[str, None, None]:
    """The data of each event of an answer by server-sent events.

    Closing the iterator before its end drops the connection.

    Raises:
        RequestError: the answer is no stream.
        ConnectionError, http.client.HTTPException: it broke off.
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
    """To a server."""
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=_ANSWER_SECONDS)


def _healthy(url: str) -> bool:
    try:
        return request(url, "GET", "/health")[0] == 200
    except OSError:
        return False
