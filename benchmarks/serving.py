"""Compare throughput and latency of `thanos-deploy serve` with other servers of the same model.

Usage: python -m benchmarks.serving OUT [--peers NAME...] [--aiperf DIR] [--vllm DIR]

OUT is a bundle with the target onnx; for the peer vllm, also with the target vllm. The servers are
ours, ours with one slot (one request at a time), and those of the peers. The peer transformers is
`transformers serve` on the bundle's checkpoint, with and without its continuous batching. The peer
vllm is `vllm serve` in float32, on the folder for vLLM. The servers take turns; see
`benchmarks.peers`.

closed loop   clients of AIPerf, each of which sends its next request when it is answered
open loop     our own client: requests arrive at random (Poisson) at multiples of the rate at which
              the server with one slot answered, whether or not earlier requests are answered; the
              latency of a request is counted from the time when it was due

Prints both tables and writes them, with every sample, to benchmarks/results/serving.json. A run is
INVALID for the same reasons as in `bench`, or if the servers generated different numbers of tokens.
"""

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

from benchmarks import aiperf, peers
from benchmarks.aiperf import milliseconds, summarised
from benchmarks.peers import Load, Peer, Subject, say
from thanos_deploy.bundle import files, layout, manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.machine import environment, stillness
from thanos_deploy.measure.traffic import Request, arrivals

PEERS = ("transformers", "vllm")
OURS, ALONE = "serve", "serve --slots 1"
THEIRS, THEIR_BATCHING = "transformers serve", "transformers serve --continuous-batching"
VLLM = "vllm serve"


def main() -> None:
    """Start the servers, measure them, write the results, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--slots", type=int, default=8)
    aiperf.add_options(parser)
    parser.add_argument("--rates", type=float, nargs="*", default=[0.75, 1.5])
    parser.add_argument("--offered", type=int, default=16, help="requests in each open loop")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "serving.json"
    )
    arguments = parser.parse_args()
    load = aiperf.load_of(arguments)
    found = measure(
        servers(
            arguments.out.resolve(),
            load,
            arguments.peers,
            slots=arguments.slots,
            queue=max(*load.clients, arguments.offered),
            environment=arguments.vllm.absolute(),
            threads=arguments.vllm_threads,
        ),
        load,
        prompts=peers.texts(arguments.out, count=arguments.offered, tokens=load.prompt),
        rates=arguments.rates,
        command=aiperf.installed(arguments.aiperf),
    )
    result = {
        "format": "thanos-deploy/serving/1",
        "model": manifest.Bundle.open(arguments.out).source.name,
        "slots": arguments.slots,
        **found,
    }
    files.write_json(arguments.results, result)
    print(tables(result))


def servers(
    bundle: Path,
    load: Load,
    chosen: Sequence[str],
    *,
    slots: int,
    queue: int,
    environment: Path,
    threads: int | None,
) -> dict[str, Peer]:
    """Return the servers to compare, by name: ours, and those of the chosen peers."""
    found = {
        OURS: peers.thanos(bundle, slots=slots, queue=queue),
        ALONE: peers.thanos(bundle, slots=1, queue=queue),
    }
    if "transformers" in chosen:
        model = bundle / layout.MODEL
        batching = peers.batching(load)
        found[THEIRS] = peers.transformers(model)
        found[THEIR_BATCHING] = peers.transformers(model, *batching)
    if "vllm" in chosen:
        folder = bundle / layout.VLLM
        found[VLLM] = peers.vllm(folder, environment, load, dtype="float32", threads=threads)
    return found


def measure(
    servers: dict[str, Peer],
    load: Load,
    *,
    prompts: Sequence[str],
    rates: Sequence[float],
    command: Path,
) -> Json:
    """Measure all servers in turns.

    Args:
        servers: the servers by name.
        load: requests of the closed loops.
        prompts: prompts of the open loops, one for each request.
        rates: request rates of the open loops, as multiples of the throughput of `ALONE`.
        command: command of AIPerf.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects = stack.enter_context(peers.started(servers, work, load, prompts[0]))
        closed, readings = aiperf.closed_loops(command, subjects, load, work)
        alone = max(one["requests_per_second"] for one in closed if one["server"] == ALONE)
        offered: list[Json] = []
        for rate in rates:
            for name, subject in subjects.items():
                with subject.turn():
                    measured = open_loop(subject, prompts, load, rate * alone)
                offered.append({"server": name, "times_one_at_a_time": rate, **measured})
                readings.append(peers.reading(subjects.values()))
                say(f"{name}, {rate}x: {measured['requests_per_second']:.2f} requests/s")
    still = stillness.judge(readings)
    reasons = [*still.reasons, *aiperf.differences(closed, load)]
    return {
        "status": "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "aiperf": aiperf.VERSION,
        "load": {**asdict(load), "rates": list(rates), "offered": len(prompts)},
        "seconds": time.monotonic() - started,
        "environment": encode(environment.describe()),
        "machine": asdict(still),
        "closed_loop": closed,
        "open_loop": offered,
    }


def open_loop(subject: Subject, prompts: Sequence[str], load: Load, per_second: float) -> Json:
    """Send requests at random times, each from a thread of its own."""
    started = time.perf_counter()

    def ask(due: float, prompt: str) -> Request:
        time.sleep(max(0.0, due - (time.perf_counter() - started)))
        with closing(subject.answer(prompt, load.new_tokens)) as events:
            next(events)
            first_token = time.perf_counter() - started
            deque(events, maxlen=0)
        return Request(due, first_token, time.perf_counter() - started)

    with ThreadPoolExecutor(len(prompts)) as pool:
        served = list(pool.map(ask, arrivals(len(prompts), per_second, seed=0), prompts))
    return {
        "requests": len(served),
        "offered_per_second": per_second,
        "requests_per_second": len(served) / max(one.finished for one in served),
        "seconds": {
            "ttft": summarised([one.first_token - one.due for one in served]),
            "request": summarised([one.finished - one.due for one in served]),
        },
    }


def tables(result: Json) -> str:
    """Return both tables, as they are in docs/serve.md and LOG.md."""
    offered = [
        (
            f"{one['offered_per_second']:.2f}",
            one["server"],
            f"{one['requests_per_second']:.2f}",
            *(milliseconds(one["seconds"][name]) for name in ("ttft", "request")),
        )
        for one in result["open_loop"]
    ]
    first, _, whole = aiperf.SPREAD
    parts = [
        aiperf.table(result["closed_loop"], ALONE),
        aiperf.markdown(("offered/s", "server", "answered/s", first, whole), offered),
        aiperf.footnote(result),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
