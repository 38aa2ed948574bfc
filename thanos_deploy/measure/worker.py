"""Run one engine in a process of its own, and measure it on request.

`python -m thanos_deploy.measure.worker BUNDLE BACKEND PROVIDER THREADS` reads the requests of
`measure.messages` from standard input and writes its replies to standard output.
"""

import os
import signal
import sys
import time
from pathlib import Path

from runtime.engine import open_engine
from thanos_deploy.errors import DeployError
from thanos_deploy.machine.environment import peak_memory_bytes, resident_memory_bytes
from thanos_deploy.measure.messages import Failed, Ready, Reply, Taken, line, request

# Length and most repetitions of the pauses in which the backend's threads should come to rest.
_NAP_SECONDS = 0.005
_MOST_NAPS = 100


def main(bundle: str, backend: str, provider: str, threads: str) -> None:
    """Load the engine, then answer requests until standard input ends.

    Args:
        bundle: folder of the bundle.
        backend, provider: see `runtime.engine.open_engine`.
        threads: number of threads on a CPU, as a decimal number.
    """
    started = time.perf_counter()
    try:
        engine = open_engine(Path(bundle), backend=backend, provider=provider, threads=int(threads))
        _say(Ready(time.perf_counter() - started))
        for asked in sys.stdin:
            turn = request(asked).turn
            if turn is None:
                _say(None)
                continue
            samples = turn.scenario.take(engine, turn.number)
            _come_to_rest()
            _say(Taken({metric: tuple(values) for metric, values in samples.items()}))
    except DeployError as error:
        _say(Failed(error.message, error.fix, error.exit_code))


def _come_to_rest() -> None:
    """Wait until the backend's threads stop spinning, which would slow down the next engine."""
    for _ in range(_MOST_NAPS):
        before = time.process_time()
        time.sleep(_NAP_SECONDS)
        if time.process_time() - before < _NAP_SECONDS / 10:
            return


def _say(said: Ready | Taken | Failed | None) -> None:
    # The kernel updates both counters now and then, so the peak may lag behind the current size.
    resident = resident_memory_bytes()
    peak = max(peak_memory_bytes(), resident or 0)
    reply = Reply(said, peak, resident, time.process_time())
    print(line(reply), end="", flush=True)


if __name__ == "__main__":
    # Ctrl-C reaches every process of the terminal; the parent process ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        main(*sys.argv[1:])
    except BrokenPipeError:
        os._exit(0)  # the parent is gone, and closing standard output would raise again
