"""What subcommands share: options, the requests made from them, and the frame that they run in."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from thanos_deploy import methods, pattern
from thanos_deploy.bundle.codec import encode
from thanos_deploy.cli import _progress
from thanos_deploy.errors import PatternError

if TYPE_CHECKING:
    from thanos_deploy.measure.options import BenchRequest, EvalRequest
    from thanos_deploy.progress import Announce
    from thanos_deploy.prune.recipe import PruneRequest

F = TypeVar("F", bound=Callable[..., Any])
Shown = TypeVar("Shown")


class PatternType(click.ParamType[pattern.Pattern]):
    """A sparsity pattern on the command line."""

    name = "pattern"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> pattern.Pattern:
        """Read the spelling; a bad one is a usage error."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # click may hand over a converted value
        try:
            return pattern.parse(value)
        except PatternError as error:
            self.fail(f"{error.message}; {error.fix}", param, ctx)


class CountsType(click.ParamType[tuple[int, ...]]):
    """Numbers from 1 on, with commas between them."""

    name = "N[,N...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Read the numbers; anything else is a usage error."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # click may hand over a converted value
        numbers = value.split(",")
        if not all(number.isdecimal() and int(number) > 0 for number in numbers):
            self.fail(f"{value!r} is not a list of numbers from 1 on, like 1,8", param, ctx)
        return tuple(map(int, numbers))


def several(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which `--help` shows them."""
    return lambda command: reduce(lambda inner, wrap: wrap(inner), reversed(decorators), command)


# Options that belong to a method; each is passed on only when it was given.
_METHOD_OPTIONS = (
    "block_columns",
    "damping",
    "damping_mode",
    "score",
    "refit_steps",
    "outlier_rows",
)

model_argument = click.argument("model")
bundle_argument = click.argument("out", type=click.Path(path_type=Path))
out_option = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the bundle."
)
session_options = several(
    click.option("--offline", is_flag=True, help="Use no network: models from the local cache."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
    click.option("-v", "--verbose", is_flag=True, help="Log every block."),
)
common_options = several(
    click.option(
        "--overwrite/--resume",
        default=False,
        help="Redo the stages that were made with other options, or keep what is finished "
        "and refuse other options.  [default: resume]",
    ),
    session_options,
)
dense_option = click.option(
    "--dense", metavar="MODEL", required=True, help="The dense model that OUT was made from."
)
revision_option = click.option("--revision", help="Branch, tag or commit of a hub model.")
dry_run_option = click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and say what would be done, and what time, memory and disk it takes.",
)
text_field_option = click.option(
    "--text-field",
    default="text",
    show_default=True,
    help="Field of a JSON Lines row with the text.",
)
device_option = click.option(
    "--device",
    metavar="auto|cpu|cuda[:N]",
    default="auto",
    show_default=True,
    help="Where PyTorch computes; auto is the first GPU where there is one.",
)
pruning_options = several(
    click.option(
        "--pattern",
        type=PatternType(),
        required=True,
        help="What to prune to: n:m keeps n of every m weights (2:4, 4:8, ...); "
        "unstructured:FRACTION removes that fraction; structured:FRACTION cuts attention heads and "
        "feed-forward channels out, at least that fraction of the blocks' parameters, and leaves "
        "an ordinary smaller model.",
    ),
    click.option(
        "--shrink",
        type=click.Choice(["heads", "ffn", "both"]),
        help="structured: what to cut out.  [default: both]",
    ),
    click.option(
        "--ffn-multiple",
        type=int,
        help="structured: of which the number of feed-forward channels has to be.  [default: 64, "
        "or the largest power of two below that divides the model's own]",
    ),
    click.option(
        "--allocation",
        type=click.Choice(["uniform", "loss", "owl"]),
        help="uniform: every layer or block loses alike. structured: or by loss, each block its "
        "own widths, which no stock config.json has, for ONNX only. unstructured: or owl, blocks "
        "with more outliers keep more (arXiv 2310.05175).  [default: uniform]",
    ),
    click.option(
        "--owl-threshold",
        type=float,
        help="owl: an outlier is a Wanda score of so many times the block's mean.  [default: 5]",
    ),
    click.option(
        "--owl-spread",
        type=float,
        help="owl: how far a block's sparsity may be from the pattern's.  [default: 0.08]",
    ),
    click.option(
        "--include",
        metavar="LAYER",
        multiple=True,
        help="Prune only these layers: a full name, or re: and an expression that matches the "
        "whole of it. Embeddings and the output head (lm_head) are never visited.",
    ),
    click.option(
        "--ignore",
        metavar="LAYER",
        multiple=True,
        help="Leave these layers dense, to the last bit; named as for --include.",
    ),
    click.option(
        "--sparsity-file",
        type=click.Path(),
        help='JSON object of layers with patterns of their own: {"re:.*down_proj": "dense", '
        '"model.layers.0.mlp.up_proj": "unstructured:0.3"}.',
    ),
    click.option(
        "--recover",
        type=click.IntRange(min=0),
        default=0,
        metavar="SEGMENTS",
        help="Afterwards train what is left, with the dense model as its teacher, on so many "
        "segments of --seqlen tokens from anywhere in the calibration text (which come again where "
        "it has fewer; new text helps more). Zeros stay zero. Some hundreds are worth it. Takes "
        "minutes, and memory for five models in float32 and what 2048 tokens leave in "
        "them.  [default: 0]",
    ),
    click.option(
        "--keep-shape",
        is_flag=True,
        help="structured: set that fraction of each layer's input columns to zero instead, and "
        "leave all shapes as they are.",
    ),
    click.option(
        "--method",
        type=click.Choice(methods.names()),
        default="thanos",
        show_default=True,
        help="Pruning method.",
    ),
    click.option(
        "--preset",
        type=click.Choice(methods.PRESET_NAMES),
        default="best",
        show_default=True,
        help="Defaults of the options below: what measured best on held-out text, the best of what "
        "passes no dense model beside the pruned one, or the setting of the method's own paper.",
    ),
    click.option(
        "--true-sequential/--block-statistics",
        default=None,
        help="Collect each layer's statistics after the layers before it in the block are pruned, "
        "or all of a block's at once.  [default: the preset's]",
    ),
    click.option(
        "--dense-target",
        type=click.FloatRange(0.0, 1.0),
        help="How far each layer aims at its output in the dense model (1) rather than at its own "
        "output on the pruned model's activations (0).  [default: the preset's]",
    ),
    click.option(
        "--tune-steps",
        type=click.IntRange(0),
        help="Steps of all kept weights of a pruned block together, towards what leaves the dense "
        "block; 0 for none.  [default: the preset's; 0 for columns of zeros]",
    ),
    click.option(
        "--calib",
        default="builtin",
        show_default=True,
        help="Calibration text: a .txt or .md, or a .jsonl, each also with .gz; or builtin, the "
        "Python language reference.",
    ),
    text_field_option,
    click.option("--nsamples", default=32, show_default=True, help="Segments of calibration text."),
    click.option("--seqlen", default=512, show_default=True, help="Tokens of each segment."),
    click.option("--seed", default=0, show_default=True, help="Picks the segments."),
    click.option(
        "--calib-forward",
        type=click.Choice(["auto", "fp32", "bf16"]),
        default="auto",
        show_default=True,
        help="What blocks run in on calibration data; auto is bf16 where the processor multiplies "
        "that natively.",
    ),
    click.option(
        "--block-size",
        "block_columns",
        type=int,
        help="thanos, sparsegpt: columns that are solved at once.",
    ),
    click.option(
        "--damp",
        "damping",
        type=float,
        help="thanos, sparsegpt: damping of the Hessian, as a fraction.",
    ),
    click.option(
        "--damp-mode",
        "damping_mode",
        help="thanos, sparsegpt: fraction of what: the mean or median of the Hessian's diagonal, "
        "or per-channel.",
    ),
    click.option(
        "--score",
        help="thanos: what chooses the weights to remove: wanda or obs.",
    ),
    click.option(
        "--refit-steps",
        type=int,
        help="thanos: steps of a last fit of all kept weights of a layer.",
    ),
    click.option(
        "--outlier-rows",
        type=float,
        help="thanos: fraction of each layer's rows that stay dense; such a model does not "
        "hold the pattern everywhere.",
    ),
    device_option,
    click.option(
        "--dtype",
        type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
        default="auto",
        show_default=True,
        help="What to store the checkpoint in; auto keeps the model's own.",
    ),
)


def evaluation_options(*, short: bool = False) -> Callable[[F], F]:
    """The text of an evaluation and how much of it; with short names too where nothing has them."""

    def names(name: str) -> list[str]:
        return [f"--eval-{name}", *([f"--{name}"] if short else []), f"eval_{name}"]

    return several(
        click.option(
            *names("text"),
            default="builtin",
            show_default=True,
            help="Text for perplexity: a file, or the part of the built-in text that calibration "
            "never sees.",
        ),
        click.option(
            *names("segments"), default=12, show_default=True, help="Segments of evaluation text."
        ),
        click.option(*names("seqlen"), default=1024, show_default=True, help="Tokens of each."),
    )


benchmark_options = several(
    click.option(
        "--batch",
        "batches",
        type=CountsType(),
        multiple=True,
        help="Sequences at once: 1,8.  [default: 1]",
    ),
    click.option(
        "--prompt",
        "prompts",
        type=CountsType(),
        multiple=True,
        help="Tokens of each timed prompt: 32,128.  [default: 128; of bench: 32,128]",
    ),
    click.option(
        "--past",
        "pasts",
        type=CountsType(),
        multiple=True,
        help="Tokens before the timed steps of decode: 128,1024.  [default: those of --prompt if "
        "given, else 128; of bench: 128,512]",
    ),
    click.option(
        "--new-tokens",
        type=click.IntRange(min=2),
        help="Steps of decode, tokens of an answer.  [default: 16]",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=2),
        help="Timed rounds of each model.  [default: 20; of bench: 10]",
    ),
    click.option(
        "--sample-prompt",
        help="Prompt of the sample text.  [default: The capital of France is]",
    ),
)


def prune_request(options: dict[str, Any]) -> "PruneRequest":
    """What `pruning_options` ask for."""
    from thanos_deploy.prune.recipe import PruneRequest

    return PruneRequest(
        pattern=options["pattern"],
        method=options["method"],
        options={name: options[name] for name in _METHOD_OPTIONS if options[name] is not None},
        preset=options["preset"],
        true_sequential=options["true_sequential"],
        dense_target=options["dense_target"],
        tune_steps=options["tune_steps"],
        calib=options["calib"],
        text_field=options["text_field"],
        nsamples=options["nsamples"],
        seqlen=options["seqlen"],
        seed=options["seed"],
        calib_forward=options["calib_forward"],
        dtype=options["dtype"],
        keep_shape=options["keep_shape"],
        shrink=options["shrink"],
        ffn_multiple=options["ffn_multiple"],
        allocation=options["allocation"],
        recover=options["recover"],
        owl_threshold=options["owl_threshold"],
        owl_spread=options["owl_spread"],
        include=options["include"],
        ignore=options["ignore"],
        sparsity_file=options["sparsity_file"],
        device=options["device"],
    )


def eval_request(options: dict[str, Any]) -> "EvalRequest":
    """What `evaluation_options` ask for."""
    from thanos_deploy.measure.options import EvalRequest

    return EvalRequest(
        text=options["eval_text"],
        text_field=options["text_field"],
        segments=options["eval_segments"],
        seqlen=options["eval_seqlen"],
        device=options["device"],
    )


def bench_request(options: dict[str, Any], **defaults: Any) -> "BenchRequest":
    """What `benchmark_options` ask for, and options of `bench` that are called like its fields.

    Args:
        options: of the command; what was not given is None or empty.
        defaults: where they differ from the request's own.
    """
    from thanos_deploy.measure.options import BenchRequest

    grids = ("batches", "prompts", "pasts")
    given = {
        field.name: options[field.name]
        for field in fields(BenchRequest)
        if options.get(field.name) not in (None, ())
    }
    flat: dict[str, Any] = {name: tuple(chain(*given[name])) for name in grids if name in given}
    if "prompts" in flat:
        flat = {"pasts": None, **flat}
    return BenchRequest(**{**defaults, **given, **flat})


@contextmanager
def session(options: dict[str, Any]) -> "Iterator[Announce]":
    """What every command that works needs: quiet libraries, logging, progress."""
    if options["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("thanos_deploy").setLevel(
        logging.INFO if options["verbose"] else logging.WARNING
    )
    _progress.quiet_libraries()
    with _progress.announcer(quiet=options["quiet"]) as announce:
        yield announce


def emit(options: dict[str, Any], value: Shown, show: "Callable[[Shown], None]") -> None:
    """Print a record, or what is JSON already, for people or as JSON."""
    if options["as_json"]:
        click.echo(json.dumps(encode(value), indent=2, allow_nan=False))
    else:
        show(value)
