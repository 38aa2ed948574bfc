"""Measure perplexity of quantised models: rounded, error-compensated, tuned, and trained.

Usage: python -m benchmarks.quantisation --calib CALIB.txt --eval-text TEXT.txt -o RESULTS
       python -m benchmarks.quantisation --table

Takes SmolLM2-135M-Instruct dense, and pruned to `structured:0.2` and to 2:4 (preset fast), and
quantises the linear layers of its blocks to every grid of the table, in five ways: "rounded";
"compensated", with error compensation; "tuned", compensated and then with blocks tuned as in the
preset best; "trained", compensated and then with scales trained, with the dense model as the
teacher; and "both", with blocks tuned and then scales trained. The first segments of both texts are
used, without a seed, so that others can use the same ones.

Writes RESULTS/quantisation.json after every row, and prints a table. Rows in that file are not
measured again: repeating the command continues after the last block that was quantised. It
continues from RESULTS/.journal-*, which may be removed when all rows are measured. With --table
nothing is measured: the published results go into docs/prune.md.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import pages, texts
from benchmarks.smollm2 import gguf_path
from thanos_deploy import methods
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import decode, encode, loads
from thanos_deploy.bundle.files import Json
from thanos_deploy.calibration.frame import frame_of
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.machine import environment
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.methods import NO_TUNING, Tuning
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.linear import matrix
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.pattern import parse
from thanos_deploy.progress import quietly
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.pruning.quantise import QuantisedBlock, quantise_model
from thanos_deploy.pruning.recipe import METHOD
from thanos_deploy.pruning.train_scales import train_scales
from thanos_deploy.shrink.options import Cut
from thanos_deploy.solver import grid as grids
from thanos_deploy.solver.codes import round_to
from thanos_deploy.stages.checkpoints import (
    plan_widths,
    prune_checkpoint,
    shrink_checkpoint,
    survey_blocks,
)
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest

PATTERNS = ("dense", "structured:0.2", "2:4")
GRIDS = ("int8", "int4", "int4:128", "int4:asym")
WAYS = ("rounded", "compensated", "tuned", "trained", "both")

NAME = "quantisation.json"
PUBLISHED = Path(__file__).parent / "results" / NAME
PAGE = Path(__file__).parents[1] / "docs" / "prune.md"
COMMAND = "python -m benchmarks.quantisation --table"


@dataclass(frozen=True, slots=True)
class Row:
    """One quantised model.

    Attributes:
        pattern: pattern that was pruned to before; "dense" for none.
        grid: grid of the quantised weights; "none" for no quantisation.
        way: one of `WAYS`, or "none".
        perplexity: perplexity on the evaluation text.
        seconds: time of the walk that quantised the model; after an interruption, only of its
            continuation.
        layer_error: median relative error of the layers on the calibration text; None if it was
            not measured.
        block_error_before, block_error: see `TunedBlocks`; None if blocks were not tuned.
        trained_on: number of tokens that the scales were trained on; 0 for none.
        training_seconds: time of that training.
    """

    pattern: str
    grid: str
    way: str
    perplexity: float
    seconds: float = 0.0
    layer_error: float | None = None
    block_error_before: float | None = None
    block_error: float | None = None
    trained_on: int = 0
    training_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Results:
    """All rows of a file, and their conditions.

    Attributes:
        calibration, evaluation: number and length of the segments, in tokens.
        processor: the processor that measured the last row.
        rows: the quantised models.
    """

    calibration: tuple[int, ...]
    evaluation: tuple[int, ...]
    processor: str
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the results in a file."""
        return decode(cls, loads(path.read_bytes()))


class Bench:
    """The texts, and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace, source: Checkpoint) -> None:
        tokenizer = load_tokenizer(source.folder)
        self.source = source
        self.grids: list[str] = arguments.grids
        self.ways: list[str] = arguments.ways
        self.train_segments: int = arguments.train_segments
        self.frame = len(frame_of(tokenizer))
        count = arguments.calib_segments
        self.tuning: Tuning = methods.load(METHOD).preset("best").walk
        taken = texts.calibration(
            arguments, tokenizer, count=count, further=self.tuning.further(count)
        )
        self.calib, self.further = taken[:count], taken[count:]
        self.judge: Tensor = texts.evaluation(arguments, tokenizer)
        self.path: Path = arguments.out / NAME
        self.rows = list(Results.read(self.path).rows) if self.path.exists() else []

    def missing(self, pattern: str) -> list[tuple[str, str]]:
        """Return the grids and ways of a pattern that are not measured yet."""
        wanted = [("none", "none")]
        wanted += [(grid, way) for grid in self.grids for way in self.ways]
        there = {(row.grid, row.way) for row in self.rows if row.pattern == pattern}
        return [one for one in wanted if one not in there]

    def add(self, row: Row) -> None:
        """Add a row, write all rows to the file, and print it."""
        self.rows.append(row)
        results = Results(
            tuple(self.calib.shape),
            tuple(self.judge.shape),
            environment.describe().processor,
            tuple(self.rows),
        )
        files.write_json(self.path, encode(results))
        print(f"{row.pattern:15} {row.grid:14} {row.way:12} {row.perplexity:9.3f}", flush=True)

    def prune(self, pattern: str, folder: Path) -> Checkpoint:
        """Prune the model into a folder; "dense" returns it as it is."""
        if pattern == "dense":
            return self.source
        folder.mkdir()
        request = PruneRequest.of(parse(pattern), preset="fast")
        if isinstance(request.how, Cut):
            losses = survey_blocks(self.source, self.calib, request.how, quietly)
            plan = plan_widths(self.source, losses, request.how)
            shrink_checkpoint(self.source, self.calib, folder, plan, request.how, quietly)
        else:
            prune_checkpoint(self.source, self.calib, folder, request.how, quietly)
        return Checkpoint.open(folder)

    def measure(self, pattern: str, model: Checkpoint, grid: str, way: str) -> Row:
        """Quantise a model to a grid in one of the ways, and measure its perplexity."""
        if way in ("none", "rounded"):
            loaded = load_model(model.folder)
            for name in model.linears if way == "rounded" else ():
                weight = matrix(loaded.get_submodule(name))
                weight.copy_(round_to(weight, grids.parse(grid)).weight)
            return Row(pattern, grid, way, self.judged(loaded))
        tuned, trained = way in ("tuned", "both"), way in ("trained", "both")
        stem = f".journal-{pattern}-{grid}-{'tuned' if tuned else 'compensated'}"
        kept = self.path.parent / stem.replace(":", "-")
        with tempfile.TemporaryDirectory(dir=self.path.parent) as scratch:
            folders = [Path(scratch) / name for name in ("model", "codes", "trained", "its codes")]
            for one in folders:
                one.mkdir()
            folder, codes, learned, its_codes = folders
            started = time.perf_counter()
            done = quantise_model(
                model,
                self.calib,
                folder,
                codes,
                grids.parse(grid),
                tuning=self.tuning if tuned else NO_TUNING,
                further=self.further if tuned else None,
                journal=Journal(kept, self.owner(tuned), QuantisedBlock),
            )
            seconds, lesson = time.perf_counter() - started, None
            if trained:
                with torch.enable_grad():
                    lesson = train_scales(
                        Checkpoint.open(folder),
                        Codes.open(codes),
                        self.source,
                        torch.cat([self.calib, self.further]),
                        learned,
                        its_codes,
                        count=self.train_segments,
                    )
            found = self.judged(load_model(learned if trained else folder))
        return Row(
            pattern,
            grid,
            way,
            found,
            seconds,
            done.median_relative_error,
            done.tuned.median_error_before if done.tuned else None,
            done.tuned.median_error if done.tuned else None,
            lesson.tokens if lesson else 0,
            lesson.seconds if lesson else 0.0,
        )

    def judged(self, model: PreTrainedModel) -> float:
        """Return the perplexity of a model."""
        return perplexity(model, self.judge, frame=self.frame).value

    def owner(self, tuned: bool) -> Json:
        """Return what a quantised model depends on, beyond what the name of its journal says."""
        ids = self.calib.tolist() + (self.further.tolist() if tuned else [])
        hashed = files.sha256_of({"ids": ids})
        return {"ids": hashed, "libraries": dict(environment.describe().libraries)}


@torch.no_grad()
def main() -> None:
    """Measure the rows that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, and write the published results"
    )
    texts.add_options(parser, required=False)
    parser.add_argument("--calib-segments", type=int, default=32)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--grids", nargs="+", default=GRIDS)
    parser.add_argument("--train-segments", type=int, default=224)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    if arguments.table:
        pages.rewrite(PAGE, COMMAND, section(Results.read(PUBLISHED)))
        return
    if None in (arguments.calib, arguments.eval_text, arguments.out):
        parser.error("give --calib, --eval-text and --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments, Dense(str(gguf_path())).checkpoint(quietly))
    for pattern in arguments.patterns:
        if not bench.missing(pattern):
            continue
        with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
            model = bench.prune(pattern, Path(scratch) / "model")
            for grid, way in bench.missing(pattern):
                bench.add(bench.measure(pattern, model, grid, way))
    print(section(Results.read(bench.path)))


def section(results: Results) -> str:
    """Return a table in Markdown: a row per pattern and grid, a column per way, with conditions."""
    rows = results.rows
    found = {(row.pattern, row.grid, row.way): row.perplexity for row in rows}
    ways = [way for way in WAYS if any(row.way == way for row in rows)]
    count, length = results.evaluation
    trained = {row.trained_on for row in rows if row.trained_on}
    lines = [
        f"Perplexity of SmolLM2-135M-Instruct on {count} segments of {length} tokens, and how much "
        f"more it is than before quantisation; statistics of {results.calibration[0]} segments of "
        f"{results.calibration[1]} tokens"
        + "".join(f"; scales trained on {tokens} tokens" for tokens in sorted(trained))
        + ".",
        "",
        "| pattern | grid | " + " | ".join(ways) + " |",
        "|---|---|" + "---:|" * len(ways),
    ]
    for pattern in dict.fromkeys(row.pattern for row in rows):
        plain = found[pattern, "none", "none"]
        lines.append(f"| {pattern} | none | {plain:.2f} |" + " |" * (len(ways) - 1))
        for grid in GRIDS:
            values = [found.get((pattern, grid, way)) for way in ways]
            if any(values):
                cells = [f"{one:.2f} ({_more(one / plain)})" if one else "" for one in values]
                lines.append(f"| {pattern} | {grid} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _more(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


if __name__ == "__main__":
    main()
