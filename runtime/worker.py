"""One engine in a process of its own, measured on demand.

`python -m runtime.worker BUNDLE BACKEND` speaks lines of JSON. When the engine is loaded it says
how long that took; then, for every workload on standard input, it returns the samples, and for an
empty object its memory alone.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from runtime.engine import open_engine
from runtime.latency import Workload, measure
from thanos_deploy.environment import peak_memory_bytes
from thanos_deploy.errors import DeployError


def main(bundle: str, backend: str) -> None:
    """Load, then obey until standard input ends."""
    started = time.perf_counter()
    try:
        engine = open_engine(Path(bundle), backend=backend)
    except DeployError as error:
        _say({"error": error.message, "fix": error.fix, "exit_code": error.exit_code})
        return
    _say({"load_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        request = json.loads(line)
        _say(asdict(measure(engine, Workload(**request))) if request else {})


def _say(value: dict[str, object]) -> None:
    print(json.dumps({**value, "peak_memory_bytes": peak_memory_bytes()}), flush=True)


if __name__ == "__main__":
    # Ctrl-C reaches every process of the terminal; whoever started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        main(*sys.argv[1:])
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more, and closing standard output would say so again
