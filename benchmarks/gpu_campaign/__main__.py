"""The command of `benchmarks.gpu_campaign`."""

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from exporters import preflight
from thanos_deploy.cli import INTERRUPTED, _progress
from thanos_deploy.errors import DeployError
from thanos_deploy.gpu import nvml
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu_check import missing, require_passed, steps
from thanos_deploy.gpu_check.steps import Task
from thanos_deploy.progress import Announce

# Default time limits: on a GPU machine that is rented by the minute, and of a rehearsal.
SECONDS = 570.0
_SECONDS_TO_REHEARSE = 3600.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the campaign, and exit with the code that the package documents."""
    arguments = _parser().parse_args()
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    try:
        with _progress.announcer(quiet=False) as announce:
            records = run(arguments, announce)
        require_passed(records)
    except DeployError as error:
        _progress.show_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _progress.show_error(f"interrupted; what was measured is in {arguments.out}")
        sys.exit(INTERRUPTED)


def _interrupt(number: int, frame: object) -> None:
    # A process may get the signal twice: once itself, and once with its process group.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    import benchmarks.gpu_campaign

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_campaign",
        description=benchmarks.gpu_campaign.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", type=_names, default=(), metavar="STEP,...")
    parser.add_argument("--skip", type=_names, default=(), metavar="STEP,...")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"time limit for all steps [default: {SECONDS:g}; for a rehearsal "
        f"{_SECONDS_TO_REHEARSE:g}]",
    )
    parser.add_argument(
        "--bundle", type=Path, help="a bundle with the target onnx [default: a tiny one is made]"
    )
    parser.add_argument("--rehearse", action="store_true")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _seconds(arguments: argparse.Namespace) -> float:
    if arguments.seconds is not None:
        return float(arguments.seconds)
    return _SECONDS_TO_REHEARSE if arguments.rehearse else SECONDS


def run(arguments: argparse.Namespace, announce: Announce) -> Records:
    """Run the steps and write the four files, also if a signal ends the run."""
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
    from benchmarks.gpu_campaign import plan

    # The command is published with the figures, so it should not name a folder of this machine.
    words = ["OUT" if word == str(arguments.out) else word for word in sys.argv[1:]]
    command = f"python -m benchmarks.gpu_campaign {shlex.join(words)}"
    every = plan.steps(command, rehearse=arguments.rehearse)
    chosen = steps.choose(every, only=arguments.only, skip=arguments.skip)
    arguments.out.mkdir(parents=True, exist_ok=True)
    journal = arguments.out / "rows.jsonl"
    journal.unlink(missing_ok=True)
    try:
        steps.run(
            chosen,
            Task("cpu" if arguments.rehearse else "cuda", arguments.bundle),
            journal,
            seconds=_seconds(arguments),
            missing={} if arguments.rehearse else missing(preflight.checks(), arguments.bundle),
            log=arguments.out / "log.txt",
            card=None if arguments.rehearse else nvml.Monitor.probe(),
            announce=announce,
        )
    except KeyboardInterrupt:
        _finish(arguments.out)
        raise
    return _finish(arguments.out)


def _finish(out: Path) -> Records:
    """Write the files from the journal, and print the summary."""
    from benchmarks.gpu_campaign import summary

    records = Records(gpu_records.read_journal(out / "rows.jsonl"))
    gpu_records.write(out / "records.json", records)
    text = summary.of(records)
    (out / "summary.txt").write_text(text)
    print(text, flush=True)
    return records


if __name__ == "__main__":
    main()
