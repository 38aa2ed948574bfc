"""The texts that quality benchmarks calibrate and judge on, as options of the command line."""

import argparse
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from thanos_deploy.calibration.segments import segments
from thanos_deploy.calibration.texts import read_text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which texts, and how much of the one to judge on."""
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--eval-text", type=Path, required=True)
    parser.add_argument("--eval-segments", type=int, default=8)
    parser.add_argument("--eval-seqlen", type=int, default=2048)


def calibration(
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 32,
    length: int = 512,
    further: int = 0,
) -> Tensor:
    """int64[count, length], the first ones, without a seed, so that others can take the same.

    Behind them as many further ones as the text has, up to a number.
    """
    text = read_text(arguments.calib)
    return segments(text, tokenizer, count=count, length=length, seed=None, further=further)


def evaluation(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """int64[segments, tokens], the first segments of the text to judge on."""
    return segments(
        read_text(arguments.eval_text),
        tokenizer,
        count=arguments.eval_segments,
        length=arguments.eval_seqlen,
        seed=None,
    )
