"""Measure the quality, size, latency and memory of models with heads and channels cut out.

Usage: python -m benchmarks.shrinking --calib FILE --eval-text FILE [--fractions 0.1 0.2 0.3]

Cuts SmolLM2-135M by each fraction of its blocks' parameters, measures perplexity, exports every
model to ONNX, and times all of them in turns on ONNX Runtime's CPU provider. Each model is also
timed with its first block alone. The difference is the time of the other blocks, without
embeddings, output head and the overhead of a call; it should shrink in proportion to the
parameters.

At the fraction that `--against` names, the result is compared with Torch-Pruning (PyPI, `pip
install torch-pruning`), which cuts the same number of feed-forward channels out of the same model:
by the magnitude of the weights, and by a first-order Taylor expansion on the same calibration text.

`--recover` trains the remaining weights at that fraction, on each number of segments of
`--recover-text`, as `thanos-deploy prune --recover` does, and prints the perplexity and the minutes
for each number. Torch-Pruning's Taylor model is trained on the smallest number too.

`--models DIR` keeps the models and their ONNX files in DIR and uses those that exist already, so
that timing can be repeated on a quiet machine.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import exporters.onnx.graph
from benchmarks import texts
from benchmarks.smollm2 import gguf_path
from thanos_deploy.bundle import files, manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.record import Source
from thanos_deploy.calibration.segments import every_segment
from thanos_deploy.calibration.texts import read_text
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.measure import paired
from thanos_deploy.measure.latency import Decode, Prefill, Scenario
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.pattern import Structured
from thanos_deploy.pruning.recover import recover
from thanos_deploy.shrink.options import Cut
from thanos_deploy.shrink.sizing import Losses
from thanos_deploy.stages.checkpoints import plan_widths, shrink_checkpoint, survey_blocks
from thanos_deploy.stages.dense import Dense

LATENCY_SLACK = 1.1  # allowed ratio of times, relative to the ratio of parameters


def main() -> None:
    """Cut, evaluate, export and time the models, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    texts.add_options(parser)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument(
        "--against",
        type=float,
        default=0.2,
        help="fraction to compare with Torch-Pruning; 0 for none",
    )
    parser.add_argument("--recover", type=int, nargs="+", default=[], metavar="SEGMENTS")
    parser.add_argument("--recover-text", type=Path, help="default: --calib")
    parser.add_argument("--models", type=Path, metavar="DIR")
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of timing; 0 measures quality only"
    )
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()
    _progress.quiet_libraries()

    source = Dense(str(gguf_path())).checkpoint()
    tokenizer = load_tokenizer(source.folder)
    calibration = texts.calibration(arguments, tokenizer)
    held_out = texts.evaluation(arguments, tokenizer)
    with ExitStack() as stack:
        place = arguments.models or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models = {"dense": place / "dense"}
        if not models["dense"].exists():
            shutil.copytree(source.folder, models["dense"] / "model")
        rows = [judge("dense", models["dense"] / "model", held_out)]
        # The survey runs only if a model has to be cut, and at most once.
        losses = cache(lambda: survey_blocks(source, calibration, Cut(Structured(0.0))))
        for fraction in arguments.fractions:
            name = f"structured:{fraction:g}"
            models[name] = place / name
            folder = models[name] / "model"
            rows.append(cut(source, calibration, losses, folder, fraction, held_out))
        if arguments.against:
            lessons = every_segment(
                read_text(arguments.recover_text or arguments.calib), tokenizer, length=512
            )
            trainer = Trainer(source, lessons, arguments.recover, held_out)
            rows += against_torch_pruning(
                source, calibration, losses, held_out, arguments.against, trainer
            )
        for folder in models.values():
            export(folder)
        latency = {}
        if arguments.rounds:
            scenarios: list[Scenario] = [Prefill(1, 128), Decode(1, 128, arguments.new_tokens)]
            latency = time_in_turns(models, scenarios, arguments.rounds)
    print(
        json.dumps(
            {"rows": rows, "latency": latency, "environment": encode(environment.describe())}
        )
    )


def judge(name: str, folder: Path, held_out: Tensor) -> dict[str, Any]:
    """Print size and perplexity of the model in a folder, and return them."""
    model = load_model(folder)
    return report(
        name,
        model,
        held_out,
        file_bytes=sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    )


def report(name: str, model: Any, held_out: Tensor, **more: Any) -> dict[str, Any]:
    """Print one line of the table, and return it as a record."""
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "block_parameters": block_parameters(model),
        "perplexity": perplexity(model, held_out).value,
        **more,
    }
    print(
        f"{name:34s} {row['parameters'] / 1e6:7.1f} M parameters, blocks "
        f"{row['block_parameters'] / 1e6:6.1f} M, perplexity {row['perplexity']:8.2f}",
        flush=True,
    )
    return row


def block_parameters(model: Any) -> int:
    """Return the number of parameters in all transformer blocks of a LLaMA."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def cut(
    source: Checkpoint,
    calibration: Tensor,
    losses: Callable[[], list[Losses]],
    folder: Path,
    fraction: float,
    held_out: Tensor,
    **options: Any,
) -> dict[str, Any]:
    """Cut a model as `thanos-deploy prune --pattern structured:FRACTION` does, and evaluate it."""
    name = f"structured:{fraction:g} {options.get('shrink', '')}".strip()
    if folder.exists():
        return judge(name, folder, held_out)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    how = Cut.of(Structured(fraction), **options)
    plan = plan_widths(source, losses(), how)
    shrink_checkpoint(source, calibration, folder, plan, how)
    seconds = round(time.perf_counter() - started, 1)
    width = plan.widths[0]
    widths = [width.heads, width.kv_heads, width.channels]
    return {**judge(name, folder, held_out), "widths": widths, "seconds": seconds}


def against_torch_pruning(
    source: Checkpoint,
    calibration: Tensor,
    losses: Callable[[], list[Losses]],
    held_out: Tensor,
    fraction: float,
    trainer: "Trainer",
) -> list[dict[str, Any]]:
    """Cut the same number of channels by us and by Torch-Pruning, with and without training."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "ours"
        ours = cut(source, calibration, losses, folder, fraction, held_out, shrink="ffn")
        rows = [ours, *trainer.rows(ours, folder)]
        for importance in ("magnitude", "taylor"):
            model: Any = load_model(source.folder)
            started = time.perf_counter()
            prune_with_torch_pruning(model, calibration, ours["widths"][2], importance)
            seconds = time.perf_counter() - started
            row = report(f"Torch-Pruning, {importance}", model, held_out, seconds=round(seconds, 1))
            assert row["parameters"] == ours["parameters"]
            rows.append(row)
            if importance == "taylor":
                folder = Path(scratch) / importance
                model.config.intermediate_size = ours["widths"][2]
                model.save_pretrained(folder)
                rows += trainer.rows(row, folder, only_least=True)
    return rows


@dataclass(frozen=True, slots=True)
class Trainer:
    """Trains cut models and evaluates them.

    Attributes:
        dense: checkpoint of the teacher.
        lessons: training segments, int64[available, length].
        counts: numbers of segments to train on; each training starts from the cut model.
        held_out: segments for the evaluation.
    """

    dense: Checkpoint
    lessons: Tensor
    counts: list[int]
    held_out: Tensor

    def rows(
        self, untrained: dict[str, Any], folder: Path, *, only_least: bool = False
    ) -> list[dict[str, Any]]:
        """Train the model in a folder on each number of segments, or only on the smallest."""
        counts = sorted(self.counts)[: 1 if only_least else None]
        return [self._row(untrained, folder, count) for count in counts]

    def _row(self, untrained: dict[str, Any], folder: Path, count: int) -> dict[str, Any]:
        trained = folder.with_name(f"{folder.name}-{count}")
        trained.mkdir()
        done = recover(Checkpoint.open(folder), self.dense, self.lessons, trained, count=count)
        row = judge(f"{untrained['model']}, {count} segments", trained, self.held_out)
        saved = untrained["perplexity"] - row["perplexity"]
        print(
            f"    {done.tokens} tokens in {done.seconds / 60:.1f} minutes ({done.dtype}): "
            f"{saved:.2f} of perplexity, {saved / done.seconds * 60:.2f} a minute",
            flush=True,
        )
        return {**row, **asdict(done)}


def prune_with_torch_pruning(
    model: Any, calibration: Tensor, channels: int, importance: str
) -> None:
    """Cut every MLP of a LLaMA to a number of channels with Torch-Pruning, in place."""
    import torch_pruning as tp

    if importance == "taylor":
        for ids in calibration:
            model(input_ids=ids[None], labels=ids[None]).loss.backward()
        score = tp.importance.GroupTaylorImportance()
    else:
        score = tp.importance.GroupMagnitudeImportance()
    gates = [block.mlp.gate_proj for block in model.model.layers]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    ups = [block.mlp.up_proj for block in model.model.layers]
    with warnings.catch_warnings():
        # It warns about the norms' weights, which are in no layer that it knows; none is cut.
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            {"input_ids": calibration[:1, :8], "use_cache": False},
            importance=score,
            pruning_ratio=0.0,
            pruning_ratio_dict=dict.fromkeys(gates, 1.0 - channels / gates[0].out_features),
            ignored_layers=[layer for layer in linears if layer not in (*gates, *ups)],
            output_transform=lambda output: output.logits,
        )
    pruner.step()
    model.zero_grad()
    assert all(gate.out_features == channels for gate in gates)


def time_in_turns(
    models: dict[str, Path], scenarios: list[Scenario], rounds: int
) -> dict[str, Any]:
    """Measure latency and memory of every model, and the time of its blocks; print a table."""
    subjects = {}
    for name, folder in models.items():
        subjects[name] = folder / "whole"
        subjects[f"{name}, first block"] = folder / "first"
    with paired.opened(subjects) as engines:
        for scenario in scenarios:
            engines.warm_up(scenario, at_most=3)
        taken = [engines.take_turns(scenarios, number) for number in range(rounds)]
        memory = engines.memory()

    def median(name: str, what: str) -> float:
        (scenario,) = (one for one in scenarios if one.kind == what)
        return statistics.median(
            chain(*(one[scenario.name][name][scenario.headline] for one in taken))
        )

    parameters = {
        name: block_parameters(load_model(path / "model")) for name, path in models.items()
    }
    table = {}
    for name in models:
        row: dict[str, Any] = {
            "peak_memory_bytes": memory[name].peak_bytes,
            "onnx_bytes": sum(
                f.stat().st_size for f in (models[name] / "whole" / "onnx").iterdir()
            ),
            "parameter_ratio_of_blocks": parameters[name] / parameters["dense"],
        }
        for what in ("prefill", "decode"):
            alone, of_dense = (
                median(who, what) - median(f"{who}, first block", what) for who in (name, "dense")
            )
            row[what] = {
                "median_seconds": median(name, what),
                "ratio": median(name, what) / median("dense", what),
                "ratio_of_blocks": alone / of_dense,
            }
        table[name] = row
        print(
            f"{name:16s} prefill {row['prefill']['median_seconds'] * 1e3:7.1f} ms "
            f"({row['prefill']['ratio']:.3f}; blocks {row['prefill']['ratio_of_blocks']:.3f}), "
            f"decode {row['decode']['median_seconds'] * 1e3:6.2f} ms "
            f"({row['decode']['ratio']:.3f}; blocks {row['decode']['ratio_of_blocks']:.3f}), "
            f"parameters of the blocks {row['parameter_ratio_of_blocks']:.3f}, "
            f"peak {row['peak_memory_bytes'] / 1e6:.0f} MB, ONNX {row['onnx_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
    for name, row in table.items():
        for what in ("prefill", "decode"):
            limit = LATENCY_SLACK * row["parameter_ratio_of_blocks"]
            verdict = "within" if row[what]["ratio_of_blocks"] <= limit else "ABOVE"
            print(f"{name}: {what} of the blocks {verdict} {limit:.3f} of the dense model's")
    return table


def export(folder: Path) -> None:
    """Export a model, and its first block alone, each as a bundle that an engine opens."""
    first = folder / "first-model"
    if not first.exists():
        model: Any = load_model(folder / "model")
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        model.save_pretrained(first)
    for name, source in (("whole", folder / "model"), ("first", first)):

        def produce(out: Path, source: Path = source) -> files.Json:
            (out / "onnx").mkdir()
            exporters.onnx.graph.export(Checkpoint.open(source), out / "onnx", pattern=None)
            return {}

        weights = files.sha256(source / "model.safetensors")
        with manifest.claim(folder / name, Source("folder", folder.name, "", weights)) as bundle:
            bundle.run("onnx", produce, options={}, inputs={}, overwrite=True)


if __name__ == "__main__":
    main()
