"""The command `thanos-deploy`: each subcommand parses, calls one function of `pipeline`, prints.

Results go to standard output, progress and errors to standard error. What is heavy is imported by
the subcommand that needs it, so that `--help` answers at once.
"""

import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import exporters
from thanos_deploy import __version__, console, methods, pattern
from thanos_deploy.errors import (
    DeployError,
    InputError,
    PatternError,
    PlatformError,
    ResourceError,
)

if TYPE_CHECKING:
    from thanos_deploy.artifact import Json
    from thanos_deploy.pipeline import Announce, BenchRequest, EvalRequest, PruneRequest

INTERRUPTED = 130

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

F = TypeVar("F", bound=Callable[..., Any])


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


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
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

_model = click.argument("model")
_bundle = click.argument("out", type=click.Path(path_type=Path))
_out = click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder for the bundle."
)
_common = _options(
    click.option(
        "--overwrite/--resume",
        default=False,
        help="Redo the stages that were made with other options, or keep what is finished "
        "and refuse other options.  [default: resume]",
    ),
    click.option("--offline", is_flag=True, help="Use no network: models from the local cache."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
    click.option("-v", "--verbose", is_flag=True, help="Log every block."),
)
_dense = click.option(
    "--dense", metavar="MODEL", required=True, help="The dense model that OUT was made from."
)
_revision = click.option("--revision", help="Branch, tag or commit of a hub model.")
_dry_run = click.option(
    "--dry-run", is_flag=True, help="Check everything and say what would be done."
)
_text_field = click.option(
    "--text-field", default="text", show_default=True, help="Field of a .jsonl row with the text."
)
_pruning = _options(
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
        type=click.Choice(["uniform", "loss"]),
        help="structured: the same widths in every block, as a stock config.json has it; or by "
        "loss, each block its own, for ONNX only.  [default: uniform]",
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
        type=click.Choice(["best", "paper"]),
        default="best",
        show_default=True,
        help="Defaults of the options below: what measured best on held-out text, or the setting "
        "of the method's own paper.",
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
        "--calib",
        default="builtin",
        show_default=True,
        help="Calibration text: a .txt or .jsonl file; or builtin, the Python language reference.",
    ),
    _text_field,
    click.option("--nsamples", default=32, show_default=True, help="Segments of calibration text."),
    click.option("--seqlen", default=512, show_default=True, help="Tokens of each segment."),
    click.option("--seed", default=0, show_default=True, help="Picks the segments."),
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
    click.option(
        "--dtype",
        type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
        default="auto",
        show_default=True,
        help="What to store the checkpoint in; auto keeps the model's own.",
    ),
)
_evaluation = _options(
    click.option(
        "--eval-text",
        default="builtin",
        show_default=True,
        help="Text for perplexity: a file, or the part of the built-in text that calibration "
        "never sees.",
    ),
    click.option(
        "--eval-segments", default=12, show_default=True, help="Segments of evaluation text."
    ),
    click.option("--eval-seqlen", default=1024, show_default=True, help="Tokens of each."),
)
_benchmark = _options(
    click.option("--batch", default=1, show_default=True, help="Sequences at once."),
    click.option("--prompt", default=128, show_default=True, help="Tokens of each timed prompt."),
    click.option(
        "--new-tokens", default=16, show_default=True, help="Tokens decoded after each prompt."
    ),
    click.option("--rounds", default=20, show_default=True, help="Timed rounds of each model."),
    click.option(
        "--sample-prompt",
        default="The capital of France is",
        show_default=True,
        help="Prompt of the sample text.",
    ),
)
_target = click.option(
    "--target",
    type=click.Choice(exporters.names()),
    default="onnx",
    show_default=True,
    help="What to export to.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Take a language model, give back a deployable sparse one, with proof.

    MODEL is a hub id, a local Hugging Face folder, a packed folder, or a .gguf file. OUT is a
    bundle: the folder that `prune` or `prune-export` made. Repeating a command continues where it
    was interrupted and does no work twice.

    Exit codes: 0 ok, 1 a bug, 2 usage, 3 bad input, 4 the machine lacks something, 5 no memory or
    disk, 6 a gate failed, 7 a file was changed, 130 interrupted.
    """


@cli.command("prune-export")
@_model
@_out
@_pruning
@_target
@_evaluation
@_benchmark
@_revision
@_dry_run
@_common
def prune_export(
    model: str, out: Path, target: str, revision: str | None, dry_run: bool, **options: Any
) -> None:
    """Prune MODEL, export it, run it, measure it, and say what came out.

    \b
    thanos-deploy prune-export SmolLM2.gguf --pattern 2:4 --target onnx -o out/smol
    """  # noqa: D301 - click wants the control character
    with _session(options) as session:
        from thanos_deploy import pipeline

        # A plan is the same for every target.
        run = pipeline.plan if dry_run else partial(pipeline.prune_export, target=target)
        result = run(
            model,
            out,
            request=_prune_request(options),
            evaluation=_eval_request(options),
            benchmark=_bench_request(options),
            revision=revision,
            overwrite=options["overwrite"],
            announce=session,
        )
    _print(options, result, console.show_plan if dry_run else console.show_report)


@cli.command()
@_model
@_out
@_pruning
@_revision
@_dry_run
@_common
def prune(model: str, out: Path, revision: str | None, dry_run: bool, **options: Any) -> None:
    """Prune MODEL into OUT/model, an ordinary checkpoint.

    With a structured pattern, --dry-run measures what each block would lose and prints the heads
    and channels that would stay.
    """
    with _session(options) as session:
        from thanos_deploy import artifact, pipeline

        if dry_run:
            request = _prune_request(options)
            plan = pipeline.plan_prune(model, request, revision=revision, announce=session)
            _print(options, plan, console.show_plan)
            return
        dense = pipeline.Dense(model, revision=revision)
        with artifact.claim(out, dense.source.to_json(), overwrite=options["overwrite"]) as bundle:
            record = pipeline.prune(
                bundle,
                dense,
                _prune_request(options),
                overwrite=options["overwrite"],
                announce=session,
            )
    _print(options, record.result, console.show_plan)


@cli.command()
@_bundle
@_target
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="What the graph holds its weights in; int8: those of the blocks, for ONNX Runtime only.  "
    "[default: what it was made with, or fp32]",
)
@click.option(
    "--max-seq",
    type=int,
    help="The most tokens, prompt and answer together, that are promised to work.  "
    "[default: what it was made with, or all that the model takes]",
)
@_common
def export(out: Path, target: str, dtype: str | None, max_seq: int | None, **options: Any) -> None:
    """Export the pruned model of the bundle OUT.

    \b
    onnx    one graph for prefill and decode, compared with PyTorch: OUT/onnx
    genai   that graph as a folder that ORT-GenAI loads: OUT/genai
    packed  the checkpoint with n:m weights stored without their zeros: OUT/packed
    """  # noqa: D301 - click wants the control character
    with _session(options) as session:
        from thanos_deploy import artifact, pipeline

        with artifact.claim(out, artifact.Bundle.open(out).source) as bundle:
            before = pipeline.exported_with(bundle)
            request = pipeline.ExportRequest(
                dtype=dtype or before.dtype,
                max_sequence=before.max_sequence if max_seq is None else max_seq,
            )
            record = pipeline.export(
                bundle,
                target=target,
                request=request,
                overwrite=options["overwrite"],
                announce=session,
            )
    _print(
        options,
        record.result,
        console.show_parity if target == "onnx" else console.show_values,
    )


@cli.command("eval")
@_bundle
@_dense
@_text_field
@_evaluation
@_common
def evaluate(out: Path, dense: str, **options: Any) -> None:
    """Measure the perplexity of the bundle OUT and of the dense model.

    A bundle holds one evaluation; --overwrite replaces it by one on another text.
    """
    with _session(options) as session:
        from thanos_deploy import pipeline

        with pipeline.reopen(out, dense) as (bundle, source):
            pruned = pipeline.evaluate(
                bundle,
                source,
                _eval_request(options),
                overwrite=options["overwrite"],
                announce=session,
            )
            if "report" in bundle.stages:
                pipeline.write_report(bundle, source)
    _print(options, {"dense": pruned.inputs["dense"], "pruned": pruned.result}, console.show_values)


@cli.command()
@_bundle
@_dense
@_benchmark
@_common
def bench(out: Path, dense: str, **options: Any) -> None:
    """Time the bundle OUT beside the dense model, and bring its report up to date."""
    with _session(options) as session:
        from thanos_deploy import pipeline

        with pipeline.reopen(out, dense) as (bundle, source):
            bundle.require("eval", f"`thanos-deploy eval {out} --dense {dense}`")
            pipeline.bench(
                bundle,
                source,
                _bench_request(options),
                overwrite=options["overwrite"],
                announce=session,
            )
            report = pipeline.write_report(bundle, source)
    _print(options, report, console.show_report)


@cli.command("generate")
@_bundle
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
    help="0 takes the likeliest token each time; above 0 tokens are drawn.",
)
@click.option("--top-k", default=0, show_default=True, help="Draw from that many; 0 for all.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from this much probability.")
@click.option(
    "--min-p",
    default=0.0,
    show_default=True,
    help="Draw from tokens at least this fraction as likely as the likeliest.",
)
@click.option("--repetition-penalty", default=1.0, show_default=True, help="Above 1: repeat less.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@click.option("--stop", multiple=True, help="A text that ends the answer; may be given often.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What to run on; an error where it is not there.",
)
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Check the files' hashes first."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
def generate_text(
    out: Path,
    prompt: str,
    new_tokens: int,
    stop: tuple[str, ...],
    provider: str,
    verify: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT with the exported model of the bundle OUT, and stream the answer.

    PROMPT is passed to the model as it is, without a chat template; - reads it from standard
    input, in UTF-8. Needs numpy, tokenizers and onnxruntime only.

    \b
    thanos-deploy generate out/smol "The capital of France is" --new-tokens 20
    """  # noqa: D301 - click wants the control character
    from runtime.engine import open_engine
    from runtime.sampling import Sampling
    from runtime.text import open_tokenizer, stream

    settings = Sampling(**sampling)
    text = _read_prompt() if prompt == "-" else prompt
    tokenizer = open_tokenizer(out, verify=verify)
    engine = open_engine(out, provider=provider, verify=verify)
    answer = []
    for piece in stream(
        engine, tokenizer, text, new_tokens=new_tokens, sampling=settings, stop=stop
    ):
        answer.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    click.echo(json.dumps({"prompt": text, "answer": "".join(answer)}) if as_json else "")


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input has invalid UTF-8 at byte {error.start}", fix="give the text in UTF-8"
        ) from error


def _prune_request(options: dict[str, Any]) -> "PruneRequest":
    from thanos_deploy.pipeline import PruneRequest

    return PruneRequest(
        pattern=options["pattern"],
        method=options["method"],
        options={name: options[name] for name in _METHOD_OPTIONS if options[name] is not None},
        preset=options["preset"],
        true_sequential=options["true_sequential"],
        dense_target=options["dense_target"],
        calib=options["calib"],
        text_field=options["text_field"],
        nsamples=options["nsamples"],
        seqlen=options["seqlen"],
        seed=options["seed"],
        dtype=options["dtype"],
        keep_shape=options["keep_shape"],
        shrink=options["shrink"],
        ffn_multiple=options["ffn_multiple"],
        allocation=options["allocation"],
    )


def _eval_request(options: dict[str, Any]) -> "EvalRequest":
    from thanos_deploy.pipeline import EvalRequest

    return EvalRequest(
        text=options["eval_text"],
        text_field=options["text_field"],
        segments=options["eval_segments"],
        seqlen=options["eval_seqlen"],
    )


def _bench_request(options: dict[str, Any]) -> "BenchRequest":
    from thanos_deploy.pipeline import BenchRequest

    return BenchRequest(
        batch=options["batch"],
        prompt=options["prompt"],
        new_tokens=options["new_tokens"],
        rounds=options["rounds"],
        sample_prompt=options["sample_prompt"],
    )


@contextmanager
def _session(options: dict[str, Any]) -> "Iterator[Announce]":
    """What every command that works needs: quiet libraries, logging, progress."""
    if options["offline"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("thanos_deploy").setLevel(
        logging.INFO if options["verbose"] else logging.WARNING
    )
    console.quiet_libraries()
    with console.announcer(quiet=options["quiet"]) as announce:
        yield announce


def _print(options: dict[str, Any], value: "Json", show: "Callable[[Json], None]") -> None:
    if options["as_json"]:
        click.echo(json.dumps(value, indent=2, allow_nan=False))
    else:
        show(value)


def main() -> None:
    """Run the command and turn every outcome into its exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    sys.exit(_run())


def _run() -> int:
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except DeployError as error:
        return _fail(error)
    except (KeyboardInterrupt, click.Abort):
        console.show_error("interrupted; repeat the command to continue where it stopped")
        return INTERRUPTED
    except Exception as error:
        if known := _as_deploy_error(error):
            return _fail(known)
        traceback.print_exc()
        console.show_error("this is a bug in thanos-deploy; please report the lines above")
        return 1
    return 0


def _fail(error: DeployError) -> int:
    console.show_error(str(error))
    return error.exit_code


def _as_deploy_error(error: Exception) -> DeployError | None:
    """What an exception of the system or of PyTorch means, if it is not a bug."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"{error.filename or 'a file'}: no space left on the device",
            fix="free some space and repeat the command; what is finished is kept",
        )
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return PlatformError(
            f"{error.filename}: {error.strerror}",
            fix="give a place that can be written to, with -o or $THANOS_DEPLOY_CACHE",
        )
    # PyTorch's CPU allocator raises a plain RuntimeError.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return ResourceError(
            f"out of memory ({error})",
            fix="use fewer or shorter segments (--seqlen, --eval-seqlen), or a larger machine",
        )
    return None


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
