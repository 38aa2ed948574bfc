"""Several engines side by side: each in a fresh process of its own, taking turns.

In every round each engine takes one turn at each scenario. So disturbances of the machine (clock
changes, other load) affect all engines alike. The order of the engines rotates from round to round,
and every second round it is reversed. With a process for each engine, the memory of a process is
that of its engine alone.
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

# The samples of one round: name of the scenario -> label of the engine -> samples.
Round = dict[str, dict[str, Samples]]

# An engine is not warm yet if its turn took less than this fraction of its fastest turn before.
_STILL_FASTER = 0.95


@dataclass(frozen=True, slots=True)
class Loaded:
    """The time and memory that loading an engine took.

    Attributes:
        load_seconds: seconds from the start of loading until ready, hashing included.
        load_peak_bytes: peak resident memory of the process until then.
    """

    load_seconds: float
    load_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of an engine's process after its work.

    Attributes:
        steady_bytes: resident memory now; None where the system does not report it.
        peak_bytes: peak resident memory.
    """

    steady_bytes: int | None
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The warm-up of all engines for one scenario.

    Attributes:
        rounds: number of rounds.
        stable: whether in the last round no engine was clearly faster than in all rounds before.
        last: samples of the last round, by label of the engine.
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
    """Load the exported models of some bundles, one after the other, and end them afterwards.

    Args:
        bundles: maps a label to a bundle folder.
        backend, provider: see `runtime.engine.open_engine`.
        threads: threads that compute on a CPU; None for one per core.

    Raises:
        DeployError: an engine cannot be loaded; this is the error that its process reported.
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
        loaded: time and memory of loading, by label.
    """

    def __init__(self, workers: Mapping[str, "_Worker"], loaded: Mapping[str, Loaded]) -> None:
        """Keep the workers; `opened` is the way to make engines."""
        self._workers = workers
        self.loaded = loaded

    @property
    def cpu_seconds(self) -> float:
        """CPU time that all engines together have used so far."""
        return sum(worker.cpu_seconds for worker in self._workers.values())

    @property
    def processes(self) -> dict[str, int]:
        """The process IDs of the engines, by label."""
        return {label: worker.process for label, worker in self._workers.items()}

    def warm_up(self, scenario: Scenario, *, at_most: int) -> WarmUp:
        """Take turns at a scenario until no engine becomes faster any more.

        Args:
            scenario: the scenario.
            at_most: the most rounds; at least 1.
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
        """Take one round: one turn of every engine at every scenario.

        Args:
            scenarios: the scenarios, each with a different name.
            number: number of the round, which determines the order of the engines.
        """
        return {scenario.name: self._turns(scenario, number) for scenario in scenarios}

    def memory(self) -> dict[str, Memory]:
        """Memory of every engine, by label."""
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
    """Order engines for a round, so that over all rounds no position or pair is favoured.

    Over 2 x len(labels) rounds, each engine takes each position twice, and each of two engines is
    before the other equally often.
    """
    start = number // 2 % len(labels)
    turned = [*labels[start:], *labels[:start]]
    return turned if number % 2 == 0 else turned[::-1]


class _Worker:
    """A process that runs `thanos_deploy.measure.worker`; see `messages` for the protocol."""

    def __init__(self, bundle: Path, *arguments: str) -> None:
        self._bundle = bundle
        self.cpu_seconds = 0.0
        # -P: do not import a folder called `runtime` from the current directory.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "thanos_deploy.measure.worker", str(bundle), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def process(self) -> int:
        """The process ID."""
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
    """A DeployError that a worker process reported, with the same exit code."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message, fix=failed.fix)
        self.exit_code = failed.exit_code  # type: ignore[misc]  # that of the worker's class
