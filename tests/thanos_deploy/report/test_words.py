from dataclasses import replace
from typing import Any

import pytest

from tests import bundles
from tests.gpu_rows import RECORDS
from thanos_deploy.bundle.codec import decode
from thanos_deploy.gpu import figures as gpu_figures
from thanos_deploy.machine import environment
from thanos_deploy.measure.run import BenchGpu, Run
from thanos_deploy.pruning.result import LayersSummary
from thanos_deploy.report import words
from thanos_deploy.report.model import (
    CutWidths,
    FileBytes,
    LayerMap,
    ModelReport,
    Pair,
    Quality,
    WidthRange,
)

QUALITY = Quality("builtin", 2, 64, (), dense=10.0, pruned=20.0, ratio=2.0)
MODEL = ModelReport(
    label="2:4",
    source=bundles.SOURCE,
    pattern="2:4",
    method="thanos",
    quality=QUALITY,
    graph_quality=None,
    tasks=(),
    linear_layers=LayersSummary(
        pattern_holds=True,
        median_relative_error=0.01,
        worst_relative_error=0.02,
        worst_layer="model.layers.0.mlp.up_proj",
        largest_damping=0.01,
    ),
    layer_map=LayerMap((), (), ()),
    widths=None,
    loaders=(),
    bytes=FileBytes(Pair(100, 100)),
    parts=None,
    export=None,
    bench=(),
    kernels=(),
    sample=None,
    stale=(),
    commands=(),
    seconds={},
    options={},
    environment=environment.describe(),
)


def a_run(*arguments: Any, **changes: Any) -> Run:
    return decode(Run, bundles.run(*arguments, **changes))


@pytest.mark.parametrize(
    ("pattern", "holds", "said", "unsaid"),
    [
        ("2:4", True, "compute capability 8.0", "does not hold"),
        ("2:4", False, "does not hold in every row", "compute capability"),
        ("4:8", True, "No sparse tensor core takes 4:8", "compute capability"),
        ("unstructured:0.5", True, "No sparse tensor core takes unstructured:0.5", "2:4 brings"),
        ("structured:0.3", True, "the matrices keep their shapes", "tensor core"),
    ],
)
def test_the_verdict_promises_sparse_tensor_cores_only_where_they_apply(
    pattern: str, holds: bool, said: str, unsaid: str
) -> None:
    layers = replace(MODEL.linear_layers, pattern_holds=holds)
    model = replace(MODEL, pattern=pattern, linear_layers=layers)
    text = " ".join(words.verdict(model, a_run(factor=0.99, half=0.03)))
    assert said in text
    assert unsaid not in text
    assert (f"{pattern} brings no speed on a CPU" in text) == (pattern != "structured:0.3")
    assert "prefill-1x128 took 0.99x (0.96x to 1.02x)" in text
    assert "from 10.00 to 20.00" in text


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (WidthRange((8,), (6,)), "as whole experts: the files and the memory shrink"),
        (WidthRange((8,), (8,)), "the memory and the work of every block shrink"),
        (None, "the memory and the work of every block shrink"),
    ],
    ids=["experts", "channels of experts", "dense"],
)
def test_experts_that_are_gone_are_not_said_to_spare_work(
    experts: WidthRange | None, said: str
) -> None:
    same, fewer = WidthRange((4,), (4,)), WidthRange((48,), (48 if experts else 32,))
    widths = CutWidths(0.25, True, 400, 300, same, same, fewer, experts)
    model = replace(MODEL, pattern="structured:0.25", widths=widths)
    text = " ".join(words.verdict(model, None))
    assert said in text
    assert ("1.23x as fast" in text) is not widths.drops_experts


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (0.90, "decode-1x128 takes 0.90x (0.88x to 0.92x) the time"),
        (0.99, "decode-1x128 shows no difference (0.97x to 1.01x the time)"),
        (1.10, "decode-1x128 takes 1.10x (1.08x to 1.12x) the time"),
    ],
)
def test_the_headline_claims_a_difference_only_where_the_interval_leaves_one_out(
    factor: float, said: str
) -> None:
    headline = words.headline(MODEL, a_run(factor=factor))
    assert said in headline
    assert headline.startswith("2:4 with thanos: perplexity went from 10.00 to 20.00 (2.00x);")


def test_a_run_that_does_not_count_says_so_wherever_it_is_quoted() -> None:
    run = a_run(status="INVALID", reasons=("the machine moved",))
    assert "that run is INVALID" in words.headline(MODEL, run)
    assert any("INVALID (the machine moved)" in line for line in words.verdict(MODEL, run))


def test_what_was_not_measured_is_not_said_to_be_anything() -> None:
    model = replace(MODEL, quality=None)
    headline = words.headline(model, None)
    assert "the perplexity was not measured" in headline
    assert "latency was not measured" in headline
    # What was measured of the pattern on GPUs is said of another model, and names it.
    own = [line for line in words.verdict(model, None) if "billion parameters" not in line]
    assert not any("Measured" in line or "Perplexity" in line for line in own)


def on_a_gpu(**changes: Any) -> Run:
    """A run on a GPU."""
    gpu = BenchGpu("NVIDIA H100 80GB HBM3", (1e9, 2e9), None, ())
    run = a_run("gpu", factor=0.6, **changes)
    return replace(run, provider="CUDAExecutionProvider", gpu=gpu)


def test_a_report_speaks_of_its_own_run_on_a_gpu_and_not_of_a_lack() -> None:
    on_cpu, on_gpu = a_run(), on_a_gpu()
    model = replace(MODEL, bench=(on_gpu, on_cpu))
    for quoted in (on_cpu, on_gpu):
        text = " ".join(words.verdict(model, quoted))
        assert text.count("CUDAExecutionProvider, on NVIDIA H100 80GB HBM3: prefill-1x128") == 1
        assert "not measured (no GPU)" not in text
    assert "on NVIDIA H100 80GB HBM3, prefill-1x128 takes 0.60x" in words.headline(model, on_gpu)
    assert words.on_gpu(model).startswith("Measured with onnxruntime, CUDAExecutionProvider")
    assert "INVALID" in words.on_gpu(replace(model, bench=(on_a_gpu(status="INVALID"),)))


@pytest.mark.parametrize("published", [True, False])
def test_published_figures_are_quoted_for_the_pattern_and_first_for_the_same_card(
    published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gpu_figures.figures(RECORDS)
    assert found is not None
    same = replace(found, card="NVIDIA H100 80GB HBM3", date="2026-01-01")
    monkeypatch.setattr(gpu_figures, "published", lambda: (found, same) if published else ())
    lack = "On a GPU: not measured (no GPU)."
    said = words.verdict(MODEL, None)
    assert (lack in said) == (not published)
    assert sum("so 2.00x as fast" in sentence for sentence in said) == (2 if published else 0)
    if published:
        here = words.on_gpu(replace(MODEL, bench=(on_a_gpu(),)))
        assert here.index("2026-01-01") < here.index("2026-11-30")
    for pattern in ("4:8", "unstructured:0.5", "structured:0.3"):  # whose zeros are kept
        assert lack not in words.verdict(replace(MODEL, pattern=pattern), None)
