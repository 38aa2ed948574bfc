"""Load a server with the clients of AIPerf (PyPI `aiperf`, in an environment of its own).

AIPerf's measurements are kept request by request, and summarised by this project's statistics.
"""

import argparse
import json
import os
import subprocess
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.peers import Load, Subject, reading, say
from thanos_deploy.bundle.files import Json
from thanos_deploy.machine import environment, stillness
from thanos_deploy.measure import statistics

VERSION = "0.13.0"

# Maps our name of a metric of a request to AIPerf's name; AIPerf gives milliseconds.
METRICS = {
    "ttft": "time_to_first_token",
    "inter_token": "inter_token_latency",
    "request": "request_latency",
}

# Column headings, in the order of `METRICS`.
SPREAD = ("first token, ms", "between tokens, ms", "whole answer, ms")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a `Load`, and those for the environments of AIPerf and vLLM."""
    parser.add_argument("--prompt", type=int, default=128, help="tokens in each prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens in each answer")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--per-client", type=int, default=2, help="requests of each client")
    parser.add_argument(
        "--least", type=int, default=6, help="least number of requests in a closed loop"
    )
    parser.add_argument(
        "--aiperf",
        type=Path,
        default=environment.cache_folder() / f"aiperf-{VERSION}",
        metavar="DIR",
        help="environment with AIPerf, which is installed there if it is missing",
    )
    parser.add_argument(
        "--vllm",
        type=Path,
        default=Path(__file__).parents[1] / ".venv-vllm",
        metavar="DIR",
        help="the environment with vLLM [default: the one that `make test-vllm` makes]",
    )
    parser.add_argument(
        "--vllm-threads", type=int, help="number of threads of vLLM [default: vLLM's own choice]"
    )


def load_of(arguments: argparse.Namespace) -> Load:
    """Return the load that the options describe."""
    return Load(
        prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        clients=tuple(arguments.clients),
        per_client=arguments.per_client,
        least=arguments.least,
    )


def installed(folder: Path) -> Path:
    """Return the command of AIPerf; install it into a virtual environment if it is missing."""
    command = folder / "bin" / "aiperf"
    if not command.exists():
        venv.create(folder, with_pip=True)
        subprocess.run(
            [folder / "bin" / "pip", "install", "--quiet", f"aiperf=={VERSION}"], check=True
        )
    return command


def closed_loops(
    aiperf: Path, subjects: Mapping[str, Subject], load: Load, work: Path
) -> tuple[list[Json], list[stillness.Reading]]:
    """Run a closed loop for every number of clients, on all servers in turns.

    Args:
        aiperf: command of AIPerf.
        subjects: the servers by name.
        load: the requests to send.
        work: folder for AIPerf's own records.

    Returns:
        The result of each `closed_loop`, with the name of the server and the number of clients; and
        the machine's counters before the first loop and after each one.
    """
    closed: list[Json] = []
    readings = [reading(subjects.values())]
    for clients in load.clients:
        for name, subject in subjects.items():
            with subject.turn():
                found = closed_loop(aiperf, subject, load, clients, work / f"loop-{len(closed)}")
            closed.append({"server": name, "clients": clients, **found})
            readings.append(reading(subjects.values()))
            say(f"{name}, {clients} clients: {found['requests_per_second']:.2f} requests/s")
    return closed, readings


def closed_loop(aiperf: Path, subject: Subject, load: Load, clients: int, folder: Path) -> Json:
    """Run clients that each send the next request when the last one is answered.

    Args:
        aiperf: command of AIPerf.
        subject: the server.
        load: the requests to send.
        clients: number of clients.
        folder: new folder for AIPerf's own records.
    """
    command = [
        *(aiperf, "profile", "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"),
        *("--url", subject.server.url, "--model", subject.peer.model),
        *("--endpoint-type", "completions", "--streaming", "--use-server-token-count"),
        *("--tokenizer", subject.peer.tokenizer),
        *("--extra-inputs", json.dumps(subject.peer.greedy)),
        *("--prompt-input-tokens-mean", load.prompt, "--prompt-input-tokens-stddev", 0),
        *("--prompt-output-tokens-mean", load.new_tokens, "--prompt-output-tokens-stddev", 0),
        *("--concurrency", clients, "--request-count", load.requests(clients)),
        # Different prompts for each number of clients, because servers cache common prefixes.
        *("--warmup-request-count", 1, "--random-seed", clients),
        *("--workers-max", 1, "--record-processors", 1, "--output-artifact-dir", folder),
    ]
    # AIPerf finds a local tokenizer only if it believes to be online; nothing is downloaded.
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
            for name, theirs in METRICS.items()
        },
    }


def differences(closed: Iterable[Json], load: Load) -> list[str]:
    """Describe the loops in which a server did not answer all requests in full."""
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


def summarised(samples: list[float]) -> Json:
    """Return samples together with their percentiles."""
    return {"samples": samples, **asdict(statistics.summarise(samples))}


def milliseconds(summary: Json) -> str:
    """Return the median and, in parentheses, the 99th percentile, in milliseconds."""
    return f"{summary['median'] * 1e3:.0f} ({summary['p99'] * 1e3:.0f})"


def table(closed: Sequence[Json], baseline: str) -> str:
    """Return a table of the closed loops, with the throughput also relative to one server.

    Args:
        closed: results of `closed_loop`, with "server" and "clients".
        baseline: name of that server; without measurements of it, the column is left out.
    """
    against = {
        one["clients"]: one["tokens_per_second"] for one in closed if one["server"] == baseline
    }
    rows = [
        (
            str(one["clients"]),
            one["server"],
            f"{one['tokens_per_second']:.1f}",
            *([f"{one['tokens_per_second'] / against[one['clients']]:.2f}"] if against else []),
            *(milliseconds(one["seconds"][name]) for name in METRICS),
        )
        for one in closed
    ]
    ratio = [f"times `{baseline}`"] if against else []
    return markdown(("clients", "server", "tokens/s", *ratio, *SPREAD), rows)


def footnote(result: Json) -> str:
    """Explain the figures, and say whether the run is valid."""
    note = "Times are the median and, in parentheses, the 99th percentile."
    return f"{note} {result['status']}: {'; '.join(result['reasons']) or 'nothing disturbed them'}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
