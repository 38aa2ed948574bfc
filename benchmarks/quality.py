"""Perplexity of several ways to prune one model, calibrated and judged on texts of your own.

Usage: python -m benchmarks.quality --calib CALIB.txt --eval-text TEXT.txt SETTING...

A SETTING is a JSON object of `PruneRequest` fields, such as '{"pattern": "2:4"}', or
'{"pattern": "2:4", "method": "wanda"}', or '{"pattern": "2:4", "options": {"block_columns": 64}}'.
The first segments of both texts are taken, without a seed, so that others can take the same. One
line of JSON is printed for each setting, and one for the dense model.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import texts
from benchmarks.smollm2 import gguf_path
from thanos_deploy import console, environment
from thanos_deploy.checkpoint import load_model, load_tokenizer
from thanos_deploy.pattern import parse
from thanos_deploy.perplexity import perplexity
from thanos_deploy.pipeline import (
    Dense,
    plan_widths,
    prune_checkpoint,
    shrink_checkpoint,
    survey_blocks,
)
from thanos_deploy.requests import PruneRequest


def main() -> None:
    """Prune and judge, setting by setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+", metavar="SETTING", type=json.loads)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct")
    texts.add_options(parser)
    arguments = parser.parse_args()
    console.quiet_libraries()

    source = Dense(arguments.model or str(gguf_path())).checkpoint()
    tokenizer = load_tokenizer(source.folder)
    evaluation = texts.evaluation(arguments, tokenizer)
    print(json.dumps({"environment": environment.describe()}), flush=True)
    print(json.dumps({"dense": judge(source.folder, evaluation)}), flush=True)
    for setting in arguments.settings:
        request = PruneRequest(**{**setting, "pattern": parse(setting["pattern"])})
        calibration = texts.calibration(
            arguments, tokenizer, count=request.nsamples, length=request.seqlen
        )
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            if request.shrinks:
                losses = survey_blocks(source, calibration, request)
                plan = plan_widths(source, losses, request)
                shrink_checkpoint(source, calibration, Path(folder), request, plan)
            else:
                prune_checkpoint(source, calibration, Path(folder), request)
            seconds = time.perf_counter() - started
            value = judge(Path(folder), evaluation)
        print(
            json.dumps({"perplexity": value, "seconds": round(seconds, 1), **request.to_json()}),
            flush=True,
        )


def judge(folder: Path, evaluation: torch.Tensor) -> float:
    """Perplexity of the model in a folder."""
    return round(perplexity(load_model(folder), evaluation).value, 2)


if __name__ == "__main__":
    main()
