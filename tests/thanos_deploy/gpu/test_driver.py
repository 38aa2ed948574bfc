import subprocess
import sys

import pytest

from thanos_deploy.errors import PlatformError
from thanos_deploy.gpu import driver
from thanos_deploy.gpu.driver import Gpu


def test_compute_capability_is_spelled_as_compilers_do() -> None:
    hopper = Gpu("H100", (9, 0), 80 * 10**9)
    assert hopper.arch == "sm90"
    assert hopper.has_sparse_tensor_cores
    assert not Gpu("T4", (7, 5), 16 * 10**9).has_sparse_tensor_cores


def test_a_machine_without_a_gpu_says_what_is_missing() -> None:
    found = driver.probe()
    if found.gpus:
        pytest.skip("there is a GPU")
    assert found.problem
    with pytest.raises(PlatformError, match="no GPU"):
        driver.require()


@pytest.mark.gpu
def test_the_driver_tells_of_every_gpu() -> None:
    if not driver.probe().gpus:
        pytest.skip("no GPU")
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [f"{g.name}, {g.capability[0]}.{g.capability[1]}" for g in driver.probe().gpus] == listed


@pytest.mark.gpu
def test_a_hidden_gpu_is_not_there() -> None:
    if not driver.probe().gpus:
        pytest.skip("no GPU")
    script = "from thanos_deploy import gpu; print(len(gpu.probe().gpus))"
    seen = subprocess.run(
        [sys.executable, "-c", script],
        env={"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == "0"
