"""Measure how processor time and memory of pruning a square layer grow with its width.

Usage: python -m benchmarks.layer_cost [--widths 512 1024 2048 4096] [--pattern 2:4]
           [-o benchmarks/results/layer_cost]

The layer has as many outputs as inputs, and correlated random activations. The settings are those
of `--preset best`. Each layer is pruned in a process of its own, because peak memory is counted per
process. The exponent is the slope of log time over log width. The exponent between the last two
widths is printed as well, because constant costs dominate in small layers. Writes OUT.json and
OUT.svg.
"""

import argparse
import math
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from thanos_deploy import methods, pattern
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.machine import environment
from thanos_deploy.solver.layer import LayerProblem


def main() -> None:
    """Measure all methods and widths, print the results, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--pattern", type=pattern.parse, default="2:4")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/layer_cost"))
    arguments = parser.parse_args()

    records = []
    for name in methods.names():
        for width in sorted(arguments.widths):
            # "spawn", because a forked process would start with its parent's memory.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                record = pool.apply(measure, (name, width, str(arguments.pattern)))
            records.append(record)
            print(
                f"{name:10s} {width:5d}  {record['processor_seconds']:8.2f} s of processor "
                f"time  + {record['memory_bytes'] / 1e6:6.0f} MB",
                flush=True,
            )
    slopes = {name: slope([r for r in records if r["method"] == name]) for name in methods.names()}
    for name, (whole, last) in slopes.items():
        print(f"{name:10s} processor time grows like width^{whole:.2f}, in the end ^{last:.2f}")
    out = arguments.out
    files.write_json(
        out.with_suffix(".json"),
        {
            "pattern": str(arguments.pattern),
            "records": records,
            "exponents": {name: whole for name, (whole, _) in slopes.items()},
            "exponents_of_the_last_doubling": {name: last for name, (_, last) in slopes.items()},
            "environment": encode(environment.describe()),
        },
    )
    draw(records, slopes).savefig(out.with_suffix(".svg"), metadata={"Date": None})


def measure(name: str, width: int, spelled: str) -> Json:
    """Prune one layer; its memory is the growth of the process up to the peak."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator) / math.sqrt(width)
    problem = LayerProblem(weight, torch.zeros(width, width), f"{width} inputs")
    few = width // 8
    mix = torch.randn(few, width, generator=generator) / math.sqrt(few)
    for _ in range(16):  # few tokens at a time, so that the method determines the peak memory
        # A few directions and noise, as in activations.
        x = torch.randn(few, few, generator=generator) @ mix
        x += 0.3 * torch.randn(few, width, generator=generator)
        problem.hessian.addmm_(x.T, x)
    method = methods.load(name)
    before = environment.resident_memory_bytes() or 0
    started = time.process_time()
    result = method.prune(problem, pattern.parse(spelled), method.preset("best").options)
    return {
        "method": name,
        "width": width,
        "processor_seconds": time.process_time() - started,
        "memory_bytes": max(0, environment.peak_memory_bytes() - before),
        "relative_error": result.relative_error,
    }


def slope(records: list[Json]) -> tuple[float, float]:
    """Return the exponent over all widths, by least squares, and over the last two."""
    points = [(math.log(r["width"]), math.log(r["processor_seconds"])) for r in records]
    return tuple(  # type: ignore[return-value]  # two of them
        statistics.linear_regression(*zip(*some, strict=True)).slope
        for some in (points, points[-2:])
    )


def draw(records: list[Json], slopes: dict[str, tuple[float, float]]) -> Figure:
    """Plot processor time and memory over width on logarithmic axes, with a line for width^3."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, (whole, _) in slopes.items():
        of_method = [r for r in records if r["method"] == name]
        widths = [r["width"] for r in of_method]
        times = [r["processor_seconds"] for r in of_method]
        time_axes.plot(widths, times, "o-", label=f"{name}: width^{whole:.2f}")
        memory_axes.plot(widths, [r["memory_bytes"] / 1e6 for r in of_method], "o-", label=name)
    widths, top = (
        sorted({r["width"] for r in records}),
        max(r["processor_seconds"] for r in records),
    )
    cubes = [top * (width / widths[-1]) ** 3 for width in widths]
    time_axes.plot(widths, cubes, ":", color="grey", label="width^3")
    for axes, label in ((time_axes, "processor time, s"), (memory_axes, "memory, MB")):
        axes.set(xlabel="inputs and outputs", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(widths, [str(width) for width in widths], minor=False)
        axes.minorticks_off()
        axes.legend()
    return figure


if __name__ == "__main__":
    main()
