"""Measure how training the remaining weights improves each pattern, by tokens and minutes.

Usage: python -m benchmarks.recovery --calib CALIB --recover-text TRAIN --held-out HELD_OUT
           --eval-text TEXT [--patterns 2:4 unstructured:0.5 structured:0.2] [--segments 64 740]
           [--ranks 0] [--looks 0.125 0.25 0.5] [--preset best] [-o benchmarks/results/recovery]
           [--models DIR]

Prunes SmolLM2-135M to each pattern with a preset, and trains the remaining weights on each number
of segments of 512 tokens, as `thanos-deploy prune --recover` does, and with updates of each rank
(`--recover-rank`; 0 trains the weights themselves). Every training starts from the pruned model.
The model is evaluated before, after, and at the fractions of the training that `--looks` names. At
those the learning rate is still high, so a shorter training gives a better model than such a look.

The perplexity is measured on two texts: a held-out text of the same kind as the training text, for
choices, and a text on which nothing is chosen. Minutes are of the training alone, in wall-clock and
processor time. On a shared machine only processor time can be compared.

Writes OUT.json after every look, and OUT.svg. Repeating the command continues: a training that is
finished is not repeated, and one that was interrupted starts anew. `--models DIR` keeps the pruned
models, so that they are not pruned again.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from transformers import PreTrainedModel

from benchmarks import texts
from benchmarks.smollm2 import gguf_path
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.record import differences
from thanos_deploy.calibration.segments import every_segment, segments
from thanos_deploy.calibration.texts import read_text
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.pattern import parse
from thanos_deploy.pruning.recipe import PRESET
from thanos_deploy.pruning.recover import recover
from thanos_deploy.pruning.result import Recovery
from thanos_deploy.shrink.options import Cut
from thanos_deploy.stages.checkpoints import (
    plan_widths,
    prune_checkpoint,
    shrink_checkpoint,
    survey_blocks,
)
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest

LENGTH = 512  # tokens of a training segment

# Names of the evaluation texts.
HELD_OUT, OTHER = "held_out", "eval_text"


@dataclass(frozen=True, slots=True)
class Look:
    """One evaluation of a model during its training.

    Attributes:
        tokens: number of tokens trained on so far.
        seconds: wall-clock time of the training so far, without evaluations.
        processor_seconds: processor time of the training so far, of all threads together.
        perplexity: maps the name of a text to the perplexity.
    """

    tokens: int
    seconds: float
    processor_seconds: float
    perplexity: dict[str, float]


@dataclass(frozen=True, slots=True)
class Training:
    """One training of one pruned model.

    Attributes:
        pattern: pattern that the model was pruned to.
        segments: number of training segments.
        rank: rank of the trained updates; 0 for training the weights themselves.
        looks: evaluations of the model; the first is of the pruned model.
        recovery: report on the training; None while it runs.
        peak_memory_bytes: peak memory of the process, so of all its trainings up to this one.
    """

    pattern: str
    segments: int
    rank: int = 0
    looks: tuple[Look, ...] = ()
    recovery: Recovery | None = None
    peak_memory_bytes: int | None = None

    @property
    def what(self) -> tuple[str, int, int]:
        """The pattern, segments and rank, which identify the training."""
        return (self.pattern, self.segments, self.rank)


@dataclass(frozen=True, slots=True)
class Document:
    """The content of OUT.json.

    Attributes:
        conditions: conditions that all trainings share.
        environment: machine and software of the first call.
        dense: maps the name of a text to the perplexity of the dense model.
        trainings: the trainings; the one that changed last is at the end.
    """

    conditions: Json
    environment: environment.Environment
    dense: dict[str, float]
    trainings: tuple[Training, ...] = field(default=())

    def training(self, wanted: Training) -> Training:
        """Return the recorded state of a training, or `wanted` if there is none."""
        return next((one for one in self.trainings if one.what == wanted.what), wanted)

    def having(self, training: Training) -> "Document":
        """Return the document with a training in place of its earlier state."""
        others = [one for one in self.trainings if one.what != training.what]
        return replace(self, trainings=(*others, training))


class Bench:
    """The models, the texts, and the results so far."""

    def __init__(self, arguments: argparse.Namespace, models: Path) -> None:
        dense = Dense(arguments.model or str(gguf_path()))
        self.dense = dense.checkpoint()
        self.models, self.preset = models, arguments.preset
        self.looks: list[float] = arguments.looks
        tokenizer = load_tokenizer(self.dense.folder)
        self.calibration = texts.calibration(arguments, tokenizer)
        self.lessons = every_segment(read_text(arguments.recover_text), tokenizer, length=LENGTH)
        held_out = segments(
            read_text(arguments.held_out),
            tokenizer,
            count=arguments.held_out_segments,
            length=arguments.held_out_seqlen,
            seed=None,
        )
        self.judged_on = {HELD_OUT: held_out, OTHER: texts.evaluation(arguments, tokenizer)}
        self.path: Path = arguments.out.with_suffix(".json")
        self.document = self._begin(
            {
                "model": dense.source.name,
                "model_sha256": dense.source.sha256,
                **{
                    f"{name}_sha256": files.sha256(getattr(arguments, name))
                    for name in ("calib", "recover_text", HELD_OUT, OTHER)
                },
                **{name: list(ids.shape) for name, ids in self.judged_on.items()},
                "lessons": list(self.lessons.shape),
                "preset": self.preset,
            }
        )

    def _begin(self, conditions: Json) -> Document:
        """Read the earlier results for these conditions, or begin with the dense model."""
        if not self.path.exists():
            dense = self.judge(load_model(self.dense.folder))
            self._save(Document(conditions, environment.describe(), dense))
            return self.document
        found = decode(Document, files.read_json(self.path))
        if changed := differences(found.conditions, conditions):
            raise SystemExit(
                f"{self.path} was measured under other conditions ({changed}): give another -o"
            )
        return found

    def judge(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the perplexity of a model on each text."""
        return {name: perplexity(model, ids).value for name, ids in self.judged_on.items()}

    def pruned(self, pattern: str) -> Checkpoint:
        """Prune the model to a pattern, unless that is done, and open it."""
        folder = self.models / pattern.replace(":", "-")
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}-partial")
            partial.mkdir(parents=True)
            how = PruneRequest.of(parse(pattern), preset=self.preset).how
            if isinstance(how, Cut):
                losses = survey_blocks(self.dense, self.calibration, how)
                plan = plan_widths(self.dense, losses, how)
                shrink_checkpoint(self.dense, self.calibration, partial, plan, how)
            else:
                prune_checkpoint(self.dense, self.calibration, partial, how)
            partial.rename(folder)
        return Checkpoint.open(folder)

    def train(self, wanted: Training) -> None:
        """Train a pruned model, and evaluate it at the looks."""
        training = self.document.training(wanted)
        if training.recovery is not None:
            return
        pattern, count, rank = training.what
        pruned = self.pruned(pattern)
        begun = [one.looks[0] for one in self.document.trainings if one.pattern == pattern]
        before = begun[0] if begun else Look(0, 0.0, 0.0, self.judge(load_model(pruned.folder)))
        training = replace(training, looks=(before,))
        self._show(training)
        clock = Clock()
        steps = 0

        def progress(_: int, total: int) -> None:
            nonlocal steps
            steps = total

        def watch(step: int, model: PreTrainedModel) -> None:
            nonlocal training
            if step != steps and step not in {round(one * steps) for one in self.looks}:
                return
            clock.stop()
            tokens = count * LENGTH * step // steps
            look = Look(tokens, *clock.taken, self.judge(model))
            training = replace(training, looks=(*training.looks, look))
            self._keep(training)
            self._show(training)
            clock.start()

        clock.start()
        done = recover(
            pruned,
            self.dense,
            self.lessons,
            None,
            count=count,
            update_rank=rank,
            on_progress=progress,
            watch=watch,
        )
        peak = environment.peak_memory_bytes()
        self._keep(replace(training, recovery=done, peak_memory_bytes=peak))

    def _keep(self, training: Training) -> None:
        self._save(self.document.having(training))

    def _save(self, document: Document) -> None:
        self.document = document
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_json(self.path, encode(self.document))

    def _show(self, training: Training) -> None:
        look = training.looks[-1]
        print(
            f"{training.pattern:16s} {training.segments:5d} segments, rank {training.rank:3d}, "
            f"{look.tokens:7d} tokens, "
            f"{look.seconds / 60:6.1f} min ({look.processor_seconds / 60:6.1f} of the processor): "
            + ", ".join(f"{name} {value:.2f}" for name, value in look.perplexity.items()),
            flush=True,
        )


class Clock:
    """Stopwatch of wall-clock and processor seconds; `taken` is the sum of all intervals."""

    def __init__(self) -> None:
        self._before = [0.0, 0.0]
        self.taken = (0.0, 0.0)

    def start(self) -> None:
        """Begin an interval."""
        self._before = [time.perf_counter(), time.process_time()]

    def stop(self) -> None:
        """End the interval, and add it to `taken`."""
        now = (time.perf_counter(), time.process_time())
        wall, processor = (
            taken + later - earlier
            for taken, later, earlier in zip(self.taken, now, self._before, strict=True)
        )
        self.taken = (wall, processor)


def main() -> None:
    """Prune, train, evaluate, and draw the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    texts.add_options(parser)
    parser.add_argument("--recover-text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--held-out-segments", type=int, default=8)
    parser.add_argument("--held-out-seqlen", type=int, default=1024)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--patterns", nargs="+", default=["2:4", "unstructured:0.5", "structured:0.2"]
    )
    parser.add_argument("--segments", type=int, nargs="+", default=[64, 740])
    parser.add_argument("--ranks", type=int, nargs="+", default=[0])
    parser.add_argument("--looks", type=float, nargs="*", default=[0.125, 0.25, 0.5])
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--models", type=Path, metavar="DIR")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/recovery"))
    arguments = parser.parse_args()
    _progress.quiet_libraries()
    with ExitStack() as stack:
        place = arguments.models or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(arguments, place)
        for pattern in arguments.patterns:
            for count in arguments.segments:
                for rank in arguments.ranks:
                    bench.train(Training(pattern, count, rank))
    draw(bench.document).savefig(arguments.out.with_suffix(".svg"), metadata={"Date": None})


def draw(document: Document) -> Figure:
    """Plot perplexity over tokens and over processor minutes, on both texts.

    Each line is one training. Only its last point is the result of a training of that length.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    patterns = list(dict.fromkeys(one.pattern for one in document.trainings))
    titles = {HELD_OUT: "held-out text of the same kind", OTHER: "text of another kind"}
    costs: dict[str, Any] = {
        "thousands of tokens": lambda look: look.tokens / 1e3,
        "minutes of the processor": lambda look: look.processor_seconds / 60,
    }
    for row, (text, title) in zip(figure.subplots(2, 2), titles.items(), strict=True):
        for axes, (cost, of) in zip(row, costs.items(), strict=True):
            for one in document.trainings:
                x = [of(look) for look in one.looks]
                y = [look.perplexity[text] for look in one.looks]
                colour = f"C{patterns.index(one.pattern)}"
                axes.plot(x, y, ":", color=colour)
                axes.plot(x[-1:], y[-1:], "s" if one.rank else "o", color=colour)
            for number, pattern in enumerate(patterns):
                axes.plot([], [], "o:", color=f"C{number}", label=pattern)
            if any(one.rank for one in document.trainings):
                axes.plot([], [], "s", color="grey", label="low-rank updates")
            axes.axhline(document.dense[text], color="grey", label="dense")
            axes.set(xlabel=cost, ylabel="perplexity", title=title, yscale="log")
            axes.set_yticks(ticks := _ticks(document, text), [f"{one:g}" for one in ticks])
            axes.minorticks_off()
            axes.legend()
    return figure


def _ticks(document: Document, text: str) -> list[float]:
    """Return round numbers from the dense model's perplexity to the largest perplexity."""
    largest = max(look.perplexity[text] for one in document.trainings for look in one.looks)
    round_ones = (15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500)
    return [float(one) for one in round_ones if document.dense[text] / 1.2 < one < 1.2 * largest]


if __name__ == "__main__":
    main()
