import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Invoke
from thanos_deploy.bundle.codec import encode
from thanos_deploy.errors import PlatformError, ResourceError, UsageError
from thanos_deploy.machine import devices
from thanos_deploy.machine.precision import products_in
from thanos_deploy.measure.options import EvalRequest
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.stages.request import PruneRequest


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_the_device_that_is_asked_for(
    name: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, gpus)
    assert str(devices.choose(name)) == expected


@pytest.mark.parametrize(("name", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(
    name: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, gpus)
    with pytest.raises(PlatformError, match=f"--device {name}: .* sees {gpus} GPUs") as caught:
        devices.choose(name)
    assert "--device cpu" in caught.value.fix


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "CPU"])
def test_what_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        devices.choose(name)


def test_a_gpu_without_memory_says_for_what_and_how_much_was_asked() -> None:
    told = "CUDA out of memory. Tried to allocate 1.53 GiB. GPU 0 has a total capacity of 79.1 GiB"
    with (
        pytest.raises(ResourceError, match=r"block 7: .* 1\.53 GiB") as caught,
        devices.memory_for("block 7"),
    ):
        raise torch.OutOfMemoryError(told)
    assert caught.value.exit_code == 5
    assert "--device cpu" in caught.value.fix


def test_products_are_rounded_only_where_that_was_asked_for() -> None:
    cuda = torch.backends.cuda.matmul
    before = cuda.fp32_precision
    with products_in(torch.float32):
        assert cuda.fp32_precision == "ieee"
        with products_in(torch.bfloat16):
            assert cuda.fp32_precision == "tf32"
        assert cuda.fp32_precision == "ieee"
    assert cuda.fp32_precision == before


@pytest.mark.slow
def test_one_layer_is_solved_without_what_a_walk_needs() -> None:
    # In a process of its own: here everything has been imported already.
    code = (
        "import sys; sys.modules.update(accelerate=None)\n"
        "import thanos_deploy.pruning.solution, thanos_deploy.calibration.blocks\n"
        "from thanos_deploy import methods; [methods.load(name) for name in methods.names()]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("prune", "MODEL", "--pattern", "2:4", "-o", "OUT"), 4, "sees 0 GPUs"),
        (("prune", "MODEL", "--pattern", "2:4", "-o", "OUT", "--dry-run"), 4, "sees 0 GPUs"),
        (("eval", "MODEL"), 4, "sees 0 GPUs"),
        (("eval", "MODEL", "--runtime", "onnx"), 2, "--runtime torch"),
    ],
)
def test_commands_refuse_a_gpu_that_is_not_there(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    invoke: Invoke,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    show_gpus(monkeypatch, 0)
    places = {"MODEL": tiny_llama, "OUT": tmp_path / "out"}
    found, _, err = invoke(*(places.get(word, word) for word in arguments), "--device", "cuda")
    assert found == code
    assert said in " ".join(err.split())


def test_a_dry_run_names_the_device(invoke: Invoke, tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--nsamples", 2, "--seqlen", 32, "--device", "cpu", "--dry-run", "--json")
    code, out, _ = invoke("prune", tiny_llama, "--pattern", "2:4", "-o", tmp_path / "out", *options)
    assert code == 0
    assert json.loads(out)["device"] == "cpu"


def test_a_manifest_says_that_a_result_is_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pruning = PruneRequest.of(SemiStructured(2, 4), calib_forward="fp32")

    def recorded() -> list[object]:
        made = pruning.to_json(), encode(EvalRequest().recorded)
        return [options.get("device") for options in made]

    show_gpus(monkeypatch, 0)
    assert recorded() == [None, None]
    show_gpus(monkeypatch, 1)
    assert recorded() == ["cuda", "cuda"]
