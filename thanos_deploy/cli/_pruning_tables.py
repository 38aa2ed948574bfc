"""What a person at a terminal sees of pruning: what was done, or what a dry run would do."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isnan
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from thanos_deploy.bundle.codec import encode
from thanos_deploy.cli._choices import show_choices
from thanos_deploy.cli._tables import show_notice, show_values
from thanos_deploy.pruning.result import (
    PartBytes,
    PruneResult,
    Quantisation,
    Recovery,
    Retry,
    WidthsSummary,
)
from thanos_deploy.report.words import retried

if TYPE_CHECKING:
    from thanos_deploy.stages.plan import DryRun


def show_pruned(result: PruneResult) -> None:
    """Print what was pruned; of a shrunk model with the widths of its blocks."""
    if result.choices is not None:
        show_choices(result.choices)
    if result.widths is not None:
        _show_widths(result.widths)
    show_values(dict(_of_pruned(result)))
    _show_retries(result.retries or ())
    if result.quantisation is not None:
        for name, why in result.quantisation.rounded.items():
            show_notice(f"{name} was rounded without compensation: {why}.")


def _of_pruned(result: PruneResult) -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which they are printed."""
    if result.layers is not None and result.weights is not None:
        yield "linear layers", f"{result.layers}, with {result.weights:,} weights"
    if result.sparsity is not None:
        yield "zeros in linear layers", f"{result.sparsity:.2%}"
    if result.patterns:
        yield "layers by pattern", _listed(result.patterns)
    if result.layers_left_dense:
        yield "layers left dense", ", ".join(result.layers_left_dense)
    if result.pattern_holds is not None:
        off = ", ".join(result.layers_off_pattern or ())
        yield "pattern holds", "yes" if result.pattern_holds else f"no: {off}"
    if result.widths is not None:
        yield from _of_widths(result.widths).items()
    worst = f"{result.worst_relative_error:.2e} ({result.worst_layer})"
    yield "relative error of layers, median", f"{result.median_relative_error:.2e}"
    yield "relative error of layers, worst", worst
    yield "largest damping", f"{result.largest_damping:g}"
    if result.tune_segments:
        yield "segments that blocks were tuned on", f"{result.tune_segments:,}"
    if result.recovery is not None:
        yield from _of_recovery(result.recovery)
    if result.quantisation is not None:
        yield from _of_quantisation(result.quantisation).items()
    yield "segments begin with", " ".join(result.frame.tokens) or "no special token"
    if result.parts is not None:
        yield from _of_parts(result.parts)
    seconds = {
        "survey": result.survey_seconds or 0.0,
        "collect": result.collect_seconds,
        "solve": result.solve_seconds,
        "tune": result.tune_seconds,
        "forward": result.forward_seconds,
        "journal": result.journal_seconds,
    }
    if any(seconds.values()):
        spent = (f"{name} {number:.1f}" for name, number in seconds.items() if number)
        yield "seconds", ", ".join(spent)
    if result.device is not None:
        yield "device", result.device
    if result.peak_memory_bytes is not None:
        yield "peak memory, MB", f"{result.peak_memory_bytes / 1e6:,.0f}"


def _of_parts(parts: PartBytes) -> Iterator[tuple[str, str]]:
    """Sizes of the two models, in all and by part."""
    whole = sum(parts.dense.values()), sum(parts.pruned.values())
    sizes = {"weights": whole} | {
        f"  {name}": (parts.dense[name], pruned) for name, pruned in parts.pruned.items()
    }
    for name, (dense, pruned) in sizes.items():
        if dense:
            yield f"{name}, MB", f"{pruned / 1e6:,.1f} (dense: {dense / 1e6:,.1f})"


def _of_recovery(recovery: Recovery) -> Iterator[tuple[str, str]]:
    yield "trained on", f"{recovery.tokens:,} tokens in {recovery.dtype}, {recovery.seconds:.0f} s"
    if recovery.divergence:
        first, last = recovery.divergence[0], recovery.divergence[-1]
        yield "divergence from the dense model", f"from {first:.3f} to {last:.3f} nats per token"
    if recovery.drawn is not None:
        yield "texts that the dense model wrote", f"{recovery.drawn:,}, dropped ones included"


def _listed(patterns: Mapping[str, int]) -> str:
    return ", ".join(f"{pattern}: {layers}" for pattern, layers in patterns.items())


def show_plan(plan: "DryRun") -> None:
    """Print what would be pruned; for a shrunk model with the widths of its blocks."""
    estimate = plan.estimate
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in estimate.seconds.items())
    values = encode(replace(plan, widths=None, choices=None)) | {
        "estimated seconds": f"{estimate.total_seconds:.0f} ({parts})",
        "not estimated": list(estimate.not_estimated),
        "estimated memory, MB": f"{estimate.memory_bytes / 1e6:.0f}",
        **{
            f"{where} memory, MB": ", ".join(
                f"{term.name} {term.bytes / 1e6:.0f}" for term in terms
            )
            for where, terms in (("host", estimate.memory.host), ("GPU", estimate.memory.device))
            if terms
        },
        "estimated from": estimate.basis,
    }
    del values["estimate"]
    if plan.choices is not None:
        show_choices(plan.choices)
    if plan.widths is not None:
        _show_widths(plan.widths)
        values |= _of_widths(plan.widths)
    show_values(values)


def _show_widths(widths: WidthsSummary) -> None:
    table = Table(title="What stays of each block")
    routed = any(block.before.experts for block in widths.blocks)
    parts = ["heads", "kv heads", "channels", *(["experts"] if routed else [])]
    for name in ("block", *parts, "parameters", "predicted loss"):
        table.add_column(name, justify="right")
    for index, block in enumerate(widths.blocks):
        before, after = block.before, block.after
        if after.dropped:
            loss = f"{block.predicted_loss:.4f}"
            table.add_row(str(index), *["none"] * len(parts), "dropped", loss)
            continue
        table.add_row(
            str(index),
            f"{after.heads} of {before.heads}",
            f"{after.kv_heads} of {before.kv_heads}",
            f"{after.channels} of {before.channels}",
            *([f"{after.experts} of {before.experts}"] if routed else []),
            f"{block.parameters_after:,} of {block.parameters_before:,}",
            "not measured" if isnan(block.predicted_loss) else f"{block.predicted_loss:.4f}",
        )
    Console().print(table)


def _of_widths(widths: WidthsSummary) -> dict[str, str]:
    return {
        "removed of the blocks": f"{widths.removed:.2%}",
        "loads with stock loaders": "yes" if widths.stock_config else "no, ONNX only",
    }


def _of_quantisation(quantisation: Quantisation) -> dict[str, str]:
    values = {"quantised to": quantisation.grid}
    if quantisation.median_relative_error is not None:
        values["lost of a layer's output, median"] = (
            f"{quantisation.median_relative_error:.2e}; "
            f"by rounding {quantisation.median_rounding_error:.2e}"
        )
    if (tuned := quantisation.tuned) is not None:
        values["lost of a quantised block's output, median"] = (
            f"{tuned.median_error:.2e}; {tuned.median_error_before:.2e} before tuning, which made "
            f"{tuned.better} of {tuned.blocks} blocks better"
        )
    if (trained := quantisation.trained) is not None:
        values["scales trained, nats per token"] = (
            f"{trained.divergence[0]:.4f} to {trained.divergence[-1]:.4f} from the dense model"
        )
    return values


def _show_retries(retries: Sequence[Retry]) -> None:
    for retry in retries:
        show_notice(f"{retried(retry)}.")
