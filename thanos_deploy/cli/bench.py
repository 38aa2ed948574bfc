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
    session,
    told,
)
from thanos_deploy.cli._types import several

# In the order in which they are shown.
_KINDS = ("prefill", "decode", "generate", "open-loop")

_run_options = several(
    click.option(
        "--against",
        multiple=True,
        metavar="OUT2|dense",
        help="What to compare with: another bundle, or the dense model that OUT was made from; may "
        "be given often, the first is the baseline.  [default: dense]",
    ),
    click.option(
        "--dense",
        metavar="MODEL",
        help="The dense model, where the cache has no export of it yet.",
    ),
    click.option(
        "--aa",
        is_flag=True,
        help="Measure OUT against itself: the ratios should be 1, and the run is INVALID if one's "
        "interval says otherwise.",
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
        help="What to time; may be given often.  [default: all]",
    ),
)
_load_options = several(
    click.option(
        "--requests", type=click.IntRange(min=1), help="open-loop: in each round.  [default: 4]"
    ),
    click.option(
        "--rate",
        type=click.FloatRange(min=0, min_open=True),
        help="open-loop: requests a second.  [default: half of what the baseline can take]",
    ),
    click.option(
        "--driver",
        type=click.Choice(["poisson", "loadgen"]),
        help="open-loop: our own client, or MLPerf LoadGen (pip install "
        "'thanos-deploy[loadgen]').  [default: poisson]",
    ),
    click.option(
        "--provider", type=click.Choice(["cpu", "cuda"]), help="What to run on.  [default: cpu]"
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="That compute on a CPU.  [default: one for each processor]",
    ),
    click.option(
        "--gate",
        metavar="EXPR",
        multiple=True,
        help="A limit, like 'decode.p50.ratio<0.8' or 'ppl.ratio<1.1'; exit code 6 when it is "
        "missed; may be given often. See above.",
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

    Each model runs in a fresh process; they take turns at every scenario, round by round:

    \b
    prefill    a batch of prompts
    decode     steps after a given past
    generate   a batch of prompts and answers: ttft, inter_token, total, tokens_per_second
    open-loop  requests that arrive at random while others are answered: ttft, request

    A gate is [SCENARIO:]METRIC.STATISTIC[.ratio] or FIGURE[.ratio], then <, <=, > or >=, then a
    number; .ratio is OUT over the baseline. Times are in seconds. A gate on times is missed where
    the run is INVALID.

    \b
    METRIC     prefill, decode, ttft, inter_token, total, tokens_per_second, request
    STATISTIC  p50, p90, p99
    FIGURE     file_bytes, load_peak_bytes, steady_bytes, peak_bytes,
               cache_bytes_per_token, gpu_peak_bytes, ppl (needs `eval`)
    """  # noqa: D301 - click wants the control character
    with session(options) as announce:
        from thanos_deploy.cli._tables import show_bench

        run = td.Bundle(out).bench(**given(options), check=False, progress=told(announce))
    emit(options, run, show_bench)
    run.require()
