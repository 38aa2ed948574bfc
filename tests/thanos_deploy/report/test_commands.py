"""The commands that a report prints, read by the command line itself."""

import inspect
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

import thanos_deploy as td
from exporters import targets
from exporters.options import EngineRequest, ExportRequest
from tests.bundles import add_build, write_bundle
from thanos_deploy import cli, methods
from thanos_deploy.api import _requests
from thanos_deploy.api.options import ExportOptions
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Source
from thanos_deploy.cli._options import given
from thanos_deploy.measure.options import BenchRequest, EvalRequest
from thanos_deploy.pattern import parse
from thanos_deploy.report import commands, sources
from thanos_deploy.stages.request import PruneRequest


def parsed(line: str) -> dict[str, Any]:
    """The options as the subcommand would get them."""
    program, name, *words = shlex.split(line)
    assert program == "thanos-deploy"
    command = cli.cli.commands[name]
    return command.make_context(name, words, resilient_parsing=False).params


def exporting(options: dict[str, Any]) -> dict[str, object]:
    """By name of a target's option, what it is asked for."""
    names = inspect.get_annotations(ExportOptions)
    return _requests.export_request({name: options[name] for name in names})


def printed(tmp_path: Path, **options: Any) -> dict[str, str]:
    """The lines for a bundle whose stages have these options, by the name of the subcommand."""
    read = sources.read(Bundle.open(write_bundle(tmp_path / "out")))
    for stage, asked in options.items():
        read.stages[stage].options.clear()
        read.stages[stage].options.update(asked)
    return {line.split()[1]: line for line in commands.of(read)}


@pytest.mark.parametrize(
    "request_",
    [
        *(PruneRequest.of(parse("2:4"), method=name) for name in methods.names()),
        PruneRequest.of(parse("2:4"), preset="paper", seed=3, dtype="fp16"),
        PruneRequest.of(parse("4:8"), block_size=64, outlier_rows=0.1),
        PruneRequest.of(parse("unstructured:0.5"), true_sequential=False, dense_target=0.5),
        PruneRequest.of(parse("structured:0.2"), allocation="loss", ffn_multiple=32, shrink="ffn"),
        PruneRequest.of(parse("structured:0.2")),
        PruneRequest.of(parse("structured:0.2"), preset="fast"),
        PruneRequest.of(parse("2:4"), preset="fast"),
        PruneRequest.of(parse("2:4"), tune_steps=16, tune_nsamples=0),
        PruneRequest.of(parse("structured:0.2"), keep_shape=True),
        PruneRequest.of(parse("unstructured:0.6"), allocation="owl", owl_spread=0.1, ignore=("a",)),
        PruneRequest.of(
            parse("2:4"), include=("re:.{1,3}", "b, c"), ignore=("re:x",), sparsity_file="own.json"
        ),
    ],
    ids=lambda request: f"{request.how.pattern} {request.how.method}",
)
def test_the_pruning_command_asks_for_what_was_asked_for(
    request_: PruneRequest, tmp_path: Path
) -> None:
    recorded = request_.to_json()
    options = given(parsed(printed(tmp_path, prune=recorded)["prune"]))
    for name in ("model", "out", "overwrite", "dry_run"):
        options.pop(name)
    again = _requests.prune_request(options.pop("pattern"), options)
    assert again.to_json() == recorded


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("/folder/held out.txt", "held out.txt"),
        ("builtin", "builtin"),
        ("hub:a/x:test", "hub:a/x:test"),
        ("3*/folder/a.jsonl + c4", "3*a.jsonl + 1*c4"),
    ],
)
def test_a_text_is_recorded_by_its_name_and_its_share(text: str, recorded: str) -> None:
    once = EvalRequest(text).recorded
    assert once.text == recorded
    assert once.recorded == once


def test_the_other_commands_ask_for_what_was_asked_for(tmp_path: Path) -> None:
    evaluation = encode(EvalRequest("held out.txt", segments=5, seqlen=77).recorded)
    export = encode(ExportRequest("fp16", 64))
    lines = printed(tmp_path, eval=evaluation, onnx=export)
    options = parsed(lines["eval"])
    names = ("text", "text_field", "segments", "seqlen", "device")
    again = _requests.eval_request({name: options[name] for name in names})
    assert encode(again.recorded) == evaluation
    options = parsed(lines["export"])
    assert options["target"] == "onnx"
    assert exporting(options) == {"dtype": "fp16", "max_sequence": 64}


@pytest.mark.parametrize(
    ("request_", "subjects"),
    [
        (BenchRequest(), ["dense", "pruned"]),
        (
            BenchRequest(
                run="mine",
                kinds=("prefill", "open-loop"),
                batches=(1, 8),
                prompts=(32, 128),
                pasts=(64,),
                requests=3,
                rate=0.5,
                threads=1,
            ),
            ["b", "pruned", "dense"],
        ),
        (BenchRequest(run="aa", kinds=("decode",)), ["pruned", "pruned-again"]),
    ],
)
def test_the_benchmark_command_asks_for_what_was_asked_for(
    request_: BenchRequest, subjects: list[str], tmp_path: Path
) -> None:
    recorded = {request_.run: {**encode(request_), "subjects": subjects}}
    options = parsed(printed(tmp_path, bench=recorded)["bench"])
    names = inspect.signature(td.Bundle.bench).parameters.keys() - {
        *("self", "against", "dense", "aa", "allow_different_models", "gate", "overwrite"),
        *("check", "progress"),
    }
    asked = given(options)
    assert _requests.bench_request({name: asked.get(name) for name in names}) == request_
    assert options["aa"] == ("pruned-again" in subjects)
    against = () if options["aa"] else tuple(label for label in subjects if label != "pruned")
    assert options["against"] == against


@pytest.mark.parametrize(
    "request_",
    [
        EngineRequest(),
        EngineRequest(
            "fp32",
            max_sequence=64,
            batch=(1, 4),
            prompt=(16, 32),
            form="conv1x1",
            architectures=("sm80", "sm89"),
        ),
    ],
)
def test_the_engine_command_asks_for_what_was_asked_for(
    request_: EngineRequest, tmp_path: Path
) -> None:
    out = write_bundle(tmp_path / "out")
    add_build(out)
    read = sources.read(Bundle.open(out))
    read.stages["tensorrt-rtx-sm80"].options.update(encode(request_))
    options = parsed(commands.of(read)[-1])
    assert options["target"] == "tensorrt-rtx"
    assert targets.get("tensorrt-rtx").request(read.bundle, exporting(options)) == request_


def test_a_hostile_name_stays_one_word(tmp_path: Path) -> None:
    source = Source("folder", "x; rm -rf ~ $(id)", "", "b1" * 32)
    out = write_bundle(tmp_path / "out", source=source)
    (line, *_) = commands.of(sources.read(Bundle.open(out)))
    assert shlex.split(line)[2] == source.name


def test_every_option_that_is_printed_exists(tmp_path: Path) -> None:
    for line in printed(tmp_path).values():
        name = line.split()[1]
        known = {
            opt
            for parameter in cli.cli.commands[name].params
            if isinstance(parameter, click.Option)
            for opt in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in shlex.split(line) if word.startswith("-")} <= known
