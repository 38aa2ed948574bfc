import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks import semi_structured
from benchmarks.semi_structured import line
from runtime.kernels import linears
from runtime.kernels.timing import (
    DTYPES,
    KERNELS,
    GemmTime,
    limit,
    measure,
    product_in_float64,
    random_two_four,
    replayed,
    rotation,
)
from tests.runtime.kernels.oracle import inputs
from thanos_deploy.errors import PlatformError
from thanos_deploy.model.packing import pack
from thanos_deploy.pattern import SemiStructured

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(PlatformError, match="no GPU"):
        next(measure())


@pytest.mark.slow
@no_gpu
def test_without_a_gpu_the_benchmark_says_so_and_exits_4(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.semi_structured", "-o", tmp_path / "records.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weights_that_are_timed_are_two_four_and_half_full(dtype: str) -> None:
    weight = random_two_four(32, 64, DTYPES[dtype])
    pack(weight, SemiStructured(2, 4))
    assert int((weight != 0).sum()) == weight.numel() // 2
    assert random_two_four(32, 64, DTYPES[dtype]).equal(weight)
    assert not random_two_four(32, 64, DTYPES[dtype], seed=1).equal(weight)


def test_every_pair_of_columns_is_kept_as_often_as_the_others() -> None:
    kept = (random_two_four(100, 240, torch.float16) != 0).reshape(-1, 4)
    counts = (kept * torch.tensor([1, 2, 4, 8])).sum(dim=1).bincount()
    # 6000 groups, 1000 expected of each pair, with a standard deviation of 29.
    assert int((counts > 0).sum()) == 6
    assert (counts[counts > 0] - 1000).abs().max() < 150


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3000), st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_the_reference_is_the_product_in_float64(
    tokens: int, groups: int, outputs: int, seed: int
) -> None:
    weight = random_two_four(outputs, 4 * groups, torch.bfloat16, seed=seed)
    x = inputs(tokens, 1, 4 * groups, torch.bfloat16, bias=False)[0]
    expected = np.einsum("ti,oi->to", x.double().numpy(), weight.double().numpy())
    assert np.allclose(product_in_float64(x, weight).numpy(), expected, rtol=1e-14, atol=1e-14)


def rehearsed(**options: Any) -> list[GemmTime]:
    defaults = {"dtypes": ["fp16"], "device": "cpu", "samples": 2, "warmup": 1}
    return list(measure([(8, 64)], [1, 3], **{**defaults, **options}))


@pytest.mark.slow
@no_gpu
def test_a_rehearsal_on_a_cpu_has_a_time_or_a_reason_for_every_kernel() -> None:
    rows = rehearsed()
    assert [(row.tokens, row.kernel) for row in rows] == [
        (tokens, kernel) for tokens in (1, 3) for kernel in KERNELS
    ]
    for row in rows:
        assert (row.dtype, row.outputs, row.inputs, row.failed) == ("fp16", 8, 64, False)
        if row.kernel in ("dense", "triton"):
            assert len(row.seconds or ()) == 2
            assert row.reason is None
            assert 0 < (row.error or 0) <= limit("fp16")
        else:
            assert row.seconds is None
            assert "Error: " in str(row.reason)


@no_gpu
def test_a_row_comes_before_the_next_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        made.append("called")
        return nn.functional.linear(x, random_two_four(8, 64, x.dtype))

    monkeypatch.setitem(linears.MAKERS, "triton", lambda weight, name: multiply)
    rows = measure(
        [(8, 64)], [1], dtypes=["fp16"], kernels=["dense", "triton"], device="cpu", samples=1
    )
    assert next(rows).kernel == "dense"
    assert not made
    assert next(rows).kernel == "triton"
    assert made


@no_gpu
def test_without_samples_products_are_checked_and_not_timed() -> None:
    for row in rehearsed(samples=0, kernels=["dense", "triton"]):
        assert 0 < (row.error or 0) <= limit("fp16")
        assert (row.seconds, row.reason, row.failed) == (None, None, False)


def broken(monkeypatch: pytest.MonkeyPatch, multiply: Callable[[Tensor], Tensor]) -> GemmTime:
    """The first row of a kernel that multiplies so."""
    monkeypatch.setitem(linears.MAKERS, "triton", lambda weight, name: lambda x, bias: multiply(x))
    return rehearsed(kernels=["triton"])[0]


@no_gpu
@pytest.mark.parametrize("wrong", [1.05, float("nan")])
def test_a_kernel_whose_product_is_wrong_has_failed(
    wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_two_four(8, 64, torch.float16)
    row = broken(monkeypatch, lambda x: nn.functional.linear(x, weight) * wrong)
    assert (row.seconds, row.failed) == (None, True)
    assert row.reason == "the product is not that of float64"


@no_gpu
def test_a_kernel_that_leaves_outputs_out_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_two_four(8, 64, torch.float16)

    def partly(x: Tensor) -> Tensor:
        # What it does not write held the right product before.
        y = nn.functional.linear(x, weight)
        del y
        y = x.new_empty(len(x), 8)
        y[:, :7] = nn.functional.linear(x, weight[:7])
        return y

    row = broken(monkeypatch, partly)
    assert (row.seconds, row.failed) == (None, True)
    assert math.isnan(row.error or 0)


@no_gpu
@pytest.mark.parametrize(
    ("problem", "failed"),
    [
        (RuntimeError("CUDA error: an illegal memory access"), True),
        (PlatformError("not on this GPU", fix="use another"), False),
        (NotImplementedError("not this shape"), False),
    ],
)
def test_errors_of_the_gpu_are_failures_and_refusals_are_not(
    problem: Exception, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(x: Tensor) -> Tensor:
        raise problem

    row = broken(monkeypatch, raises)
    assert (row.seconds, row.failed) == (None, failed)
    assert row.reason == f"{type(problem).__name__}: {problem}".splitlines()[0]


@no_gpu
def test_on_a_cpu_a_sample_is_the_time_of_one_of_the_calls() -> None:
    calls = [partial(time.sleep, 0.002) for _ in range(5)]
    seconds = replayed(calls, samples=3, warmup=1)
    assert len(seconds) == 3
    assert min(seconds) >= 0.002
    assert min(seconds) < 5 * 0.002


def test_weights_go_round_until_no_cache_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True
        device = "cuda"
        nbytes = 2 * 1024 * 4096

    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    copies = rotation(cast(Tensor, OnGpu))
    packed = OnGpu.nbytes * 9 / 16
    # One is in use; all the others together are more than twice the cache.
    assert (copies - 2) * packed < 2 * (50 << 20) <= (copies - 1) * packed


def test_a_line_gives_the_speed_relative_to_dense() -> None:
    def timed(kernel: str, seconds: float) -> GemmTime:
        return GemmTime(kernel, "fp16", 64, 32, 1, (seconds,), 0.0, None)

    found = [timed("dense", 2e-5), timed("triton", 1e-5)]
    assert line(found[0], found).endswith("20.0 us   1.00x")
    assert line(found[1], found).endswith("10.0 us   2.00x")
    refused = GemmTime("x", "fp16", 64, 32, 1, None, None, "no")
    assert line(refused, found).endswith("not measured: no")


@no_gpu
def test_the_benchmark_rehearses_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records.json"
    options = "--device cpu --shapes 8x64 --tokens 1 --samples 1 --kernels dense cutlass"
    monkeypatch.setattr(sys, "argv", ["semi_structured", *options.split(), "-o", str(out)])
    with pytest.raises(SystemExit) as exit_:
        semi_structured.main()
    assert not exit_.value.code
    document = json.loads(out.read_text())
    assert document["dtype"] == "fp16"
    assert "rehearsal" in document["gpu"]
    assert [each["kernel"] for each in document["records"]] == ["dense", "cutlass"]
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu_every_kernel_has_a_time_or_a_reason(tmp_path: Path) -> None:
    command = "benchmarks.semi_structured --shapes 512x1024 96x68 --tokens 1 64 --samples 5"
    subprocess.run(
        [sys.executable, "-m", *command.split(), "-o", tmp_path / "records.json"], check=True
    )
    records = json.loads((tmp_path / "records.json").read_text())["records"]
    assert len(records) == 2 * 2 * len(KERNELS)
    for each in records:
        assert (each["seconds"] is None) == (each["reason"] is not None)
        # 68 columns are too odd for torch's libraries, and for nothing of ours.
        if each["inputs"] == 1024 or each["kernel"] in ("dense", "triton", "mma-sp"):
            assert min(each["seconds"]) > 0, each
