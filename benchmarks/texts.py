"""Options for the calibration and evaluation texts of quality benchmarks."""

import argparse
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from thanos_deploy.calibration.segments import segments
from thanos_deploy.calibration.texts import read_text


def add_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add options for both texts, and for the size of the evaluation."""
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
    """Return calibration segments: the first of the text, or with a seed, random ones.

    Args:
        arguments: arguments with the options of `add_options`.
        tokenizer: tokenizer of the model.
        count: number of segments.
        length: number of tokens in each segment.
        further: most further segments to append; fewer if the text has fewer.
        seed: seed of the random choice; None for the first segments, so that others can use the
            same ones.

    Returns:
        int64[count, length], or more rows with further segments.
    """
    text = read_text(arguments.calib)
    return segments(text, tokenizer, count=count, length=length, seed=seed, further=further)


def evaluation(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the first segments of the evaluation text, int64[segments, tokens]."""
    return segments(
        read_text(arguments.eval_text),
        tokenizer,
        count=arguments.eval_segments,
        length=arguments.eval_seqlen,
        seed=None,
    )
