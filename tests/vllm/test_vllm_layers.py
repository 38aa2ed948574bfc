import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import ENVIRONMENT, environment, needs_vllm

pytestmark = [*needs_vllm, pytest.mark.xdist_group("layers")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `layers.py` prints."""
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", Path(__file__).with_name("layers.py")],
        env=environment(tmp_path_factory.mktemp("vllm")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_rank_of_every_parallel_layer_has_its_rows_and_columns(found: Any) -> None:
    assert len(found["differences"]) == 5 * 3
    assert max(found["differences"].values()) < 1e-5


def test_a_layer_that_is_packed_in_part_is_refused(found: Any) -> None:
    assert "b.k_proj, b.v_proj is not packed" in found["mixed"]


def test_ranks_that_would_cut_through_a_byte_of_the_mask_are_refused(found: Any) -> None:
    assert "2 ranks would get 12 of 24 columns each" in found["cut"]
    assert "--tensor-parallel-size" in found["cut"]


def test_a_layer_that_is_not_named_is_vllm_s_own(found: Any) -> None:
    assert found["dense"] == "UnquantizedLinearMethod"


def test_a_gpu_without_sparse_tensor_cores_is_refused(found: Any) -> None:
    assert "thanos-2of4 is not supported for the current GPU" in found["capability"]
    assert "Minimum capability: 80. Current capability: 75." in found["capability"]


def test_lora_on_a_packed_layer_is_refused(found: Any) -> None:
    assert "b.o_proj: LoRA is not supported on packed 2:4 layers" in found["lora"]
    assert "folder: LoRA is not supported on packed 2:4 layers" in found["adapters"]
    assert found["adapters of others"] == "nothing"
