"""Compare dense and pruned models in common runtimes at equal bits: quality, time and bytes.

Usage: python -m benchmarks.comparison OUT [--patterns PATTERN...] [--preset NAME]
           [--bundles BUNDLE...] [--calib FILE] [--eval-text FILE]
       python -m benchmarks.comparison --table

Prunes SmolLM2-135M to every pattern, and also takes existing bundles (--bundles). Each model and
the dense one is exported in fp32, in int8 (rounded) and in int4 (error-compensated, see
--compensate) for ONNX Runtime, with its own attention, and as GGUF for llama.cpp in f32, q8_0 and
q4_0; in fp32 for OpenVINO, with a neutral graph. The dense model is also measured as other tools
quantise it: in q4_0 by llama.cpp, and in int4 by the builder of ORT-GenAI.

The runtime itself computes the perplexity of each of these models from its files. Then all models
take turns in one process: each reads a prompt and continues it greedily. The machine has to be idle
for that; the run is VALID, or INVALID with reasons.

Writes RESULTS/comparison.json, from which the README's picture is drawn (`python -m docs.generate`)
and prints the table. OUT keeps everything else (about 3 GB for each pattern and for the dense
model): repeating the command continues, and repeats only the timing. With --make the command stops
before the timing, which can follow later on a quiet machine. With --table nothing is measured: the
published results are written into docs/choose.md and README.md.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from benchmarks import pages, runtimes
from benchmarks.comparison import measure, models, subjects
from benchmarks.comparison.measure import Timing
from benchmarks.comparison.models import Making, Weights
from benchmarks.comparison.record import PATH, Comparison, Conditions, read
from benchmarks.comparison.subjects import Subject
from benchmarks.comparison.table import headline, section
from benchmarks.smollm2 import gguf_path
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.measure.run import DENSE
from thanos_deploy.progress import Announce
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.texts import open_text, segments_for

PATTERNS = ("structured:0.1", "structured:0.2", "2:4")
ROOT = Path(__file__).parents[2]
COMMAND = "python -m benchmarks.comparison --table"


def main() -> None:
    """Make the models, compute perplexities, time them, and print the table."""
    arguments = _parser().parse_args()
    if arguments.table:
        publish()
        return
    if arguments.out is None:
        sys.exit("give OUT, or --table")
    _progress.quiet_libraries()
    with _progress.announcer(quiet=False) as announce:
        found = compared(arguments, announce)
    if found is None:
        return
    files.write_json(arguments.results / PATH.name, encode(found))
    print(section(found))


def publish() -> None:
    """Write the published results into the pages."""
    published = read()
    pages.rewrite(ROOT / "docs" / "choose.md", COMMAND, section(published))
    pages.rewrite(ROOT / "README.md", COMMAND, headline(published))


def compared(arguments: argparse.Namespace, announce: Announce) -> Comparison | None:
    """Make and measure all models; return None with --make, which stops before the timing."""
    dense = Dense(arguments.model or str(gguf_path()))
    found = list(_subjects(arguments, dense, announce))
    ids, frame, origin = _segments(arguments, dense)
    judged = measure.perplexities(
        found,
        ids,
        frame=frame,
        threads=arguments.threads,
        kept=arguments.out / "perplexity",
        announce=announce,
    )
    if arguments.make:
        return None
    timing = Timing(
        prompt=tuple(ids[0, : arguments.prompt].tolist()),
        new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        threads=arguments.threads,
        pause=arguments.pause,
    )
    rows, reasons, still = measure.rows(found, judged, timing, announce)
    return Comparison(
        status="INVALID" if reasons else "VALID",
        reasons=tuple(reasons),
        conditions=Conditions(
            model=dense.source.name,
            model_sha256=dense.source.sha256,
            text=origin,
            segments=len(ids),
            length=ids.shape[1],
            judge="its runtime, from these very files",
            prompt=len(timing.prompt),
            new_tokens=timing.new_tokens,
            rounds=timing.rounds,
            threads=timing.threads,
            command=f"python -m benchmarks.comparison {_without_paths(arguments)}",
            date=datetime.now(UTC).date().isoformat(),
        ),
        environment=environment.describe(),
        machine=still,
        rows=tuple(rows),
    )


def _subjects(arguments: argparse.Namespace, dense: Dense, announce: Announce) -> Iterator[Subject]:
    """Yield everything to measure; the dense model in fp32 on ONNX Runtime comes first."""
    calibration = {name: getattr(arguments, name) for name in ("calib", "nsamples", "seqlen")}
    making = Making(
        out=arguments.out,
        given={**calibration, "preset": arguments.preset, **arguments.options},
        calibration=calibration,
        compensated=arguments.compensate,
    )

    def weights() -> Iterator[Weights]:
        yield from models.dense_weights(dense, making, announce)
        for pattern in arguments.patterns:
            yield from models.pruned_weights(pattern, dense, making, announce)
        for path in arguments.bundles:
            yield from models.bundle_weights(path, making, announce)

    for one in weights():
        stock = one.model == DENSE and one.dtype == "int4" and one.way == "rounded"
        if not (stock and "int4" in arguments.compensate):
            yield subjects.ours(one, arguments.out, announce)
        yield subjects.llama_cpp(one, arguments.out, announce)
        if one.dtype == "fp32":
            yield subjects.openvino(one, arguments.out, announce)
        if stock and arguments.genai:
            yield subjects.genai_builder(one, arguments.out, announce)


def _segments(arguments: argparse.Namespace, dense: Dense) -> tuple[Tensor, int, str]:
    """Return the segments for the perplexities, the length of their frame, and the text's name."""
    checkpoint = dense.checkpoint()
    text = open_text(arguments.eval_text, "text", held_out=True)
    ids, _, frame = segments_for(
        checkpoint, text, arguments.eval_segments, arguments.eval_seqlen, seed=None
    )
    return ids, len(frame), text.origin


def _without_paths(arguments: argparse.Namespace) -> str:
    """Return the arguments with which to repeat the run, without folders of this machine."""
    said = ["OUT", "--patterns", *arguments.patterns, "--preset", arguments.preset]
    for name in ("calib", "eval_text"):
        if (given := getattr(arguments, name)) != BUILTIN:
            said += [f"--{name.replace('_', '-')}", Path(given).name]
    said += ["--rounds", str(arguments.rounds)]
    return shlex.join(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--model", help="[default: SmolLM2-135M-Instruct]")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS)
    parser.add_argument("--preset", default="best", help="preset of `prune`")
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        help="further options of `prune`, as a JSON object",
    )
    parser.add_argument(
        "--bundles", nargs="*", type=Path, default=[], help="existing bundles to compare as well"
    )
    parser.add_argument(
        "--compensate",
        nargs="*",
        choices=("int8", "int4"),
        default=["int4"],
        help="dtypes whose rounding errors are compensated",
    )
    parser.add_argument(
        "--no-genai", dest="genai", action="store_false", help="leave ORT-GenAI out"
    )
    parser.add_argument("--calib", default=BUILTIN)
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--eval-text", default=BUILTIN)
    parser.add_argument("--eval-segments", type=int, default=12)
    parser.add_argument("--eval-seqlen", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=environment.cores())
    parser.add_argument(
        "--pause", type=float, default=runtimes.PAUSE, help="seconds of pause before each turn"
    )
    parser.add_argument("--make", action="store_true", help="stop before the timing")
    parser.add_argument(
        "--table",
        action="store_true",
        help="measure nothing, and write the published results into the pages",
    )
    parser.add_argument("--results", type=Path, default=PATH.parent)
    return parser


if __name__ == "__main__":
    main()
