"""Measure several engines side by side: each in a fresh process of its own, taking turns.

Turns make what the machine does meanwhile (clock changes, other load) fall on all alike; the order
is reversed every round. A process of its own makes peak memory the engine's and nobody else's.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.latency import LatencySamples, Workload
from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.progress import OnProgress, silent


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one engine showed.

    Attributes:
        samples: raw seconds, warm-up left out.
        load_seconds: from the start of loading until ready.
        loaded_memory_bytes: peak resident memory of the process once loaded.
        peak_memory_bytes: peak resident memory of the process after all work.
    """

    samples: LatencySamples
    load_seconds: float
    loaded_memory_bytes: int
    peak_memory_bytes: int


def compare(
    bundles: Mapping[str, Path],
    workload: Workload,
    *,
    rounds: int,
    warmup: int,
    backend: str = "onnxruntime",
    on_progress: OnProgress = silent,
) -> dict[str, Measurement]:
    """Measure the exported models of some bundles in turns.

    Args:
        bundles: label -> bundle folder.
        workload: what each does in each round.
        rounds: rounds that count.
        warmup: rounds before them that do not.
        backend: the engine's backend.
        on_progress: told of every round.

    Raises:
        DeployError: an engine cannot be loaded; as its own process reported it.
    """
    with ExitStack() as stack:
        on_progress(0, warmup + rounds)
        workers = {
            label: stack.enter_context(_Worker(path, backend)) for label, path in bundles.items()
        }
        loaded = {label: worker.receive() for label, worker in workers.items()}
        samples = {label: LatencySamples((), ()) for label in bundles}
        for number in range(warmup + rounds):
            order = list(workers) if number % 2 == 0 else list(reversed(workers))
            for label in order:
                taken = workers[label].ask(asdict(workload))
                if number >= warmup:
                    samples[label] += LatencySamples(
                        tuple(taken["prefill_seconds"]), tuple(taken["decode_seconds"])
                    )
            on_progress(number + 1, warmup + rounds)
        return {
            label: Measurement(
                samples=samples[label],
                load_seconds=loaded[label]["load_seconds"],
                loaded_memory_bytes=loaded[label]["peak_memory_bytes"],
                peak_memory_bytes=worker.ask({})["peak_memory_bytes"],
            )
            for label, worker in workers.items()
        }


class _Worker:
    """A process running `runtime.worker`, spoken to in lines of JSON."""

    def __init__(self, bundle: Path, backend: str) -> None:
        self._bundle = bundle
        # -P: a folder called `runtime` where the user happens to be is not ours.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "runtime.worker", str(bundle), backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.receive()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PlatformError(
                f"{self._bundle}: the measuring process ended with status {self._process.wait()}",
                fix="look at its output above; the machine may be out of memory",
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise _RemoteError(reply)
        return reply

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        # The pipe may hold a request that the dead process never read.
        with ExitStack() as closing:
            closing.callback(self._process.stdout.close)
            with suppress(BrokenPipeError):
                self._process.stdin.close()


class _RemoteError(DeployError):
    """A DeployError of the measuring process, with its exit code."""

    def __init__(self, reply: dict[str, Any]) -> None:
        super().__init__(reply["error"], fix=reply["fix"])
        self.exit_code = reply["exit_code"]  # type: ignore[misc]  # the remote class's own
