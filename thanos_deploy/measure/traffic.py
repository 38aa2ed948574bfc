"""Open-loop load: requests arrive when they are due, whether or not the one before is answered.

A request's clock starts when it was due, so time spent waiting for the engine counts. Requests are
answered one after the other, in the order of their arrival. A driver makes the arrivals and takes
the times; both here draw them from a Poisson process.
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

# Starts one answer; every item is one more token of it.
Answer = Callable[[], Iterator[object]]


@dataclass(frozen=True, slots=True)
class Request:
    """When things happened to a request, in seconds from the first arrival."""

    due: float
    first_token: float
    finished: float


def arrivals(requests: int, per_second: float, *, seed: int) -> list[float]:
    """Seconds at which requests arrive: exponential gaps, the first arrival at 0."""
    gaps = np.random.default_rng(seed).exponential(1 / per_second, requests - 1)
    times: list[float] = np.concatenate([[0.0], np.cumsum(gaps)]).tolist()
    return times


def poisson(answer: Answer, *, requests: int, per_second: float, seed: int) -> list[Request]:
    """Drive the load with our own clock.

    Args:
        answer: what one request asks for.
        requests: how many.
        per_second: their mean rate.
        seed: of the arrivals.
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
    """The module of MLPerf LoadGen.

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
    """Drive the load with MLPerf LoadGen's server scenario; arrivals and times are LoadGen's own.

    The times are read from the trace that LoadGen writes. Its verdict is left aside: that asks for
    hundreds of requests and for a limit on latency.

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

    def serve() -> None:
        while (number := waiting.get()) is not None:
            tokens = answer()
            next(tokens)
            lg.FirstTokenComplete([lg.QuerySampleResponse(number, 0, 0, 1)])
            count = 1 + sum(1 for _ in tokens)
            lg.QuerySamplesComplete([lg.QuerySampleResponse(number, 0, 0, count)])

    server = threading.Thread(target=serve)
    system = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(1, 1, lambda _: None, lambda _: None)
    try:
        with tempfile.TemporaryDirectory() as folder:
            logs = lg.LogSettings()
            logs.enable_trace = True
            logs.log_output.outdir = folder
            logs.log_output.copy_summary_to_stdout = False
            server.start()
            # Without a name LoadGen would read a file of the user's, if there is one.
            lg.StartTestWithLogSettings(system, library, settings, logs, f"{folder}/audit.config")
            return read_trace(Path(folder) / "mlperf_log_trace.json")
    finally:
        waiting.put(None)
        server.join()
        lg.DestroyQSL(library)
        lg.DestroySUT(system)


def read_trace(path: Path) -> list[Request]:
    """The requests in a trace of LoadGen.

    A request is one line "Sample" and one line "Token_Latency" with the same time stamp, which is
    when it was due. The file as a whole is no valid JSON.
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
