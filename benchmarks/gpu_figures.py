"""Publish the GPU measurements in docs/gpu.md and in the file that the package installs.

Usage: python -m benchmarks.gpu_figures

Reads benchmarks/results/gpu/*.json, and rewrites docs/gpu.md between its two markers and
thanos_deploy/gpu/figures.json. A test fails if either is out of date.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import pages
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.figures import Figures
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import ModelRow, Peaks, PruningRow

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
PAGE = ROOT / "docs" / "gpu.md"
SUMMARY = ROOT / "thanos_deploy" / "gpu" / gpu_figures.FILE

COMMAND = "python -m benchmarks.gpu_figures"


def main() -> None:
    """Rewrite the page and the installed file."""
    runs = gpu_records.read_all(RESULTS)
    pages.rewrite(PAGE, COMMAND, section(runs))
    SUMMARY.write_text(summary(runs), encoding="utf-8")


def summary(runs: Sequence[Records]) -> str:
    """Return the content of the file that the package installs."""
    return gpu_figures.to_json([found for run in runs if (found := gpu_figures.figures(run))])


def section(runs: Sequence[Records]) -> str:
    """Return all runs in Markdown, or a sentence that nothing was measured."""
    parts = ["\n\n".join(_run(run, found)) for run in runs if (found := gpu_figures.figures(run))]
    return "\n\n".join(parts or [f"On a GPU: {NOT_MEASURED}."]) + "\n"


def _run(run: Records, found: Figures) -> Iterator[str]:
    """Yield the GPU and its software, and a table for each kind of figure."""
    card = run.card
    assert card is not None
    versions = ", ".join(
        f"{name} {version}"
        for name, version in (
            ("driver", card.driver),
            ("PyTorch", card.torch),
            ("Triton", card.triton),
            ("transformers", card.transformers),
        )
        if version is not None
    )
    yield f"**{card.name}**, {card.date}, `{card.command}` ({versions}): {run.status}."
    if found.reasons:
        yield "\n".join(f"- {reason}" for reason in found.reasons)
    for peaks in run.of(Peaks):
        yield (
            f"It copied {peaks.copy_bytes_per_second / 1e12:.2f} TB/s and multiplied "
            f"{peaks.gemm_size}^3 in {peaks.gemm_dtype} at "
            f"{peaks.gemm_flops_per_second / 1e12:.0f} TFLOP/s."
        )
    if found.passes:
        yield _table(
            ("model", "pass", "dense, ms", "pruned, ms", "times as fast"),
            (
                (
                    f"{one.model}, {one.dtype}",
                    one.name,
                    f"{1e3 * one.dense_seconds:.2f} ({one.dense_engine})",
                    f"{1e3 * one.seconds:.2f} ({one.engine})",
                    f"{one.speed:.2f}",
                )
                for one in found.passes
            ),
        )
    if held := _memory(run):
        yield _table(("model", "engine", "most memory, GB"), held)
    if found.products:
        yield _table(
            ("2:4 weight", "tokens", "dense, us", "fastest 2:4, us", "times as fast"),
            (
                (
                    f"{one.outputs} x {one.inputs}, {one.dtype}",
                    str(one.tokens),
                    f"{1e6 * one.dense_seconds:.1f}",
                    f"{1e6 * one.seconds:.1f} ({one.kernel})",
                    f"{one.speed:.2f}",
                )
                for one in found.products
            ),
        )
    if pruned := [row for row in run.of(PruningRow) if row.seconds is not None]:
        yield _table(
            ("layer", "pruned to", "method", "seconds"),
            (
                (
                    f"{row.outputs} x {row.inputs}",
                    row.pattern,
                    f"{row.method}, {row.preset}",
                    f"{row.seconds:.2f}",
                )
                for row in pruned
            ),
        )


def _memory(run: Records) -> list[tuple[str, str, str]]:
    """Return the peak memory of each model and engine over all passes."""
    most: dict[tuple[str, str], int] = {}
    for row in run.of(ModelRow):
        if row.memory_bytes is not None:
            key = (f"{row.model}, {row.dtype}", row.engine)
            most[key] = max(row.memory_bytes, most.get(key, 0))
    return [(*key, f"{held / 1e9:.1f}") for key, held in most.items()]


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
