import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.semi_structured import show
from runtime.kernels.linears import MAKERS, Multiply
from runtime.kernels.timing import GemmTime, _of_kernel, measure, random_two_four
from thanos_deploy.errors import PlatformError
from thanos_deploy.packing import pack
from thanos_deploy.pattern import SemiStructured

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(PlatformError, match="no GPU"):
        measure()


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


def test_the_weights_that_are_timed_are_two_four_and_half_full() -> None:
    weight = random_two_four(32, 64, torch.float16)
    pack(weight, SemiStructured(2, 4))
    assert int((weight != 0).sum()) == weight.numel() // 2


def test_a_kernel_that_refuses_a_weight_has_a_reason_for_every_number_of_tokens() -> None:
    weight = random_two_four(96, 68, torch.float16)
    records = list(_of_kernel("cutlass", MAKERS["cutlass"], weight, (1, 16), 5, 1))
    assert [each.tokens for each in records] == [1, 16]
    for each in records:
        assert each.seconds is None
        assert "cutlass takes no 2:4 weight of torch.float16 [96, 68]" in str(each.reason)


@pytest.mark.parametrize("wrong", [1.05, float("nan")])
def test_a_kernel_whose_product_is_wrong_is_not_timed(wrong: float) -> None:
    weight = random_two_four(32, 64, torch.float16)

    def make(weight: Tensor, name: str) -> Multiply:
        return lambda x, bias: nn.functional.linear(x, weight, bias) * wrong

    (record,) = _of_kernel("wrong", make, weight, (16,), 5, 1)
    assert record.seconds is None
    assert record.reason == "the product is not that of the dense one"


def test_the_table_gives_speeds_relative_to_dense(capsys: pytest.CaptureFixture[str]) -> None:
    def timed(kernel: str, seconds: float) -> GemmTime:
        return GemmTime(kernel, 64, 32, 1, (seconds,), 0.0, None)

    show([timed("dense", 2e-5), timed("triton", 1e-5), GemmTime("x", 64, 32, 1, None, None, "no")])
    dense, ours, refused = capsys.readouterr().out.splitlines()
    assert dense.endswith("20.0 us   1.00x")
    assert ours.endswith("10.0 us   2.00x")
    assert refused.endswith("not measured: no")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu_every_kernel_has_a_time_or_a_reason(tmp_path: Path) -> None:
    command = "benchmarks.semi_structured --shapes 512x1024 96x68 --tokens 1 64 --samples 5"
    subprocess.run(
        [sys.executable, "-m", *command.split(), "-o", tmp_path / "records.json"], check=True
    )
    records = json.loads((tmp_path / "records.json").read_text())["records"]
    assert len(records) == 2 * 2 * (1 + len(MAKERS))
    for each in records:
        assert (each["seconds"] is None) == (each["reason"] is not None)
        # 68 columns are too odd for torch's libraries, and for nothing of ours.
        if each["inputs"] == 1024 or each["kernel"] in ("dense", "triton", "mma-sp"):
            assert min(each["seconds"]) > 0, each
