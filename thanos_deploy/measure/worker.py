"""Run one engine in a process of its own, and measure it on request.

`python -m thanos_deploy.measure.worker BUNDLE BACKEND PROVIDER THREADS` speaks lines of JSON. When
the engine is loaded it says how long that took; then, for every turn of a scenario on standard
input, it returns the samples, and for an empty object its memory alone.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from runtime.engine import open_engine
from thanos_deploy.errors import DeployError
from thanos_deploy.machine.environment import peak_memory_bytes, resident_memory_bytes
from thanos_deploy.measure.latency import from_json

# Of looking whether the backend's threads are at rest.
_NAP_SECONDS = 0.005
_MOST_NAPS = 100


def main(bundle: str, backend: str, provider: str, threads: str) -> None:
    """Load the engine, then answer requests until standard input ends."""
    started = time.perf_counter()
    try:
        engine = open_engine(Path(bundle), backend=backend, provider=provider, threads=int(threads))
        _say({"load_seconds": time.perf_counter() - started})
        for line in sys.stdin:
            request = json.loads(line)
            if not request:
                _say({})
                continue
            samples = from_json(request["scenario"]).take(engine, request["turn"])
            _come_to_rest()
            _say({"samples": samples})
    except DeployError as error:
        _say({"error": error.message, "fix": error.fix, "exit_code": error.exit_code})


def _come_to_rest() -> None:
    """Wait for the backend's threads to stop spinning, which would slow down whoever is next."""
    for _ in range(_MOST_NAPS):
        before = time.process_time()
        time.sleep(_NAP_SECONDS)
        if time.process_time() - before < _NAP_SECONDS / 10:
            return


def _say(value: dict[str, object]) -> None:
    state = {
        "peak_memory_bytes": peak_memory_bytes(),
        "resident_memory_bytes": resident_memory_bytes(),
        "cpu_seconds": time.process_time(),
    }
    print(json.dumps({**value, **state}), flush=True)


if __name__ == "__main__":
    # Ctrl-C reaches every process of the terminal; whoever started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        main(*sys.argv[1:])
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more, and closing standard output would say so again
