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

# An input that takes longer, or more memory, is a finding.
_INPUT_SECONDS, _MEGABYTES = 30, 2048
# Above the longest well-formed input, below what only takes time.
_LONGEST_INPUT = 1 << 15


# A parser that took so much processor time without a finding is done.
_ENOUGH_MINUTES = 30

# After so many seconds what a run found is written down.
_RUN_SECONDS = 300

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
COMMAND = "python -m benchmarks.fuzzing"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the runs over one parser came to.

    Attributes:
        inputs: that were tried.
        edges: of the control flow that they reached.
        seconds: of processor time that they took.
        found: the last lines of what was said of a finding; empty if there was none.
    """

    inputs: int = 0
    edges: int = 0
    seconds: float = 0.0
    found: str = ""

    def after(self, earlier: "Outcome") -> "Outcome":
        """Together with earlier runs; what these found may be mended since, and counts no more."""
        return Outcome(
            earlier.inputs + self.inputs,
            max(earlier.edges, self.edges),
            earlier.seconds + self.seconds,
            self.found,
        )


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Those of all parsers, by name."""

    environment: Environment = field(default_factory=environment.describe)
    parsers: Mapping[str, Outcome] = field(default_factory=dict)

    def plus(self, name: str, outcome: Outcome) -> "Outcomes":
        """With one more run; one with a finding begins anew, so that minutes are those without."""
        earlier = self.parsers.get(name, Outcome())
        joined = outcome if outcome.found or earlier.found else outcome.after(earlier)
        return replace(
            self, environment=environment.describe(), parsers={**self.parsers, name: joined}
        )


def table(outcomes: Outcomes) -> str:
    """The outcomes in Markdown."""
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
        name: of the parser.
        seconds: of processor time. A run has its limit on the clock, on which a busy machine does
            less, so runs go on from the inputs of the last one until the time is reached.
        kept: the folder of inputs, by parser.

    Yields:
        What a run came to, each in a process of its own.
    """
    found = ""
    while seconds > 0 and not found:
        outcome = _run(name, min(math.ceil(seconds), _RUN_SECONDS), kept)
        seconds, found = seconds - outcome.seconds, outcome.found
        yield outcome


def _run(name: str, seconds: int, kept: Path) -> Outcome:
    """What is seen in so many seconds on the clock."""
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
        # `subprocess` does not tell the processor time of one of several children.
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
    """How a process ended that should not have."""
    return "\n".join([f"exit code {code}", *said.splitlines()[-40:]])


def main() -> int:
    """Fuzz, print, write; 1 if something was found."""
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
