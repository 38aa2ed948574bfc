"""Perplexity of every way to prune one model, calibrated and judged on texts of your own.

Usage: python -m benchmarks.quality --calib CALIB.txt --eval-text TEXT.txt [SETTING...]

Prunes SmolLM2-135M by every method to every pattern of the table below, in the setting of the
method's paper and in the one that measured best (structured patterns as masked columns), and
judges each result. By Thanos's presets "best" and "max" that takes long; see `pruning_time`. A
SETTING, a JSON object of options of `prune`, takes the place of that grid: '{"pattern": "2:4"}',
'{"pattern": "2:4", "method": "wanda"}', '{"pattern": "2:4", "block_size": 64}'. The first segments
of both texts are taken, without a seed, so that others can take the same.

Writes RESULTS/quality.json after every row and RESULTS/quality.md, a table beside published figures
of the same setting, and prints the table. What is in quality.json is not measured again: repeating
the command continues, within a row after the last block that was pruned, and further settings add
rows. To measure the code of another day, begin another file.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks import texts
from benchmarks.smollm2 import gguf_path
from thanos_deploy import methods
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.record import differences
from thanos_deploy.calibration.data import Data
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.texts import read_text
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.pattern import Structured, parse
from thanos_deploy.pruning.recipe import METHOD, PRESET, Recipe
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.shrink.options import Cut
from thanos_deploy.shrink.result import CutBlock
from thanos_deploy.stages.checkpoints import (
    plan_widths,
    prune_checkpoint,
    shrink_checkpoint,
    survey_blocks,
)
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.request import PruneRequest
from thanos_deploy.stages.training import recover_checkpoint

PATTERNS = ("unstructured:0.5", "2:4", "structured:0.3")

# SmolLM2-135M-Instruct (dequantised Q4_1); calibrated on the first 100 documents of a C4 sample,
# joined (32 segments of 512 tokens); judged on the first 8 segments of 2048 of WikiText-2's test
# split. Measured with the published code of each on two x86-64 cores; dense 19.13. Perplexity by
# pattern of `PATTERNS`, and seconds of the whole prune call.
PUBLISHED: tuple[tuple[str, tuple[str, str, str], str], ...] = (
    ("magnitude", ("415", "1678", "5.6e6"), "4 to 11"),
    ("Wanda", ("42.3", "150.6", "2785"), "82 to 110"),
    ("SparseGPT, published code", ("40.5", "82.6", "475"), "185 to 261"),
    ("SparseGPT, llm-compressor 0.14", ("40.5", "", ""), "212 (1 thread)"),
    ("Thanos, published code, B = 128", ("38.2", "81.2", "234"), "617 and 329 of CPU"),
    ("Thanos, published code, alpha = 0.1", ("", "", "212"), ""),
)


# Options that have a place of their own in the table, or none.
_NAMED = ("pattern", "method", "preset", "keep_shape")


def main() -> None:
    """Prune and judge, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="SETTING", type=json.loads)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--methods", nargs="+", default=methods.names(), metavar="METHOD")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, metavar="PATTERN")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    texts.add_options(parser)
    arguments = parser.parse_args()
    _progress.quiet_libraries()

    dense = Dense(arguments.model or str(gguf_path()))
    source = dense.checkpoint()
    tokenizer = load_tokenizer(source.folder)
    evaluation = texts.evaluation(arguments, tokenizer)
    path = arguments.results / "quality.json"
    document = begin(
        path,
        {
            "model": dense.source.name,
            "model_sha256": dense.source.sha256,
            "calib_tokens_sha256": hash_of(texts.calibration(arguments, tokenizer)),
            "eval_sha256": files.sha256(arguments.eval_text),
            "eval_segments": arguments.eval_segments,
            "eval_seqlen": arguments.eval_seqlen,
        },
    )
    if "dense" not in document:
        document["dense"] = judge(source.folder, evaluation)
        save(path, document)
    for setting in arguments.settings or grid(arguments):
        request = PruneRequest.of(**{**setting, "pattern": parse(setting["pattern"])})
        asked = {**request.to_json(), "calib": arguments.calib.name}
        if any(row["request"] == asked for row in document["rows"]):
            continue
        row = measure(source, request, asked, arguments, tokenizer, evaluation)
        row |= {"way": way(setting, request), "pattern": setting["pattern"]}
        document["rows"].append({**row, "request": asked})
        save(path, document)
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def begin(path: Path, conditions: Json) -> Json:
    """What was measured before under these conditions, or nothing yet."""
    if not path.exists():
        return {"conditions": conditions, "environment": encode(environment.describe()), "rows": []}
    document: Json = json.loads(path.read_bytes())
    if changed := differences(document["conditions"], conditions):
        raise SystemExit(f"{path} is of other conditions ({changed}): give another --results")
    return document


def grid(arguments: argparse.Namespace) -> Iterator[Json]:
    """Every method, pattern and preset; a preset that is the paper's setting comes once."""
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


def measure(
    source: Checkpoint,
    request: PruneRequest,
    asked: Json,
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: Tensor,
) -> Json:
    """Prune once: perplexity, and seconds of the whole call, of the clock and of the processor."""
    data, how = request.data, request.how
    taken = texts.calibration(
        arguments,
        tokenizer,
        count=data.nsamples,
        length=data.seqlen,
        further=how.tuning.further(data.nsamples),
    )
    ids, further = taken[: data.nsamples], taken[data.nsamples :]
    kept = arguments.results / f".journal-{files.sha256_of(asked)[:16]}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model"
        out.mkdir()
        started, processor = time.perf_counter(), time.process_time()
        blocks: Sequence[PrunedBlock | CutBlock]
        match how:
            case Cut():
                cuts = Journal(kept, asked, CutBlock)
                resumed = bool(cuts.reports)
                plan = plan_widths(source, survey_blocks(source, ids, how), how)
                blocks = shrink_checkpoint(
                    source, ids, out, plan, how, further=further, journal=cuts
                )
            case Recipe():
                journal = Journal(kept, asked, PrunedBlock)
                resumed = bool(journal.reports)
                blocks = prune_checkpoint(source, ids, out, how, further=further, journal=journal)
        if request.recover:
            recover_checkpoint(source, read_text(arguments.calib), out, request)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        value = judge(out, evaluation)
    shutil.rmtree(kept)
    if resumed:  # what came before is in the blocks' own clocks, which have no processor time
        return {
            "perplexity": value,
            "seconds": round(sum(sum(block.seconds.values()) for block in blocks), 1),
        }
    return {
        "perplexity": value,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
    }


def way(setting: Json, request: PruneRequest) -> str:
    """A row's name: method, preset, and what else was asked for."""
    usual = encode(Data())
    others = [
        f"{name} {value}"
        for name, value in setting.items()
        if name not in _NAMED and usual.get(name) != value
    ]
    if isinstance(request.how, Cut):
        others.append("cut out")
    named = [setting.get("method", METHOD), setting.get("preset", PRESET)]
    return ", ".join([*named, *others]).replace("_", " ")


def hash_of(ids: Tensor) -> str:
    """SHA-256 of tokens."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def judge(folder: Path, evaluation: Tensor) -> float:
    """Perplexity of the model in a folder."""
    return round(perplexity(load_model(folder), evaluation).value, 2)


def save(path: Path, document: Json) -> None:
    """Write what is known so far, as JSON and as a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    files.write_json(partial, document)
    partial.replace(path)
    path.with_suffix(".md").write_text(render(document), encoding="utf-8")


def render(document: Json) -> str:
    """The table in Markdown: one row for each way, one column for each pattern."""
    patterns = list(dict.fromkeys((*PATTERNS, *(row["pattern"] for row in document["rows"]))))
    found = {(row["way"], row["pattern"]): row for row in document["rows"]}
    lines = [("dense", [f"{document['dense']:.2f}"] * len(patterns), "")]
    for name in dict.fromkeys(row["way"] for row in document["rows"]):
        rows = [found.get((name, pattern)) for pattern in patterns]
        lines.append(
            (
                name,
                ["" if row is None else _shown(row["perplexity"]) for row in rows],
                ", ".join("-" if row is None else f"{row['seconds']:.0f}" for row in rows),
            )
        )
    further = [""] * (len(patterns) - len(PATTERNS))
    lines += [(f"*{name}*", [*values, *further], seconds) for name, values, seconds in PUBLISHED]
    conditions, machine = document["conditions"], document["environment"]
    table = "\n".join(
        f"| {' | '.join(cells)} |"
        for cells in (
            ["", *patterns, "whole prune call, s"],
            ["---", *["---:"] * (len(patterns) + 1)],
            *([name, *values, seconds] for name, values, seconds in lines),
        )
    )
    return f"""Perplexity of {conditions["model"]}: {conditions["eval_segments"]} segments of \
{conditions["eval_seqlen"]} tokens, pruned on {machine["cores"]} cores of {machine["processor"]}
(`python -m benchmarks.quality`). In italics: published code, on SmolLM2-135M-Instruct.

{table}
"""


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
