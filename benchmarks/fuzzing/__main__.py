"""The command of `benchmarks.fuzzing`."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
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


# A parser that ran for so long without a finding is done.
_ENOUGH_MINUTES = 30

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
COMMAND = "python -m benchmarks.fuzzing"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the runs over one parser came to.

    Attributes:
        inputs: that were tried.
        edges: of the control flow that they reached.
        seconds: that it ran.
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
        "| parser | inputs | edges reached | minutes without a finding | |",
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
    return "\n".join([*lines, "", f"Enough are {_ENOUGH_MINUTES} minutes for each.", ""])


def run(name: str, seconds: int, kept: Path) -> Outcome:
    """Fuzz one parser in a process of its own."""
    corpus, found = kept / name, kept / f"{name}.found"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    words = kept / f"{name}.words"
    words.write_text("".join(f"{json.dumps(word)}\n" for word in PARSERS[name].words))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.fuzzing.one", name, folder, corpus),
                *(f"-max_total_time={seconds}", f"-timeout={_INPUT_SECONDS}"),
                *(f"-rss_limit_mb={_MEGABYTES}", f"-max_len={_LONGEST_INPUT}"),
                *(f"-dict={words}", f"-artifact_prefix={found}/", "-print_final_stats=1"),
            ],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
        )
    inputs = re.findall(r"stat::number_of_executed_units:\s*(\d+)|Done (\d+) runs", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    took = re.findall(r"in (\d+) second", done.stderr)
    return Outcome(
        max((int(one or other) for one, other in inputs), default=0),
        int(edges[-1]) if edges else 0,
        float(took[-1]) if took else 0.0,
        "" if done.returncode == 0 else _said(done),
    )


def _said(done: "subprocess.CompletedProcess[str]") -> str:
    """How a process ended that should not have."""
    lines = [f"exit code {done.returncode}", *(done.stdout + done.stderr).splitlines()[-40:]]
    return "\n".join(lines)


def main() -> int:
    """Fuzz, print, write; 1 if something was found."""
    reader = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzzing",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reader.add_argument("--only", nargs="+", choices=list(PARSERS), default=list(PARSERS))
    reader.add_argument("--minutes", type=float, default=30)
    reader.add_argument("--kept", type=Path, default=Path("out/fuzzing"))
    reader.add_argument("-o", type=Path, default=Path("benchmarks/results/fuzzing.json"))
    reader.add_argument("--page", type=Path, default=PAGE)
    options = reader.parse_args()
    if find_spec("atheris") is None:
        print("Atheris is missing; pip install 'thanos-deploy[fuzz]'", file=sys.stderr)
        return 4
    outcomes = read_record(options.o, Outcomes) if options.o.exists() else Outcomes()
    found = False
    options.o.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'parser':16}{'inputs':>10}{'edges':>8}{'seconds':>9}  found")
    for name in options.only:
        outcome = run(name, round(options.minutes * 60), options.kept)
        outcomes = outcomes.plus(name, outcome)
        found |= bool(outcome.found)
        print(
            f"{name:16}{outcome.inputs:>10}{outcome.edges:>8}{outcome.seconds:>9.0f}  "
            f"{outcome.found or 'nothing'}",
            flush=True,
        )
        write_json(options.o, encode(outcomes))
        pages.rewrite(options.page, COMMAND, table(outcomes))
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
