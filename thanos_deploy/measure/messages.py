"""What `measure.paired` asks a process that runs `measure.worker`, and what that one answers.

Each is a line of JSON. A worker answers once it has loaded its engine, and then every request.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.measure.latency import Scenario


@dataclass(frozen=True, slots=True)
class Turn:
    """Take a turn at a scenario.

    Attributes:
        scenario: which; no two kinds have the same fields.
        number: of the turn; see `latency`.
    """

    scenario: Scenario
    number: int


@dataclass(frozen=True, slots=True)
class Request:
    """A turn, or None to be told of the memory alone."""

    turn: Turn | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine is loaded.

    Attributes:
        load_seconds: from the start of loading until ready, hashing included.
    """

    load_seconds: float


@dataclass(frozen=True, slots=True)
class Taken:
    """A turn is over.

    Attributes:
        samples: see `latency.Samples`.
    """

    samples: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Failed:
    """A `DeployError` ended the worker, with this message, remedy and exit code."""

    message: str
    fix: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer.

    Attributes:
        said: what was asked for; None where that was the memory.
        peak_memory_bytes: the most resident memory of the process so far.
        resident_memory_bytes: now; None where the system does not say.
        cpu_seconds: processor time of the process so far.
    """

    said: Ready | Taken | Failed | None
    peak_memory_bytes: int
    resident_memory_bytes: int | None
    cpu_seconds: float


def line(message: Request | Reply) -> str:
    """A message as the line that is sent."""
    return json.dumps(encode(message)) + "\n"


def request(line: str) -> Request:
    """The request in a line."""
    return decode(Request, json.loads(line))


def reply(line: str) -> Reply:
    """The reply in a line."""
    return decode(Reply, json.loads(line))
