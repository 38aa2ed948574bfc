"""Tables and sentences that show a forecast in a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from thanos_deploy.forecast.forecast import DENSE, Forecast, Seconds, is_two_of_four
from thanos_deploy.forecast.roofline import Layer
from thanos_deploy.model.families import HEAD
from thanos_deploy.pattern import parse
from thanos_deploy.pruning.budget import joined


def show_forecast(forecast: Forecast, *, layers: bool) -> None:
    """Print a forecast and its verdict, and the time of every layer if `layers` is true."""
    console = Console()
    names = list(forecast.block_parameters)
    title = (
        f"{forecast.gpu.product}, {forecast.dtype}, prompt {forecast.prompt}, "
        f"{forecast.new_tokens} new tokens: forecast, ms"
    )
    table = Table(title=title)
    for name in ("batch", "", *names):
        table.add_column(name, justify="right")
    for step in forecast.passes:
        for phase, times in step.seconds.items():
            dense = times[DENSE].likely
            table.add_row(
                str(step.batch),
                "decode, per token" if phase == "decode" else phase,
                *(_forecast_cell(times[name], dense) for name in names),
            )
        memory = (
            f"{step.memory_bytes[name] / 1e9:.1f}" + ("" if step.fits[name] else " too much")
            for name in names
        )
        table.add_row(str(step.batch), "memory, GB", *memory, end_section=True)
    console.print(table)
    if layers:
        for step in forecast.passes:
            for phase, found in step.layers.items():
                console.print(_layer_table(f"{phase}, batch {step.batch}, ms", found))
    for name in names:
        if name != DENSE and is_two_of_four(parse(name)):
            console.print(_savings_table(forecast, name))
    for sentence in (*forecast.verdict, *forecast.measured):
        console.print(f"• {sentence}", highlight=False, markup=False)
    if forecast.pruning:
        _show_pruning(console, forecast)
    origin = f"Roofline from the figures in {forecast.gpu.source}"
    if count := forecast.measured_products:
        origin += f"; {count} measured matrix products replace it for layers of similar size"
    console.print(
        f"{origin}. Speeds of 2:4 are the likely ones, with the best possible ones in "
        "parentheses; benchmarks/LOG.md compares such forecasts with published times.",
        style="dim",
        highlight=False,
    )


def _show_pruning(console: Console, forecast: Forecast) -> None:
    first = forecast.pruning[0]
    table = Table(
        title=f"Pruning to 2:4 on {first.gpus} x {forecast.gpu.product}, {first.nsamples} segments "
        f"of {first.seqlen} tokens: forecast"
    )
    for name in ("preset", "minutes", *first.seconds, "GPU, GB", "host, GB"):
        table.add_column(name, justify="right")
    for one in forecast.pruning:
        table.add_row(
            one.preset,
            f"{one.total_seconds / 60:.1f}",
            *(f"{seconds:.0f} s" for seconds in one.seconds.values()),
            f"{one.device_bytes / 1e9:.1f}" + ("" if one.fits else " too much"),
            f"{one.host_bytes / 1e9:.1f}",
        )
    console.print(table)
    for one in forecast.pruning:
        console.print(f"• {one.preset}: {one.basis}.", highlight=False, markup=False)


def _forecast_cell(time: Seconds | Layer, dense: float) -> str:
    cell = f"{time.likely * 1e3:.2f}"
    if time.likely != dense:
        cell += f", {dense / time.likely:.2f}x"
    if time.best < time.likely:
        cell += f" ({dense / time.best:.2f}x)"
    return cell


def _savings_table(forecast: Forecast, name: str) -> Table:
    """Return the time that pruning each group of layers saves in each pass, over all blocks.

    A group is the layers that read the same input.
    """
    passes = {
        f"{phase}, batch {step.batch}": found
        for step in forecast.passes
        for phase, found in step.layers.items()
    }
    table = Table(
        title=f"Time that pruning each kind of layer to {name} saves, in ms (and as a share of the "
        "pass)"
    )
    table.add_column("layers")
    for title in passes:
        table.add_column(title, justify="right")
    saved: dict[str, list[str]] = {}
    for found in passes.values():
        whole = sum(layer.likely for layer in found[DENSE])
        gains: dict[str, float] = {}
        for before, after in zip(found[DENSE], found[name], strict=True):
            if before.shape is not None and before.name != HEAD:
                gain = before.likely - after.likely
                gains[before.name] = gains.get(before.name, 0.0) + gain
        for layers, gain in gains.items():
            said = f"{gain * 1e3:.3f} ({gain / whole:.1%})" if gain > 0.0 else "nothing"
            saved.setdefault(layers, []).append(said)
    for layers, cells in saved.items():
        table.add_row(joined(layers.split(" + ")), *cells)
    return table


def _layer_table(title: str, found: Mapping[str, Sequence[Layer]]) -> Table:
    names = list(found)
    table = Table(title=title)
    for name in ("layer", "dense m x n x k", "bound by", *names):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for rows in zip(*found.values(), strict=True):
        first = rows[0]
        table.add_row(
            f"{first.name} ({first.times})",
            "" if first.shape is None else " x ".join(map(str, first.shape)),
            f"{first.bound}, measured" if first.measured else first.bound,
            *(_forecast_cell(row, first.likely) for row in rows),
        )
    return table
