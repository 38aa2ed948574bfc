"""Throughput and latency of `thanos-deploy serve`, beside serving the same model in other ways.

Usage: python -m benchmarks.serving OUT [--environment DIR]

OUT is a bundle with the target onnx. Four servers serve it: ours, ours with one slot (one request
at a time), and `transformers serve` on the bundle's checkpoint, as it is and with its continuous
batching. All are started and warmed up, and then take turns; those whose turn it is not are stopped
(SIGSTOP). Everybody gets the same prompts and writes greedily as many tokens, whatever they are.

closed loop   AIPerf (PyPI `aiperf`, in an environment of its own that is made in DIR) plays some
              clients, each of which asks again when it is answered
open loop     our own client: requests come at random (Poisson) at multiples of the rate at which
              the server with one slot answered, whether or not the ones before are answered; a
              request's clock starts when it was due

Prints both tables and writes them, with every sample, to benchmarks/results/serving.json. What
makes a run INVALID is that of `bench`, and that servers did not write the same number of tokens.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.server import Server, free_port, running, serve, stream
from runtime.text import open_tokenizer
from thanos_deploy.bundle import files, manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration.texts import builtin_text
from thanos_deploy.machine import environment, stillness
from thanos_deploy.measure import statistics
from thanos_deploy.measure.traffic import Request, arrivals

AIPERF = "0.13.0"
OURS, ALONE = "serve", "serve --slots 1"
THEIRS, THEIR_BATCHING = "transformers serve", "transformers serve --continuous-batching"

# Of transformers' paged cache; the default would take 60 % of the machine's memory.
_BLOCK = 32

# AIPerf's names of what is kept of every request, in milliseconds there.
_METRICS = {
    "ttft": "time_to_first_token",
    "inter_token": "inter_token_latency",
    "request": "request_latency",
}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of every server.

    Attributes:
        prompt: tokens of a prompt.
        new_tokens: tokens of an answer.
        clients: how many at once, one closed loop after the other.
        per_client: requests of each client, but never fewer than `least` in all.
        least: see there.
        rates: of the open loops, as multiples of what one at a time answers.
        offered: requests of an open loop.
    """

    prompt: int
    new_tokens: int
    clients: tuple[int, ...]
    per_client: int
    least: int
    rates: tuple[float, ...]
    offered: int

    def requests(self, clients: int) -> int:
        """Of a closed loop."""
        return max(self.least, self.per_client * clients)


@dataclass(frozen=True, slots=True)
class Subject:
    """A running server, and how it is asked.

    Attributes:
        server: it.
        model: what it calls the model.
        greedy: the part of a request that makes it write all tokens, the likeliest each time.
    """

    server: Server
    model: str
    greedy: Json

    def answer(self, prompt: str, new_tokens: int) -> Generator[str, None, None]:
        """The events of one answer."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": new_tokens, **self.greedy}
        return stream(self.server.url, "/v1/completions", body)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """It is this one's turn."""
        self.server.thaw()
        try:
            yield
        finally:
            self.server.freeze()


def main() -> None:
    """Serve, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--per-client", type=int, default=2, help="requests of a client")
    parser.add_argument("--least", type=int, default=6, help="requests of a closed loop")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.75, 1.5])
    parser.add_argument("--offered", type=int, default=16, help="requests of an open loop")
    parser.add_argument(
        "--environment",
        type=Path,
        default=environment.cache_folder() / f"aiperf-{AIPERF}",
        help="where AIPerf is, or is to be installed",
    )
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "serving.json"
    )
    arguments = parser.parse_args()
    load = Load(
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        clients=tuple(arguments.clients),
        per_client=arguments.per_client,
        least=arguments.least,
        rates=tuple(arguments.rates),
        offered=arguments.offered,
    )
    aiperf = installed(arguments.environment)
    result = measure(arguments.out.resolve(), load, slots=arguments.slots, aiperf=aiperf)
    files.write_json(arguments.results, result)
    print(table(result))


def installed(folder: Path) -> Path:
    """The command of AIPerf, installed into a virtual environment where it is not there yet."""
    command = folder / "bin" / "aiperf"
    if not command.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [folder / "bin" / "pip", "install", "--quiet", f"aiperf=={AIPERF}"], check=True
        )
    return command


def measure(bundle: Path, load: Load, *, slots: int, aiperf: Path) -> Json:
    """Measure all servers in turns."""
    prompts = texts(bundle, count=load.offered, tokens=load.prompt)
    started = time.monotonic()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        subjects: dict[str, Subject] = {}
        for name, (command, port, model, greedy) in commands(bundle, load, slots=slots).items():
            log = work / f"{len(subjects)}.log"
            server = stack.enter_context(running(command, port=port, log=log))
            subjects[name] = Subject(server, model, greedy)
            deque(subjects[name].answer(prompts[0], load.new_tokens), maxlen=0)
            server.freeze()
        readings = [reading(subjects.values())]
        closed: list[Json] = []
        for clients in load.clients:
            for name, subject in subjects.items():
                folder = work / f"{len(closed)}"
                with subject.turn():
                    measured = closed_loop(aiperf, subject, load, bundle, clients, folder)
                closed.append({"server": name, "clients": clients, **measured})
                readings.append(reading(subjects.values()))
                say(started, closed[-1])
        alone = max(one["requests_per_second"] for one in closed if one["server"] == ALONE)
        offered: list[Json] = []
        for rate in load.rates:
            for name, subject in subjects.items():
                with subject.turn():
                    measured = open_loop(subject, prompts, load, rate * alone)
                offered.append({"server": name, "times_one_at_a_time": rate, **measured})
                readings.append(reading(subjects.values()))
                say(started, offered[-1])
    still = stillness.judge(readings)
    reasons = [*still.reasons, *differences(closed, load)]
    return {
        "format": "thanos-deploy/serving/1",
        "status": "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "model": manifest.Bundle.open(bundle).source.name,
        "aiperf": AIPERF,
        "slots": slots,
        "load": asdict(load),
        "seconds": time.monotonic() - started,
        "environment": encode(environment.describe()),
        "machine": asdict(still),
        "closed_loop": closed,
        "open_loop": offered,
    }


def commands(
    bundle: Path, load: Load, *, slots: int
) -> dict[str, tuple[Sequence[object], int, str, Json]]:
    """Of each server: its command, its port, the name of the model, how to write greedily."""
    queue = max(*load.clients, load.offered)
    own: Json = {"temperature": 0, "ignore_eos": True}
    theirs: Json = {
        "generation_config": json.dumps({"do_sample": False, "eos_token_id": -1, "pad_token_id": 0})
    }
    model = str(bundle / "model")
    blocks = max(load.clients) * math.ceil((load.prompt + load.new_tokens) / _BLOCK)
    batching = [
        *("--continuous-batching", "--cb-block-size", _BLOCK, "--cb-num-blocks", 2 * blocks),
        *("--cb-max-batch-tokens", 4 * load.prompt),
    ]

    def served(port: int, slots: int) -> list[object]:
        return serve(bundle, port=port, name=OURS, slots=slots, queue=queue)

    def transformers(port: int, *options: object) -> list[object]:
        command = Path(sys.executable).with_name("transformers")
        there = ("--host", "127.0.0.1", "--port", port, "--device", "cpu")
        return [command, "serve", model, *there, *options]

    ports = [free_port() for _ in range(4)]
    return {
        OURS: (served(ports[0], slots), ports[0], OURS, own),
        ALONE: (served(ports[1], 1), ports[1], OURS, own),
        THEIRS: (transformers(ports[2]), ports[2], model, theirs),
        THEIR_BATCHING: (transformers(ports[3], *batching), ports[3], model, theirs),
    }


def texts(bundle: Path, *, count: int, tokens: int) -> list[str]:
    """Different prompts of about so many tokens."""
    tokenizer = open_tokenizer(bundle)
    ids = tokenizer.encode(builtin_text(held_out=True).content)
    return [tokenizer.decode(ids[n * tokens : (n + 1) * tokens]) for n in range(count)]


def closed_loop(
    aiperf: Path, subject: Subject, load: Load, bundle: Path, clients: int, folder: Path
) -> Json:
    """Let AIPerf play clients."""
    command = [
        *(aiperf, "profile", "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"),
        *("--url", subject.server.url, "--model", subject.model),
        *("--endpoint-type", "completions", "--streaming", "--use-server-token-count"),
        *("--tokenizer", bundle / "model", "--extra-inputs", json.dumps(subject.greedy)),
        *("--prompt-input-tokens-mean", load.prompt, "--prompt-input-tokens-stddev", 0),
        *("--prompt-output-tokens-mean", load.new_tokens, "--prompt-output-tokens-stddev", 0),
        *("--concurrency", clients, "--request-count", load.requests(clients)),
        *("--warmup-request-count", 1, "--random-seed", 0),
        *("--workers-max", 1, "--record-processors", 1, "--output-artifact-dir", folder),
    ]
    # A local tokenizer is found only where AIPerf believes to be online; nothing is downloaded.
    variables = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [str(part) for part in command],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"AIPerf failed:\n{done.stdout[-3000:]}")
    summary = json.loads((folder / "profile_export_aiperf.json").read_bytes())
    lines = map(json.loads, (folder / "profile_export.jsonl").read_text().splitlines())
    asked = [line for line in lines if line["metadata"]["benchmark_phase"] == "profiling"]
    records = [line["metrics"] for line in asked if not line.get("error")]
    return {
        "requests": len(records),
        "errors": [line["error"] for line in asked if line.get("error")],
        "requests_per_second": summary["request_throughput"]["avg"],
        "tokens_per_second": summary["output_token_throughput"]["avg"],
        "tokens": [int(record["output_sequence_length"]["value"]) for record in records],
        "seconds": {
            name: summarised([record[theirs]["value"] / 1e3 for record in records])
            for name, theirs in _METRICS.items()
        },
    }


def open_loop(subject: Subject, prompts: Sequence[str], load: Load, per_second: float) -> Json:
    """Let requests arrive at random, each answered on a thread of its own."""
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


def summarised(samples: list[float]) -> Json:
    """Samples with their percentiles."""
    return {"samples": samples, **asdict(statistics.summarise(samples))}


def reading(subjects: Iterable[Subject]) -> stillness.Reading:
    """The machine's counters, what is measured being everything that was started here."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = time.process_time() + ended.ru_utime + ended.ru_stime
    return stillness.read(own + sum(subject.server.cpu_seconds for subject in subjects))


def differences(closed: Iterable[Json], load: Load) -> list[str]:
    """Where a server did not do all of the work."""
    found = []
    for one in closed:
        wanted = load.requests(one["clients"])
        written = sum(one["tokens"])
        if (one["requests"], written) != (wanted, wanted * load.new_tokens):
            found.append(
                f"{one['server']}, {one['clients']} clients: answered {one['requests']} of "
                f"{wanted} requests with {written} tokens instead of {wanted * load.new_tokens}"
            )
    return found


def say(started: float, row: Json) -> None:
    """Progress, on standard error."""
    load = f"{row['clients']} clients" if "clients" in row else f"{row['times_one_at_a_time']}x"
    print(
        f"{time.monotonic() - started:4.0f} s  {row['server']}, {load}: "
        f"{row['requests_per_second']:.2f} requests/s",
        file=sys.stderr,
        flush=True,
    )


def table(result: Json) -> str:
    """Both tables, as they stand in docs/serve.md and LOG.md."""
    one_at_a_time = {
        one["clients"]: one["tokens_per_second"]
        for one in result["closed_loop"]
        if one["server"] == ALONE
    }
    closed = [
        (
            str(one["clients"]),
            one["server"],
            f"{one['tokens_per_second']:.1f}",
            f"{one['tokens_per_second'] / one_at_a_time[one['clients']]:.2f}",
            *(milliseconds(one["seconds"][name]) for name in _METRICS),
        )
        for one in result["closed_loop"]
    ]
    offered = [
        (
            f"{one['offered_per_second']:.2f}",
            one["server"],
            f"{one['requests_per_second']:.2f}",
            *(milliseconds(one["seconds"][name]) for name in ("ttft", "request")),
        )
        for one in result["open_loop"]
    ]
    spread = ("first token, ms", "between tokens, ms", "whole answer, ms")
    parts = [
        markdown(("clients", "server", "tokens/s", "times one at a time", *spread), closed),
        markdown(("offered/s", "server", "answered/s", spread[0], spread[2]), offered),
        "Times are the median and, in parentheses, the 99th percentile.",
    ]
    if result["reasons"]:
        parts.append(f"{result['status']}: {'; '.join(result['reasons'])}")
    return "\n\n".join(parts)


def milliseconds(summary: Json) -> str:
    """Median and tail."""
    return f"{summary['median'] * 1e3:.0f} ({summary['p99'] * 1e3:.0f})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
