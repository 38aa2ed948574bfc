"""Summarise a run on a page or two, for a terminal that keeps only the end."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import inf

from thanos_deploy.gpu.records import Records
from thanos_deploy.gpu.rows import (
    CheckRow,
    GemmRow,
    HessianRow,
    KernelRow,
    ModelRow,
    Peaks,
    PruningRow,
    StepRow,
    WalkRow,
)
from thanos_deploy.gpu_check.kernels import speeds

# A remote run returns the last 12,000 characters, and an error may follow the summary.
MOST_CHARACTERS = 11_500

# Most characters of a text from elsewhere, such as an error of a library.
_MOST_OF_A_TEXT = 110

_MOST_FAILURES = 12


def of(records: Records) -> str:
    """Return the summary; if it is too long, its end is replaced by a note."""
    parts = (_card, _steps, _failures, _models, _gemm, _pruning, _kernels)
    text = "\n\n".join("\n".join(found) for part in parts if (found := list(part(records))))
    if len(text) < MOST_CHARACTERS:
        return text + "\n"
    end = "\n... the rest is in records.json\n"
    return text[: MOST_CHARACTERS - len(end)] + end


def _short(text: str) -> str:
    return text if len(text) <= _MOST_OF_A_TEXT else text[: _MOST_OF_A_TEXT - 3] + "..."


def _card(records: Records) -> Iterator[str]:
    yield f"TIMES {records.status}"
    yield from (f"  {_short(reason)}" for reason in records.reasons)
    if card := records.card:
        yield (
            f"{card.name}, compute capability {card.capability[0]}.{card.capability[1]}, "
            f"{card.memory_bytes / 1e9:.0f} GB, driver {card.driver} (CUDA {card.driver_cuda}), "
            f"torch {card.torch}, triton {card.triton}, transformers {card.transformers}"
        )
    for peaks in records.of(Peaks):
        yield (
            f"copy {peaks.copy_bytes_per_second / 1e12:.3g} TB/s; {peaks.gemm_dtype} product of "
            f"{peaks.gemm_size}^3 {peaks.gemm_flops_per_second / 1e12:.3g} TFLOP/s"
        )


def _steps(records: Records) -> Iterator[str]:
    for row in records.of(StepRow):
        clocks = row.clocks_hz
        told = f", {clocks[0] / 1e9:.2f} to {clocks[1] / 1e9:.2f} GHz" if clocks else ""
        slow = f", clock lowered: {', '.join(row.throttle_reasons)}" if row.throttle_reasons else ""
        yield f"{row.outcome} {row.step:28s} {row.seconds:6.1f} s  {_short(row.detail)}{told}{slow}"


def _failures(records: Records) -> Iterator[str]:
    failed = [row for row in records.of(CheckRow) if row.outcome == "FAIL"]
    for row in failed[:_MOST_FAILURES]:
        yield f"FAIL {row.step}, {row.name}: {_short(row.detail)}"
    if len(failed) > _MOST_FAILURES:
        yield f"... and {len(failed) - _MOST_FAILURES} more"


def _models(records: Records) -> Iterator[str]:
    """Yield a line for each model and engine, with milliseconds and speed-up of each pass."""
    rows = records.of(ModelRow)
    if not rows:
        return
    passes = list(dict.fromkeys((row.phase, row.batch, row.tokens) for row in rows))
    dense: dict[tuple[str, int, int], float] = {}
    for row in rows:
        if row.model == "dense" and row.seconds:
            key = (row.phase, row.batch, row.tokens)
            dense[key] = min(row.median, dense.get(key, inf))
    titles = (f"{phase} {batch}x{tokens}" for phase, batch, tokens in passes)
    yield f"{'MODEL, ms (speed over dense)':34s}" + "".join(f"{title:>19s}" for title in titles)
    for (model, engine), group in groupby(rows, lambda row: (row.model, row.engine)):
        found = {(row.phase, row.batch, row.tokens): row for row in group}
        cells = []
        for key in passes:
            cell = found.get(key)
            if cell is None or cell.seconds is None:
                cells.append("-")
            else:
                speed = f" ({dense[key] / cell.median:.2f}x)" if key in dense else ""
                cells.append(f"{cell.median * 1e3:.2f}{speed}")
        held = max((row.memory_bytes or 0 for row in found.values()), default=0)
        yield (
            f"{f'{model} {engine}':34s}"
            + "".join(f"{cell:>19s}" for cell in cells)
            + (f"  {held / 1e9:.1f} GB" if held else "")
        )
        for reason in dict.fromkeys(row.reason for row in found.values() if row.reason):
            yield f"  not timed: {_short(reason)}"


def _gemm(records: Records) -> Iterator[str]:
    """Yield a line for each product, with the speed-up of each kernel over dense."""
    rows = records.of(GemmRow)
    kernels = [k for k in dict.fromkeys(row.kernel for row in rows) if k != "dense"]
    if not rows:
        return
    ratio = {
        (row.dtype, row.outputs, row.inputs, row.tokens, row.kernel): speed
        for row, speed in speeds(rows).items()
    }
    yield f"{'GEMM, speed over dense':34s}{'dense us':>10s}" + "".join(f"{k:>18s}" for k in kernels)
    for row in rows:
        if row.kernel == "dense":
            size = (row.dtype, row.outputs, row.inputs, row.tokens)
            cells = (
                f"{ratio[(*size, kernel)]:.2f}x" if (*size, kernel) in ratio else "-"
                for kernel in kernels
            )
            yield (
                f"{f'{row.dtype} {row.outputs}x{row.inputs}, {row.tokens} tokens':34s}"
                f"{row.median * 1e6:10.1f}" + "".join(f"{cell:>18s}" for cell in cells)
            )
    yield from _reasons(rows)


def _reasons(rows: Sequence[GemmRow]) -> Iterator[str]:
    for kernel, reason in dict.fromkeys((row.kernel, row.reason) for row in rows if row.reason):
        yield f"  {kernel} not timed: {_short(reason or '')}"


def _pruning(records: Records) -> Iterator[str]:
    for row in records.of(PruningRow):
        took = "failed" if row.seconds is None else f"{row.seconds:.2f} s"
        loss = "" if row.loss is None else f", loss {row.loss:.3f}"
        yield f"{row.method} {row.pattern}, {row.preset}: {row.outputs}x{row.inputs} {took}{loss}"
    for found in records.of(HessianRow):
        yield f"Hessian of {found.inputs}, {found.tokens} tokens: {found.seconds:.2f} s"
    for check in records.of(CheckRow):
        if check.step.startswith(("pruning", "walk:")) and check.outcome == "PASS":
            yield f"{check.step}, {check.name}: {check.detail}"
    for block in records.of(WalkRow):
        parts = ", ".join(f"{part} {spent:.2f}" for part, spent in block.seconds.items())
        held = f"; {block.memory_bytes / 1e9:.1f} GB" if block.memory_bytes else ""
        yield (
            f"{block.method} {block.pattern}, {block.preset}: block {block.block} of "
            f"{block.hidden} and {block.channels}, {block.tokens} tokens: "
            f"{sum(block.seconds.values()):.2f} s ({parts}){held}, "
            f"host {block.host_bytes / 1e9:.1f} GB"
        )


def _kernels(records: Records) -> Iterator[str]:
    """Yield a line for each kernel and dtype, with the largest error."""
    rows = records.of(KernelRow)
    for kernel, dtype in dict.fromkeys((row.kernel, row.dtype) for row in rows):
        own = [row for row in rows if (row.kernel, row.dtype) == (kernel, dtype)]
        errors = [row.error for row in own if row.error is not None]
        told = f"error at most {max(errors):.1e}" if errors else _short(str(own[0].reason))
        bad = sum(row.outcome == "FAIL" for row in own)
        yield f"{kernel}, {dtype}: {len(errors)} products, {bad} wrong; {told}"
