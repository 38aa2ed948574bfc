"""The implementation of `Bundle.bench`, from the options to the outcomes of the gates."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from thanos_deploy.api import _requests
from thanos_deploy.api.options import ModelLike, Progress
from thanos_deploy.bundle import layout, manifest
from thanos_deploy.errors import UsageError
from thanos_deploy.measure import gates as limits
from thanos_deploy.measure.gates import JudgedRun
from thanos_deploy.measure.run import DENSE, PRUNED
from thanos_deploy.report.write import write_report
from thanos_deploy.stages import bench as stage
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.evaluate import qualities

# Defaults with which comparing a model of 135 million parameters with another one takes less than
# five minutes on 2 cores.
_PROMPTS, _PASTS = (32, 128), (128, 512)


def bench(
    out: Path,
    *,
    against: Sequence[str],
    dense: ModelLike | None,
    aa: bool,
    different_models: bool,
    gates: Sequence[str],
    request: Mapping[str, Any],
    overwrite: bool,
    progress: Progress | None,
) -> JudgedRun:
    """Implement `Bundle.bench`; `request` holds its options that say what to time."""
    if aa and (against or dense is not None):
        raise UsageError(
            "--aa with --against or --dense: --aa compares OUT with itself",
            fix="leave --aa out, or the other option",
        )
    wanted = [limits.parse(text) for text in gates]
    asked = _requests.bench_request(
        request, run="aa" if aa else "full", prompts=_PROMPTS, pasts=_PASTS
    )
    limits.check(wanted, asked.scenarios)
    source = Dense(_requests.model(dense)) if dense is not None else None
    announce = _requests.announce(progress)
    with ExitStack() as stack:
        bundle = manifest.Bundle.open(out)  # because `claim` would create a missing bundle
        bundle = stack.enter_context(
            manifest.claim(out, source.source if source else bundle.source)
        )
        bundle.require(layout.ONNX, f"`thanos-deploy export {out} --target onnx`")
        asked.check(stage.max_sequence(bundle))
        if any(gate.name in limits.QUALITIES for gate in wanted):
            bundle.require(layout.EVAL, f"`thanos-deploy eval {out} --dense MODEL`")
        subjects = (
            {PRUNED: bundle, f"{PRUNED}-again": bundle}
            if aa
            else stage.compared(
                bundle,
                against or (DENSE,),
                source,
                different_models=different_models,
                announce=announce,
            )
        )
        run = stage.bench(bundle, subjects, asked, overwrite=overwrite, announce=announce)
        if layout.PRUNE in bundle.stages:
            write_report(bundle)
        outcomes = limits.judge(wanted, run, subject=PRUNED, quality=qualities(bundle, subjects))
    return JudgedRun.of(run, outcomes)
