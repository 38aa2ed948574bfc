"""A real Triton Inference Server: the one in the wheel of pytriton, on the loopback interface."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from thanos_deploy.bundle.manifest import Bundle, claim
from thanos_deploy.stages.export import export

ENVIRONMENT = Path(__file__).parents[2] / ".venv-triton"
PACKAGES = ENVIRONMENT / "lib" / "python3.11" / "site-packages"
SERVER = PACKAGES / "pytriton" / "tritonserver"

needs_triton = [
    pytest.mark.triton,
    pytest.mark.skipif(
        not (ENVIRONMENT / ".installed").exists(), reason="`make test-triton` installs Triton"
    ),
]


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready.

    Attributes:
        repository: the folder of its models.
        http, grpc: where it listens.
        log: what it says.
        process: its main process.
    """

    repository: Path
    http: str
    grpc: str
    log: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def repository(two_four_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported repository, moved away from its bundle. Not to be changed."""
    out = Path(shutil.copytree(two_four_bundle, tmp_path_factory.mktemp("triton") / "out"))
    with claim(out, Bundle.open(out).source) as bundle:
        export(bundle, target="triton")
    moved = tmp_path_factory.mktemp("moved") / "repository"
    shutil.move(out / "triton", moved)
    shutil.rmtree(out)
    return moved


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the model text, on a copy of the repository that a test may damage."""
    folder = tmp_path_factory.mktemp("server")
    models = Path(shutil.copytree(repository, folder / "models"))
    ports = [_free_port(), _free_port()]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                SERVER / "bin" / "tritonserver",
                f"--model-repository={models}",
                f"--backend-directory={SERVER / 'backends'}",
                *("--http-address=127.0.0.1", f"--http-port={ports[0]}"),
                *("--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}"),
                *("--allow-metrics=false", "--model-control-mode=explicit", "--load-model=text"),
            ],
            env={
                **os.environ,
                "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
                "LD_LIBRARY_PATH": str(PACKAGES / "nvidia_pytriton.libs"),
                "PYTHONPATH": "",  # its Python has packages of its own
            },
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    http, grpc = (f"127.0.0.1:{port}" for port in ports)
    started = Server(models, http, grpc, log, process)
    try:
        _wait(started)
        yield started
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server) -> None:
    import tritonclient.http

    with tritonclient.http.InferenceServerClient(server.http) as client:
        for _ in range(300):
            assert server.process.poll() is None, server.log.read_text()
            try:
                if client.is_server_ready():
                    return
            except OSError:
                pass
            time.sleep(0.2)
    raise AssertionError(server.log.read_text())


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
