"""Several engines side by side: each in a fresh process of its own, taking turns.

Turns make what the machine does meanwhile (clock changes, other load) fall on all alike: in every
round each engine has its turn at each scenario, in an order that rotates from round to round and is
reversed every other one. A process of its own makes memory the engine's and nobody else's.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from thanos_deploy.errors import DeployError, PlatformError
from thanos_deploy.machine.environment import cores
from thanos_deploy.measure import messages
from thanos_deploy.measure.latency import Samples, Scenario
from thanos_deploy.measure.messages import Failed, Ready, Reply, Request, Taken, Turn

# Name of the scenario -> label of the engine -> samples.
Round = dict[str, dict[str, Samples]]

# A turn this much faster than every one before says that the engine is not warm yet.
_STILL_FASTER = 0.95


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading took.

    Attributes:
        load_seconds: from the start of loading until ready, hashing included.
        load_peak_bytes: peak resident memory of the process until then.
    """

    load_seconds: float
    load_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process that has done its work.

    Attributes:
        steady_bytes: resident memory now; None where the system does not say.
        peak_bytes: the most there ever was.
    """

    steady_bytes: int | None
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Turns that do not count.

    Attributes:
        rounds: how many there were.
        stable: the last one was not clearly faster than all before.
        last: its samples, by label.
    """

    rounds: int
    stable: bool
    last: dict[str, Samples]


@contextmanager
def opened(
    bundles: Mapping[str, Path],
    *,
    backend: str = "onnxruntime",
    provider: str = "cpu",
    threads: int | None = None,
) -> Iterator["Engines"]:
    """Load the exported models of some bundles, one after the other.

    Args:
        bundles: label -> bundle folder.
        backend, provider: see `runtime.engine.open_engine`.
        threads: how many compute on a CPU; None for as many as there are processors.

    Raises:
        DeployError: an engine cannot be loaded; as its own process reported it.
    """
    with ExitStack() as stack:
        workers, loaded = {}, {}
        for label, path in bundles.items():
            worker = stack.enter_context(_Worker(path, backend, provider, str(threads or cores())))
            reply = worker.receive()
            assert isinstance(reply.said, Ready)
            workers[label] = worker
            loaded[label] = Loaded(reply.said.load_seconds, reply.peak_memory_bytes)
        yield Engines(workers, loaded)


class Engines:
    """Loaded engines that take turns.

    Attributes:
        loaded: what loading each of them took.
    """

    def __init__(self, workers: Mapping[str, "_Worker"], loaded: Mapping[str, Loaded]) -> None:
        """Made by `opened`."""
        self._workers = workers
        self.loaded = loaded

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the engines have used so far."""
        return sum(worker.cpu_seconds for worker in self._workers.values())

    @property
    def processes(self) -> dict[str, int]:
        """Their process numbers."""
        return {label: worker.process for label, worker in self._workers.items()}

    def warm_up(self, scenario: Scenario, *, at_most: int) -> WarmUp:
        """Take turns until no engine is getting faster any more.

        Args:
            scenario: what to take turns at.
            at_most: rounds.
        """
        fastest: dict[str, float] = {}
        for number in range(1, at_most + 1):
            last = self._turns(scenario, number)
            taken = {label: sum(samples[scenario.headline]) for label, samples in last.items()}
            stable = all(
                label in fastest and seconds >= _STILL_FASTER * fastest[label]
                for label, seconds in taken.items()
            )
            if stable:
                break
            fastest = {
                label: min(seconds, fastest.get(label, seconds)) for label, seconds in taken.items()
            }
        return WarmUp(number, stable, last)

    def take_turns(self, scenarios: Sequence[Scenario], number: int) -> Round:
        """One round: a turn of every engine at every scenario.

        Args:
            scenarios: with names that differ.
            number: of the round, which decides on the order.
        """
        return {scenario.name: self._turns(scenario, number) for scenario in scenarios}

    def memory(self) -> dict[str, Memory]:
        """Memory of every engine."""
        replies = {label: worker.ask(Request(None)) for label, worker in self._workers.items()}
        return {
            label: Memory(reply.resident_memory_bytes, reply.peak_memory_bytes)
            for label, reply in replies.items()
        }

    def _turns(self, scenario: Scenario, number: int) -> dict[str, Samples]:
        turn = Request(Turn(scenario, number))
        taken = {
            label: _samples(self._workers[label].ask(turn))
            for label in order(list(self._workers), number)
        }
        return {label: taken[label] for label in self._workers}


def _samples(reply: Reply) -> Samples:
    assert isinstance(reply.said, Taken)
    return {metric: list(values) for metric, values in reply.said.samples.items()}


def order(labels: Sequence[str], number: int) -> list[str]:
    """Whose turn is when in a round: everybody is first, and before everybody else, as often."""
    start = number // 2 % len(labels)
    turned = [*labels[start:], *labels[:start]]
    return turned if number % 2 == 0 else turned[::-1]


class _Worker:
    """A process running `thanos_deploy.measure.worker`, spoken to in lines of JSON."""

    def __init__(self, bundle: Path, *arguments: str) -> None:
        self._bundle = bundle
        self.cpu_seconds = 0.0
        # -P: a folder called `runtime` where the user happens to be is not ours.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "thanos_deploy.measure.worker", str(bundle), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def process(self) -> int:
        """Its number."""
        return self._process.pid

    def ask(self, request: Request) -> Reply:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a dead process is reported when nothing comes back
            self._process.stdin.write(messages.line(request))
            self._process.stdin.flush()
        return self.receive()

    def receive(self) -> Reply:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PlatformError(
                f"{self._bundle}: the measuring process ended with status {self._process.wait()}",
                fix="look at its output above; the machine may be out of memory",
            )
        reply = messages.reply(line)
        self.cpu_seconds = reply.cpu_seconds
        if isinstance(reply.said, Failed):
            raise _RemoteError(reply.said)
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

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message, fix=failed.fix)
        self.exit_code = failed.exit_code  # type: ignore[misc]  # the remote class's own
