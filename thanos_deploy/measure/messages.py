"""Messages between `measure.paired` and its worker processes, which run `measure.worker`.

Each message is one line of JSON. A worker sends one reply when it has loaded its engine, and then
one reply to each request.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.measure.latency import Scenario


@dataclass(frozen=True, slots=True)
class Turn:
    """An order to take one turn at a scenario.

    Attributes:
        scenario: the scenario. Its kind is recognised by its fields, so no two kinds may have the
            same fields.
        number: number of the turn; see `latency`.
    """

    scenario: Scenario
    number: int


@dataclass(frozen=True, slots=True)
class Request:
    """A request to a worker: a turn to take, or None to report memory and CPU time only."""

    turn: Turn | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The news that the engine is loaded.

    Attributes:
        load_seconds: seconds from the start of loading until ready, hashing included.
    """

    load_seconds: float


@dataclass(frozen=True, slots=True)
class Taken:
    """The result of a turn.

    Attributes:
        samples: see `latency.Samples`.
    """

    samples: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Failed:
    """The `DeployError` that has ended the worker: its message, fix and exit code."""

    message: str
    fix: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of a worker.

    Attributes:
        said: the answer itself; None if only memory and CPU time were asked for.
        peak_memory_bytes: peak resident memory of the process so far.
        resident_memory_bytes: resident memory now; None where the system does not report it.
        cpu_seconds: CPU time of the process so far.
    """

    said: Ready | Taken | Failed | None
    peak_memory_bytes: int
    resident_memory_bytes: int | None
    cpu_seconds: float


def line(message: Request | Reply) -> str:
    """Encode a message as a line of JSON."""
    return json.dumps(encode(message)) + "\n"


def request(line: str) -> Request:
    """Decode the request in a line of JSON."""
    return decode(Request, json.loads(line))


def reply(line: str) -> Reply:
    """Decode the reply in a line of JSON."""
    return decode(Reply, json.loads(line))
