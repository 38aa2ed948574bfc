"""Log lines in JSON on standard error, one for each request.

Prompts and answers are in them only if the operator asks for that.

The outermost middleware begins the record of a request and leaves it in the ASGI scope, so that all
code after it can add fields.
"""

import atexit
import json
import logging
import queue
import re
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Scope

REQUEST_ID = "X-Request-ID"

# Number of lines that may wait to be written, and seconds to write the last of them at exit.
_LINES, _FAREWELL_SECONDS = 10_000, 2.0

_WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Record:
    """The record of a request for the log.

    Attributes:
        request_id: the id that the client gave, if it is well-formed, or a random one.
        started: time at which the request came, on the clock `time.monotonic`.
        fields: further fields of its log line.
    """

    request_id: str
    started: float = field(default_factory=time.monotonic)
    fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, scope: Scope) -> "Record":
        """Begin the record of a request, and leave it in its scope."""
        given = Headers(scope=scope).get(REQUEST_ID, "")
        record = cls(given if _WELL_FORMED.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        return record


def record_of(scope: Scope) -> Record:
    """Return the record of a request."""
    record: Record = scope["state"]["record"]
    return record


class JsonLines(logging.Formatter):
    """One line of JSON for each log record, with the `fields` of its `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure() -> None:
    """Send everything that is logged in this process to standard error, as lines of JSON.

    A thread writes the lines, so that a stalled reader of standard error does not stop the server.
    Lines that do not fit in the queue are dropped; their number is logged when there is room again.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    lines = _Lines(queue.Queue(_LINES))
    listener = QueueListener(lines.queue, handler)
    listener.start()
    logging.basicConfig(handlers=[lines], level=logging.INFO, force=True)
    atexit.register(_finish, listener)


class _Lines(QueueHandler):
    """Puts log records into the queue, and never waits."""

    def __init__(self, lines: "queue.Queue[logging.LogRecord]") -> None:
        super().__init__(lines)
        self._left_out = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return the record unchanged; the thread that writes the line formats it."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """See `QueueHandler.enqueue`."""
        try:
            if self._left_out:
                said = logging.makeLogRecord(
                    {
                        "levelname": "WARNING",
                        "msg": f"{self._left_out} lines of the log were left out",
                    }
                )
                self.queue.put_nowait(said)
                self._left_out = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self._left_out += 1


def _finish(listener: QueueListener) -> None:
    """Write the lines that are left, but give up if nobody reads them."""
    thread = threading.Thread(target=listener.stop, daemon=True)
    thread.start()
    thread.join(_FAREWELL_SECONDS)
