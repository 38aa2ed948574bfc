"""The texts that quality benchmarks calibrate and judge on, as options of the command line."""

import argparse
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from thanos_deploy.calibration.segments import segments
from thanos_deploy.calibration.texts import read_text


def add_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Which texts, and how much of the one to judge on."""
    parser.add_argument("--calib", type=Path, required=required)
    parser.add_argument("--eval-text", type=Path, required=required)
    parser.add_argument("--eval-segments", type=int, default=8)
    parser.add_argument("--eval-seqlen", type=int, default=2048)


def calibration(
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 32,
    length: int = 512,
    further: int = 0,
    seed: int | None = None,
) -> Tensor:
    """int64[count, length], the first ones, so that others can take the same; or drawn by a seed.

    Behind them as many further ones as the text has, up to a number.
    """
    text = read_text(arguments.calib)
    return segments(text, tokenizer, count=count, length=length, seed=seed, further=further)


def evaluation(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64[segments, tokens], the first segments of the text to judge on."""
    return segments(
        read_text(arguments.eval_text),
        tokenizer,
        count=arguments.eval_segments,
        length=arguments.eval_seqlen,
        seed=None,
    )
