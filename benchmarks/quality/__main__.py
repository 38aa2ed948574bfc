"""Measure perplexity and other quality costs of pruning one model, on texts of your own.

Usage: python -m benchmarks.quality --calib CALIB.txt --eval-text TEXT.txt
           [--model smollm2|gemma3|PATH] [--seeds 0 1 2] [SETTING...]
       python -m benchmarks.quality --table

Prunes a model with every method to every pattern of the table, with the preset of the method's
paper and with each preset that differs from it (structured patterns as masked columns). Evaluates
each result: perplexity, questions about the text, and divergence from the dense model. With the
presets "best" and "max" of Thanos this takes long; see `pruning_time`. Each SETTING, a JSON object
of options of `prune`, replaces that grid, such as '{"pattern": "2:4"}' or '{"pattern": "2:4",
"method": "sparsegpt", "block_size": 64}'. The first segments of both texts are used, without a
seed, so that others can use the same ones. With --seeds, calibration segments are drawn with each
of the seeds, which shows the influence of chance.

Writes RESULTS/quality-MODEL.json after every row and prints it as tables. Rows in that file are not
measured again: repeating the command continues, within a row after the last block that was pruned
or a recent step of training, and further settings add rows. To measure other code, start another
file. --models DIR keeps each pruned model there, in a folder that is named by a hash of its
options. With --table nothing is measured: the published results go into docs/choose.md.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import gemma3, pages, smollm2, texts
from benchmarks.quality.record import Results
from benchmarks.quality.rows import Subject
from benchmarks.quality.table import PATTERNS, section
from thanos_deploy import methods
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.measure.options import EvalRequest
from thanos_deploy.pattern import Structured, parse
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest

MODELS: Mapping[str, Callable[[], Path]] = {
    "smollm2": smollm2.gguf_path,
    "gemma3": gemma3.gguf_path,
}
RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "choose.md"
COMMAND = "python -m benchmarks.quality --table"


def main() -> None:
    """Prune and evaluate row by row, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="SETTING", type=json.loads)
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, gemma3, or a model's folder or file"
    )
    parser.add_argument("--methods", nargs="+", default=methods.names(), metavar="METHOD")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, metavar="PATTERN")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED")
    parser.add_argument("--questions", type=int, default=EvalRequest().questions)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--models", type=Path)
    parser.add_argument(
        "--table",
        action="store_true",
        help="measure nothing, and write the published results into the page",
    )
    texts.add_options(parser, required=False)
    arguments = parser.parse_args()
    if arguments.table:
        pages.rewrite(PAGE, COMMAND, published())
        return
    if arguments.calib is None or arguments.eval_text is None:
        parser.error("give --calib and --eval-text")
    _progress.quiet_libraries()
    print(section(measured(arguments)))


def published() -> str:
    """Return the tables of all models whose results are in the repository."""
    found = [RESULTS / f"quality-{name}.json" for name in MODELS]
    return "\n".join(section(Results.read(path)) for path in found if path.exists())


def measured(arguments: argparse.Namespace) -> Results:
    """Measure the rows that are missing, and return them with the earlier ones."""
    given: str = arguments.model
    model = str(MODELS[given]()) if given in MODELS else given
    subject = Subject.of(Dense(model), arguments)
    path = arguments.results / f"quality-{given if given in MODELS else Path(given).stem}.json"
    if path.exists():
        results = Results.read(path)
        results.require(subject.conditions, path)
    else:
        results = Results(subject.conditions, environment.describe(), subject.judge_dense())
        results.write(path)
    for setting in arguments.settings or grid(arguments):
        request = PruneRequest.of(**{**setting, "pattern": parse(setting["pattern"])})
        for seed in arguments.seeds or [None]:
            if not results.has(subject.asked(request), seed):
                results = results.plus(subject.measure(setting, request, seed))
                results.write(path)
    return results


def grid(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield every method, preset and pattern; presets equal to the paper's are left out."""
    for method in arguments.methods:
        preset_of = methods.load(method).preset
        paper = preset_of("paper")
        others = [name for name in methods.PRESET_NAMES if preset_of(name) != paper]
        for preset in ("paper", *others):
            for pattern in map(parse, arguments.patterns):
                yield {
                    "pattern": str(pattern),
                    "method": method,
                    "preset": preset,
                    "nsamples": arguments.nsamples,
                    "seqlen": arguments.seqlen,
                    "keep_shape": isinstance(pattern, Structured),
                }


if __name__ == "__main__":
    main()
