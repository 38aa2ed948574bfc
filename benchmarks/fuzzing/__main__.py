"""The command of `benchmarks.fuzzing`."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import fuzzing as package
from benchmarks.fuzzing.parsers import PARSERS
from thanos_deploy.bundle.codec import encode
from thanos_deploy.machine import environment

# An input that takes longer, or more memory, is a finding.
_INPUT_SECONDS, _MEGABYTES = 30, 2048
# Above the longest well-formed input, below what only takes time.
_LONGEST_INPUT = 1 << 15


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run over one parser came to.

    Attributes:
        inputs: that were tried.
        edges: of the control flow that they reached.
        seconds: that it ran.
        found: the last lines of what was said of a finding; empty if there was none.
    """

    parser: str
    inputs: int
    edges: int
    seconds: float
    found: str


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
        name,
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
    options = reader.parse_args()
    if find_spec("atheris") is None:
        print("Atheris is missing; pip install 'thanos-deploy[fuzz]'", file=sys.stderr)
        return 4
    outcomes = []
    print(f"{'parser':16}{'inputs':>10}{'edges':>8}{'seconds':>9}  found")
    for name in options.only:
        outcome = run(name, round(options.minutes * 60), options.kept)
        outcomes.append(outcome)
        print(
            f"{name:16}{outcome.inputs:>10}{outcome.edges:>8}{outcome.seconds:>9.0f}  "
            f"{outcome.found or 'nothing'}",
            flush=True,
        )
    document = {
        "environment": encode(environment.describe()),
        "parsers": [asdict(one) for one in outcomes],
    }
    options.o.parent.mkdir(parents=True, exist_ok=True)
    options.o.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(one.found for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
