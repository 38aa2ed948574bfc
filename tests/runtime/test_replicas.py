"""Two servers behind nginx, with the configuration that is shipped."""

import http.client
import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.server import Server, free_port, open_connection, request, running, serve, stream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nginx") is None, reason="nginx is not installed (Debian: nginx-light)"
    ),
]

CONFIGURATION = resources.files("runtime.server").joinpath("nginx.conf").read_text()
COMPLETIONS = "/v1/completions"
SLOTS, QUEUE = 2, 2

# Where the shipped file has the proxy and its two replicas.
ADDRESSES = ("127.0.0.1:8000", "127.0.0.1:8001", "127.0.0.1:8002")


@dataclass(frozen=True, slots=True)
class Proxied:
    """A proxy and what is behind it."""

    url: str
    replicas: tuple[Server, Server]


@contextmanager
def behind_nginx(bundle: Path, folder: Path) -> Iterator[Proxied]:
    """Two replicas of a bundle behind nginx."""
    with ExitStack() as stack:
        replicas = []
        for number in range(2):
            port = free_port()
            command = serve(bundle, port=port, name="tiny", slots=SLOTS, queue=QUEUE)
            log = folder / f"replica-{number}.log"
            replicas.append(stack.enter_context(running(command, port=port, log=log)))
        first, second = replicas
        port = free_port()
        command = nginx(folder, port, *(urlsplit(replica.url).netloc for replica in replicas))
        proxy = stack.enter_context(running(command, port=port, log=folder / "nginx.log"))
        yield Proxied(proxy.url, (first, second))


@pytest.fixture(scope="module")
def proxied(exported_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """Two replicas of the tiny model. Not to be ended."""
    with behind_nginx(exported_llama, tmp_path_factory.mktemp("nginx")) as proxied:
        yield proxied


def nginx(folder: Path, port: int, *replicas: str) -> list[object]:
    """The command that runs nginx on the shipped file, in a folder of its own."""
    shipped = CONFIGURATION
    for address, instead in zip(ADDRESSES, (f"127.0.0.1:{port}", *replicas), strict=True):
        assert shipped.count(address) == 1
        shipped = shipped.replace(address, instead)
    paths = "\n".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; error_log stderr; pid {folder}/pid;\n"
        f"events {{}}\nhttp {{ access_log off;\n{paths}\n{shipped} }}"
    )
    return ["nginx", "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf"]


def body(**fields: object) -> bytes:
    return json.dumps(
        {"model": "tiny", "prompt": "ab", "max_tokens": 8, "ignore_eos": True, **fields}
    ).encode()


def metric(replica: Server, name: str) -> float:
    """A figure of a replica; 0 where it has not come up."""
    _, _, metrics = request(replica.url, "GET", "/metrics")
    lines = [line for line in metrics.decode().splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


def served(replica: Server) -> float:
    """Completions that a replica has answered with 200."""
    return metric(replica, f'thanos_requests_total{{route="{COMPLETIONS}",status="200"}}')


@pytest.mark.slow
def test_both_replicas_share_the_requests(proxied: Proxied) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: request(proxied.url, "POST", COMPLETIONS, body()), range(24))
        )
    assert {status for status, _, _ in answers} == {200}
    assert all(served(replica) for replica in proxied.replicas)


def test_the_id_of_a_request_is_passed_on_and_made_where_there_is_none(proxied: Proxied) -> None:
    with closing(open_connection(proxied.url)) as connection:
        connection.request("GET", "/v1/models", headers={"X-Request-ID": "mine"})
        assert connection.getresponse().headers["X-Request-ID"] == "mine"
    _, headers, _ = request(proxied.url, "GET", "/v1/models")
    assert len(headers["X-Request-ID"]) == 32


def test_an_event_is_passed_on_before_the_next_one_is_there(tmp_path: Path) -> None:
    arrived = threading.Event()

    class Halting(BaseHTTPRequestHandler):
        """Answers with two events; the second has to wait until the first one has arrived."""

        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"data: first\n\n")
            self.wfile.write(f"data: {arrived.wait(20)}\n\n".encode())

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ExitStack() as stack:
        halting = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Halting))
        stack.callback(halting.shutdown)
        threading.Thread(target=halting.serve_forever).start()
        port, url = free_port(), f"127.0.0.1:{halting.server_port}"
        command = nginx(tmp_path, port, url, url)
        proxy = stack.enter_context(running(command, port=port, log=tmp_path / "nginx.log"))
        events = stream(proxy.url, COMPLETIONS, {})
        assert next(events) == "first"
        arrived.set()
        assert list(events) == ["True"]


def test_a_full_replica_passes_requests_on_and_two_full_ones_say_when_to_retry(
    proxied: Proxied,
) -> None:
    room = SLOTS + QUEUE
    long = body(max_tokens=120)
    with ExitStack() as stack:
        connections = [
            stack.enter_context(closing(open_connection(proxied.url))) for _ in range(10 * room)
        ]
        for connection in connections:
            connection.request("POST", COMPLETIONS, long, {"Content-Type": "application/json"})
        responses = [connection.getresponse() for connection in connections]
        statuses = [response.status for response in responses]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) > room  # more than one replica has room for
        for response in responses:
            assert response.status == 200 or int(response.headers["Retry-After"]) > 0
            response.read()


@pytest.mark.slow
def test_no_request_fails_while_a_replica_is_ended(exported_llama: Path, tmp_path: Path) -> None:
    """SIGTERM drains: what it has it finishes, what comes goes to the other one."""
    ended = threading.Event()

    def ask(url: str, number: int) -> list[str]:
        failures = []
        asked_after = 0
        while asked_after < 4:
            asked_after += ended.is_set()
            try:
                if number % 2:
                    status, _, content = request(url, "POST", COMPLETIONS, body())
                    if status != 200:
                        failures.append(f"{status} {content!r}")
                else:
                    *_, last = stream(url, COMPLETIONS, json.loads(body(max_tokens=60)))
                    if last != "[DONE]":
                        failures.append(last)
            except (OSError, http.client.HTTPException) as error:
                failures.append(repr(error))
        return failures

    with (
        behind_nginx(exported_llama, tmp_path) as proxied,
        ThreadPoolExecutor(SLOTS) as pool,
    ):
        first, second = proxied.replicas
        clients = [pool.submit(ask, proxied.url, number) for number in range(SLOTS)]
        while not served(first):
            time.sleep(0.01)
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
        before = served(second)
        ended.set()
        assert [client.result() for client in clients] == [[]] * SLOTS
        assert served(second) >= before + 4


def test_debian_can_read_the_file(tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{ {CONFIGURATION} }}"
    )
    subprocess.run(["nginx", "-t", "-q", "-c", tmp_path / "nginx.conf"], check=True)
