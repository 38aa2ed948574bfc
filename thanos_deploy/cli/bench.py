"""`thanos-deploy bench`: latency and memory of bundles side by side."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from thanos_deploy.cli._options import (
    bench_request,
    benchmark_options,
    bundle_argument,
    common_options,
    emit,
    session,
)
from thanos_deploy.cli._types import several
from thanos_deploy.errors import GateError, UsageError

# In the order in which they are shown.
_KINDS = ("prefill", "decode", "generate", "open-loop")

# What takes less than five minutes on 2 cores for a model of 135 million parameters and another.
_DEFAULTS: dict[str, Any] = {
    "kinds": _KINDS,
    "prompts": (32, 128),
    "pasts": (128, 512),
    "rounds": 10,
}

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
        "kinds",
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
        "gates",
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
def command(
    out: Path,
    dense: str | None,
    against: tuple[str, ...],
    aa: bool,
    allow_different_models: bool,
    gates: tuple[str, ...],
    **options: Any,
) -> None:
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
    if aa and (against or dense):
        raise UsageError(
            "--aa with --against or --dense: it compares OUT with itself", fix="leave one out"
        )
    with session(options) as announce, ExitStack() as stack:
        from thanos_deploy.bundle import layout, manifest
        from thanos_deploy.cli._tables import show_bench
        from thanos_deploy.measure import gates as limits
        from thanos_deploy.measure.run import DENSE, PRUNED
        from thanos_deploy.report.write import write_report
        from thanos_deploy.stages import bench as stage
        from thanos_deploy.stages.dense import Dense
        from thanos_deploy.stages.evaluate import perplexities

        wanted = [limits.parse(text) for text in gates]
        request = bench_request(options, **_DEFAULTS, run="aa" if aa else "full")
        limits.check(wanted, request.scenarios)
        source = Dense(dense) if dense else None
        bundle = manifest.Bundle.open(out)  # claiming would create one
        bundle = stack.enter_context(
            manifest.claim(out, source.source if source else bundle.source)
        )
        bundle.require(layout.ONNX, f"`thanos-deploy export {out} --target onnx`")
        request.check(stage.max_sequence(bundle))
        if any(gate.name == limits.PERPLEXITY for gate in wanted):
            bundle.require(layout.EVAL, f"`thanos-deploy eval {out} --dense MODEL`")
        subjects = (
            {PRUNED: bundle, f"{PRUNED}-again": bundle}
            if aa
            else stage.compared(
                bundle,
                against or (DENSE,),
                source,
                different_models=allow_different_models,
                announce=announce,
            )
        )
        run = stage.bench(
            bundle, subjects, request, overwrite=options["overwrite"], announce=announce
        )
        if layout.PRUNE in bundle.stages:
            write_report(bundle)
        outcomes = limits.judge(
            wanted,
            run,
            subject=PRUNED,
            perplexity=perplexities(bundle, subjects),
        )
    emit(options, limits.JudgedRun.of(run, outcomes), show_bench)
    if not all(outcome.held for outcome in outcomes):
        raise GateError(
            "a gate was missed: " + "; ".join(map(str, outcomes)),
            fix="see above for what was measured; a run that is INVALID can be repeated with "
            "--overwrite",
        )
