"""The command in a process of its own, forked from one that has imported everything.

A process that starts from nothing imports for five seconds before it does what a test is about, and
traces the graph that it exports for as long.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from thanos_deploy import cli

# The program that is installed, for what is to be seen of a process that starts from nothing.
COMMAND = Path(sys.executable).parent / "thanos-deploy"

# Children are forked from a process that has imported everything and traced one small model. There
# is one such server for each test process, and who asks for it first says what it imports:
# `thanos_deploy.gpu_check.steps` needs less, so modules that use it run later (see
# `tests.conftest.LONGEST`).
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tests.importing",
        "thanos_deploy.stages.pipeline",
        "exporters.onnx.graph",
        "torch.onnx._internal.exporter._core",
        "transformers.models.llama.modeling_llama",
        "tests.preloaded",
    ]
)


class Command:
    """A command that runs, with the part of `subprocess.Popen` that tests use.

    Attributes:
        pid: of the process, which leads a group and a session of its own.
    """

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Start it.

        Args:
            arguments: of `thanos-deploy`.
            environment: its variables beside those of this process.
            before: what the process does first; a function of a module, which is imported there.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        self._streams = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._process: BaseProcess = FORKS.Process(
            target=_run,
            args=(
                [str(argument) for argument in arguments],
                {**os.environ, **(environment or {})},
                Path.cwd(),
                self._streams,
                before,
            ),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The same."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, seconds: float) -> None:
        """Wait for its end, for so long at most."""
        self._process.join(seconds)

    def communicate(self) -> tuple[bytes, bytes]:
        """Wait for its end; what it wrote to standard output and standard error."""
        self._process.join()
        output, errors = (path.read_bytes() if path.exists() else b"" for path in self._streams)
        self._folder.cleanup()
        return output, errors


def _run(
    arguments: list[str],
    environment: Mapping[str, str],
    folder: Path,
    streams: list[Path],
    before: Callable[[], object] | None,
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # As in a shell that is asked to run a program in the foreground.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["thanos-deploy", *arguments]
    if before is not None:
        before()
    cli.main()
