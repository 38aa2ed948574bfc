"""The command of `benchmarks.fuzzing`."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks import fuzzing as package
from benchmarks import pages
from benchmarks.fuzzing.parsers import PARSERS
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import read_record, write_json
from thanos_deploy.machine import environment
from thanos_deploy.machine.environment import Environment

# An input that takes more time or memory than this is a finding.
_INPUT_SECONDS, _MEGABYTES = 30, 2048
# Bytes: above the longest well-formed input; longer inputs would only take time.
_LONGEST_INPUT = 1 << 15


# A parser is done after this much processor time without a finding.
_ENOUGH_MINUTES = 30

# Length of one run; the results are written after each run.
_RUN_SECONDS = 300

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
COMMAND = "python -m benchmarks.fuzzing"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of the runs over one parser.

    Attributes:
        inputs: number of inputs that were tried.
        edges: number of control-flow edges that the inputs reached.
        seconds: processor time of the runs.
        found: last lines of the output of a run with a finding; empty without one.
    """

    inputs: int = 0
    edges: int = 0
    seconds: float = 0.0
    found: str = ""

    def after(self, earlier: "Outcome") -> "Outcome":
        """Add earlier runs, but not their findings, which may have been fixed since."""
        return Outcome(
            earlier.inputs + self.inputs,
            max(earlier.edges, self.edges),
            earlier.seconds + self.seconds,
            self.found,
        )


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Results of all parsers.

    Attributes:
        environment: machine and software of the last run.
        parsers: maps the name of a parser to its result.
    """

    environment: Environment = field(default_factory=environment.describe)
    parsers: Mapping[str, Outcome] = field(default_factory=dict)

    def plus(self, name: str, outcome: Outcome) -> "Outcomes":
        """Add one more run.

        The count starts anew with a run that has a finding, and with the run after it, so that the
        minutes are those without a finding.
        """
        earlier = self.parsers.get(name, Outcome())
        joined = outcome if outcome.found or earlier.found else outcome.after(earlier)
        return replace(
            self, environment=environment.describe(), parsers={**self.parsers, name: joined}
        )


def table(outcomes: Outcomes) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| parser | inputs | edges reached | processor minutes without a finding | |",
        "|---|---|---|---|---|",
    ]
    for name in PARSERS:
        one = outcomes.parsers.get(name)
        if one is None:
            lines.append(f"| {name} | not run | | | |")
            continue
        minutes = 0.0 if one.found else one.seconds / 60
        said = "**a finding**" if one.found else "done" if minutes >= _ENOUGH_MINUTES else "goes on"
        lines.append(f"| {name} | {one.inputs} | {one.edges} | {minutes:.1f} | {said} |")
    return "\n".join([*lines, "", f"Enough are {_ENOUGH_MINUTES} processor minutes for each.", ""])


def run(name: str, seconds: float, kept: Path) -> Iterator[Outcome]:
    """Fuzz one parser until something is found or the time is over.

    Args:
        name: name of the parser.
        seconds: processor time. The limit of a single run is in wall-clock time, in which a busy
            machine does less, so runs are repeated until the processor time is reached. Each
            continues from the inputs of the one before.
        kept: folder that holds the inputs of each parser.

    Yields:
        The result of each run; every run is a process of its own.
    """
    found = ""
    while seconds > 0 and not found:
        outcome = _run(name, min(math.ceil(seconds), _RUN_SECONDS), kept)
        seconds, found = seconds - outcome.seconds, outcome.found
        yield outcome


def _run(name: str, seconds: int, kept: Path) -> Outcome:
    """Fuzz in a new process for some seconds of wall-clock time."""
    corpus, found = kept / name, kept / f"{name}.found"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    words = kept / f"{name}.words"
    words.write_text("".join(f"{json.dumps(word)}\n" for word in PARSERS[name].words))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.fuzzing.one", name, folder, corpus),
                *(f"-max_total_time={seconds}", f"-timeout={_INPUT_SECONDS}"),
                *(f"-rss_limit_mb={_MEGABYTES}", f"-max_len={_LONGEST_INPUT}"),
                *(f"-dict={words}", f"-artifact_prefix={found}/", "-print_final_stats=1"),
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        # `subprocess` does not report the processor time of a single child.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = output.read().decode(errors="replace")
    inputs = re.findall(r"stat::number_of_executed_units:\s*(\d+)|Done (\d+) runs", said)
    edges = re.findall(r"cov: (\d+)", said)
    return Outcome(
        max((int(one or other) for one, other in inputs), default=0),
        int(edges[-1]) if edges else 0,
        usage.ru_utime + usage.ru_stime,
        _end(process.returncode, said) if process.returncode else "",
    )


def _end(code: int, said: str) -> str:
    """Describe how a process failed: its exit code and its last lines."""
    return "\n".join([f"exit code {code}", *said.splitlines()[-40:]])


def main() -> int:
    """Fuzz, print and write; return 1 for a finding, 4 without Atheris, otherwise 0."""
    reader = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzzing",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reader.add_argument("--only", nargs="+", choices=list(PARSERS), default=list(PARSERS))
    reader.add_argument(
        "--minutes",
        type=float,
        default=_ENOUGH_MINUTES,
        help=f"processor time for each parser, earlier calls included ({_ENOUGH_MINUTES})",
    )
    reader.add_argument(
        "--processes", type=int, default=1, help="parsers that run beside each other (1)"
    )
    reader.add_argument(
        "--kept", type=Path, default=Path("out/fuzzing"), help="inputs that reached new lines"
    )
    reader.add_argument(
        "-o", type=Path, default=Path("benchmarks/results/fuzzing.json"), help="the results"
    )
    reader.add_argument("--page", type=Path, default=PAGE, help="the page of the table")
    options = reader.parse_args()
    if find_spec("atheris") is None:
        print("Atheris is missing; pip install 'thanos-deploy[fuzz]'", file=sys.stderr)
        return 4
    outcomes = read_record(options.o, Outcomes) if options.o.exists() else Outcomes()
    found = False
    options.o.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'parser':16}{'inputs':>10}{'edges':>8}{'seconds':>9}  found")
    lock = threading.Lock()

    def fuzz(name: str) -> None:
        nonlocal outcomes, found
        earlier = outcomes.parsers.get(name, Outcome())
        spent = 0.0 if earlier.found else earlier.seconds
        for outcome in run(name, options.minutes * 60 - spent, options.kept):
            with lock:
                outcomes = outcomes.plus(name, outcome)
                found |= bool(outcome.found)
                print(
                    f"{name:16}{outcome.inputs:>10}{outcome.edges:>8}{outcome.seconds:>9.0f}  "
                    f"{outcome.found or 'nothing'}",
                    flush=True,
                )
                write_json(options.o, encode(outcomes))
                pages.rewrite(options.page, COMMAND, table(outcomes))

    with ThreadPoolExecutor(options.processes) as pool:
        for one in [pool.submit(fuzz, name) for name in options.only]:
            one.result()
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
