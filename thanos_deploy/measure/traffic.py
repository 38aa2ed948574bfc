"""Open-loop load: requests arrive at scheduled times, whether or not earlier ones are answered.

The latency of a request counts from the time at which it was due, so it includes the wait for the
engine. Requests are answered one after the other, in the order of their arrival. A driver makes the
arrivals and takes the times. There are two, and both draw the arrivals from a Poisson process.
"""

import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import PlatformError

# Starts one answer; the iterator yields once for each token.
Answer = Callable[[], Iterator[object]]


@dataclass(frozen=True, slots=True)
class Request:
    """The times of one request, in seconds from the first arrival.

    Attributes:
        due: when the request arrived.
        first_token: when the first token of the answer was there.
        finished: when the last token of the answer was there.
    """

    due: float
    first_token: float
    finished: float


def arrivals(requests: int, per_second: float, *, seed: int) -> list[float]:
    """Draw arrival times in seconds: the first is 0, the gaps are exponentially distributed."""
    gaps = np.random.default_rng(seed).exponential(1 / per_second, requests - 1)
    times: list[float] = np.concatenate([[0.0], np.cumsum(gaps)]).tolist()
    return times


def poisson(answer: Answer, *, requests: int, per_second: float, seed: int) -> list[Request]:
    """Drive the load with the built-in client.

    Args:
        answer: starts the answer to one request.
        requests: number of requests.
        per_second: mean number of arrivals per second.
        seed: seed of the arrival times.
    """
    started = time.perf_counter()
    served = []
    for due in arrivals(requests, per_second, seed=seed):
        time.sleep(max(0.0, due - (time.perf_counter() - started)))
        tokens = answer()
        next(tokens)
        first_token = time.perf_counter() - started
        deque(tokens, maxlen=0)
        served.append(Request(due, first_token, time.perf_counter() - started))
    return served


def loadgen_library() -> Any:
    """Import MLPerf LoadGen.

    Raises:
        PlatformError: it is not installed.
    """
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise PlatformError(
            "MLPerf LoadGen is not installed", fix="pip install 'thanos-deploy[loadgen]'"
        ) from error
    return mlperf_loadgen


def loadgen(answer: Answer, *, requests: int, per_second: float, seed: int) -> list[Request]:
    """Drive the load with the server scenario of MLPerf LoadGen, which also takes the times.

    The times are read from the trace that LoadGen writes. LoadGen's verdict is ignored, because it
    requires hundreds of requests and a limit on latency.

    Args:
        answer, requests, per_second, seed: as in `poisson`.

    Raises:
        PlatformError: LoadGen is not installed.
    """
    lg = loadgen_library()
    settings = lg.TestSettings()
    settings.scenario = lg.TestScenario.Server
    settings.mode = lg.TestMode.PerformanceOnly
    settings.server_target_qps = per_second
    settings.min_query_count = settings.max_query_count = requests
    settings.min_duration_ms = 0
    settings.schedule_rng_seed = seed
    settings.use_token_latencies = True
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def issue(samples: list[Any]) -> None:
        for sample in samples:
            waiting.put(sample.id)

    failures: list[Exception] = []

    def serve() -> None:
        while (number := waiting.get()) is not None:
            count = 1
            try:
                if not failures:
                    tokens = answer()
                    next(tokens)
                    lg.FirstTokenComplete([lg.QuerySampleResponse(number, 0, 0, 1)])
                    count += sum(1 for _ in tokens)
            except Exception as error:  # raised again when LoadGen has ended
                failures.append(error)
            # After a failure too, because LoadGen waits for every request.
            lg.QuerySamplesComplete([lg.QuerySampleResponse(number, 0, 0, count)])

    server = threading.Thread(target=serve)
    server.start()
    system = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(1, 1, lambda _: None, lambda _: None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            logs = lg.LogSettings()
            logs.enable_trace = True
            logs.log_output.outdir = folder
            logs.log_output.copy_summary_to_stdout = False
            # Without this name LoadGen would read an audit.config of the user, if there is one.
            lg.StartTestWithLogSettings(system, library, settings, logs, f"{folder}/audit.config")
            if failures:
                raise failures[0]
            return read_trace(Path(folder) / "mlperf_log_trace.json")
    finally:
        waiting.put(None)
        server.join()
        lg.DestroyQSL(library)
        lg.DestroySUT(system)


def read_trace(path: Path) -> list[Request]:
    """Read the requests in a trace of LoadGen.

    Each request has one line "Sample" and one line "Token_Latency". Both have the same time stamp,
    which is when the request was due. The file as a whole is not valid JSON.
    """
    finished: dict[float, float] = {}
    first: dict[float, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if '"name":"Sample"' in line and '"ph":"b"' in line:
            event = loads(line.rstrip(","))
            finished[event["ts"]] = event["args"]["complete_ns"] / 1e9
        elif '"name":"Token_Latency"' in line:
            event = loads(line.rstrip(","))
            first[event["ts"]] = sum(event["args"].values()) / 1e9
    begin = min(finished)
    return [
        Request(
            due=(stamp - begin) / 1e6,
            first_token=(stamp - begin) / 1e6 + first[stamp],
            finished=(stamp - begin) / 1e6 + taken,
        )
        for stamp, taken in sorted(finished.items())
    ]


DRIVERS: dict[str, Callable[..., list[Request]]] = {"poisson": poisson, "loadgen": loadgen}
