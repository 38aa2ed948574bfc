"""`thanos-deploy generate`: generate text with the exported model."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

import thanos_deploy as td
from thanos_deploy.cli._options import bundle_argument
from thanos_deploy.errors import InputError


@click.command("generate")
@bundle_argument
@click.argument("prompt")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="The most tokens to generate.",
)
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    help="0 takes the most likely token each time; above 0, tokens are sampled.",
)
@click.option(
    "--top-k",
    default=0,
    show_default=True,
    help="Sample from the K most likely tokens; 0 samples from all tokens.",
)
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens whose probabilities add up to this.",
)
@click.option(
    "--min-p",
    default=0.0,
    show_default=True,
    help="Sample from tokens at least this fraction as likely as the most likely one.",
)
@click.option(
    "--repetition-penalty",
    default=1.0,
    show_default=True,
    help="Above 1, repetitions become less likely.",
)
@click.option("--seed", default=0, show_default=True, help="Seed for sampling.")
@click.option("--stop", multiple=True, help="A text that ends the answer; may be repeated.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Execution provider of ONNX Runtime; if it is not available, the command fails.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Check the hashes of the files first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
def command(out: Path, prompt: str, as_json: bool, **options: Any) -> None:
    """Continue PROMPT with the exported model of the bundle OUT, and stream the answer.

    PROMPT is passed to the model as it is, without a chat template. With - it is read from standard
    input, in UTF-8. The command needs numpy, tokenizers and onnxruntime only.

    \b
    thanos-deploy generate out/smol "The capital of France is" --new-tokens 20
    """  # noqa: D301 - click wants the control character
    text = _read_prompt() if prompt == "-" else prompt
    show = None if as_json else partial(click.echo, nl=False)
    answer = td.Bundle(out).generate(text, **options, on_text=show)
    click.echo(json.dumps({"prompt": text, "answer": answer}) if as_json else "")


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input has invalid UTF-8 at byte {error.start}", fix="give the text in UTF-8"
        ) from error
