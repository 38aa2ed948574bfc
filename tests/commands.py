"""Run the command in a process of its own, forked from one that has imported everything.

A process that is started afresh spends five seconds on imports before it does what a test is about,
and as long on tracing the graph that it exports.
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

# The installed program, for tests that need a process that is started afresh.
COMMAND = Path(sys.executable).parent / "thanos-deploy"

# Children are forked from a process that has imported everything and traced one small model. Each
# test process has one such fork server, and the first user of it determines what it imports.
# `thanos_deploy.gpu_check.steps` imports less, so test modules that use it run later (see
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
    """A running command, with the part of the interface of `subprocess.Popen` that tests use.

    Attributes:
        pid: ID of the process, which leads a process group and a session of its own.
    """

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        """Start the command.

        Args:
            arguments: arguments of `thanos-deploy`.
            environment: environment variables, in addition to those of this process.
            before: function that the process calls first; the process imports it by its module.
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
        """Return the exit code, negative for a signal; None while the command runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        """The exit code; see `poll`."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process at once (SIGKILL)."""
        self._process.kill()

    def wait(self, seconds: float) -> None:
        """Wait until the command ends, for at most some seconds."""
        self._process.join(seconds)

    def communicate(self) -> tuple[bytes, bytes]:
        """Wait until the command ends; return its standard output and standard error."""
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
    # As for a program that a shell runs in the foreground.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["thanos-deploy", *arguments]
    if before is not None:
        before()
    cli.main()
