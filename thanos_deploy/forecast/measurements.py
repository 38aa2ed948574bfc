"""Matrix products that were measured on a GPU, for `plan`: from a file, or the published ones.

A file is either a document of `gpu.records`, which the GPU campaign and `gpu-check` write, or the
table that benchmarks/semi_structured.py writes.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.forecast.datasheets import Datasheet, find
from thanos_deploy.forecast.roofline import Measurement
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.gpu import records as gpu_records
from thanos_deploy.gpu.products import KernelTime, beside_dense
from thanos_deploy.gpu.rows import GemmRow


def read_measurements(path: Path, gpu: Datasheet, dtype: str) -> tuple[Measurement, ...]:
    """Read a file's measured products for one GPU and one dtype.

    Args:
        path: the file.
        gpu: the GPU that the products must have been measured on.
        dtype: the dtype that the products must have, such as "fp16" or "bf16".

    Raises:
        InputError: the file cannot be read, its measurements are not valid, or it has no usable
            product for this GPU and dtype.
    """
    products = list(_read(path))
    times = (one for name, one in products if one.dtype == dtype and _is(gpu, name))
    found = tuple(
        Measurement(
            dense.tokens,
            dense.outputs,
            dense.inputs,
            dense=dense.seconds,
            sparse=math.inf if best is None else best.seconds,
        )
        for dense, best in beside_dense(times)
    )
    positive = (size for known in found for size in (known.m, known.n, known.k, known.dense))
    if not found or min(positive) <= 0:
        there = sorted({f"{name} in {one.dtype}" for name, one in products})
        raise InputError(
            f"{path}: no product with positive sizes and times of {gpu.name} in {dtype}; the file "
            f"has products of {', '.join(there) or 'no GPU'}",
            fix="give the --gpu and --dtype that were measured, or leave --measured out",
        )
    return found


def published_measurements(gpu: Datasheet, dtype: str) -> tuple[Measurement, ...]:
    """Return the products of the newest valid published run on a GPU with a dtype.

    Args:
        gpu: the GPU that the products must have been measured on.
        dtype: the dtype that the products must have, such as "fp16" or "bf16".

    Returns:
        the products; empty if there is no such run.
    """
    for run in gpu_figures.published():
        if _is(gpu, run.card) and not run.reasons:
            found = tuple(
                Measurement(
                    one.tokens, one.outputs, one.inputs, one.dense_seconds, sparse=one.seconds
                )
                for one in run.products
                if one.dtype == dtype
            )
            if found:
                return found
    return ()


def _read(path: Path) -> Iterator[tuple[str, KernelTime]]:
    """The products of a file of either format, each with the name of its GPU."""
    try:
        document = loads(path.read_bytes())
        if "rows" not in document:
            yield from _of_table(document)
            return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a readable table of measured products ({error!r})",
            fix="write the file with `thanos-deploy gpu-check` or `python -m "
            "benchmarks.semi_structured`",
        ) from error
    records = gpu_records.read(path)
    if records.status != "VALID" or records.card is None:
        raise InputError(
            f"{path}: the measurements in this file are {records.status} "
            f"({'; '.join(records.reasons)})",
            fix="measure again on a GPU that no other process uses",
        )
    for row in records.of(GemmRow):
        if row.seconds:
            yield (
                records.card.name,
                KernelTime(row.dtype, row.kernel, row.tokens, row.outputs, row.inputs, row.median),
            )


def _of_table(document: Any) -> Iterator[tuple[str, KernelTime]]:
    """The products of a table of benchmarks/semi_structured.py, or of an old `gpu-check`.

    `gpu-check` wrote such tables before it wrote `gpu.records`.
    """
    table = document.get("steps", {}).get("gemm", document)
    for record in table["records"]:
        if record["seconds"]:
            yield (
                str(table["gpu"]),
                KernelTime(
                    dtype=str(table["dtype"]),
                    kernel=record["kernel"],
                    tokens=int(record["tokens"]),
                    outputs=int(record["outputs"]),
                    inputs=int(record["inputs"]),
                    seconds=median(map(float, record["seconds"])),
                ),
            )


def _is(gpu: Datasheet, name: str) -> bool:
    try:
        return find(name) == gpu
    except UsageError:
        return False
