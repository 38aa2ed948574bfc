import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.kernels.linears import MAKERS
from runtime.kernels.timing import measure, random_two_four
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
            assert each["seconds"]["median"] > 0, each
