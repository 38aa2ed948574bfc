"""`thanos-deploy bench`: latency and memory of bundles side by side."""

from pathlib import Path
from typing import Any

import click

import thanos_deploy as td
from thanos_deploy.cli._options import (
    benchmark_options,
    bundle_argument,
    common_options,
    emit,
    given,
    progress_callback,
    session,
)
from thanos_deploy.cli._types import several

# In the order in which --help shows them.
_KINDS = ("prefill", "decode", "generate", "open-loop")

_run_options = several(
    click.option(
        "--against",
        multiple=True,
        metavar="OUT2|dense",
        help="Compare with another bundle, or with the dense model that OUT was made from; may be "
        "repeated, and the first one is the baseline.  [default: dense]",
    ),
    click.option(
        "--dense",
        metavar="MODEL",
        help="The dense model; needed only if the cache has no export of it yet.",
    ),
    click.option(
        "--aa",
        is_flag=True,
        help="Measure OUT against itself: every ratio should be 1, and the run is INVALID if an "
        "interval does not contain 1.",
    ),
    click.option(
        "--allow-different-models",
        is_flag=True,
        help="Compare bundles of different base models or tokenizers.",
    ),
    click.option(
        "--run",
        metavar="NAME",
        help="Name of the run and its file.  [default: full; with --aa: aa]",
    ),
    click.option(
        "--scenario",
        type=click.Choice(_KINDS),
        multiple=True,
        help="Scenario to time; may be repeated.  [default: all]",
    ),
)
_load_options = several(
    click.option(
        "--requests",
        type=click.IntRange(min=1),
        help="open-loop: requests in each round.  [default: 4]",
    ),
    click.option(
        "--rate",
        type=click.FloatRange(min=0, min_open=True),
        help="open-loop: requests per second.  [default: half of what the baseline can answer]",
    ),
    click.option(
        "--driver",
        type=click.Choice(["poisson", "loadgen"]),
        help="open-loop: the built-in client, or MLPerf LoadGen (pip install "
        "'thanos-deploy[loadgen]').  [default: poisson]",
    ),
    click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda"]),
        help="Execution provider of ONNX Runtime.  [default: cpu]",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Number of threads on a CPU.  [default: one for each processor]",
    ),
    click.option(
        "--gate",
        metavar="EXPR",
        multiple=True,
        help="A limit, such as 'decode.p50.ratio<0.8' or 'ppl.ratio<1.1'; a missed limit is exit "
        "code 6; may be repeated. The grammar is above.",
    ),
)


@click.command("bench")
@bundle_argument
@_run_options
@benchmark_options
@_load_options
@common_options
def command(out: Path, **options: Any) -> None:
    """Time the bundle OUT beside others, and bring its report up to date.

    Each model runs in a process of its own. The models take turns at every scenario:

    \b
    prefill    a batch of prompts
    decode     steps after a given number of tokens
    generate   a batch of prompts and answers: ttft, inter_token, total, tokens_per_second
    open-loop  requests that arrive at random while others are answered: ttft, request

    A gate is [SCENARIO:]METRIC.STATISTIC[.ratio] or FIGURE[.ratio], then <, <=, > or >=, then a
    number. With .ratio, the value is that of OUT divided by that of the baseline. Times are in
    seconds. If the run is INVALID, its gates on times count as missed.

    \b
    METRIC     prefill, decode, ttft, inter_token, total, tokens_per_second, request
    STATISTIC  p50, p90, p99
    FIGURE     file_bytes, load_peak_bytes, steady_bytes, peak_bytes,
               cache_bytes_per_token, gpu_peak_bytes; and from `eval`: ppl,
               words, choices (shares of right answers), kl, agreement
    """  # noqa: D301 - click wants the control character
    with session(options) as announce:
        from thanos_deploy.cli._tables import show_bench

        run = td.Bundle(out).bench(
            **given(options), check=False, progress=progress_callback(announce)
        )
    emit(options, run, show_bench)
    run.require()
